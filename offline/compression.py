"""One layer: merge, prune, factor. Weights and statistics in, the checkpoint's tensors out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from d2moe_vllm.checkpoint import ROLES, CheckpointConfig, Role
from offline.errors import InputError
from offline.factorization import DELTAS, relative_error, shrink_gram
from offline.merging import MERGES, MergeOptions
from offline.pruning import column_scores, select_columns
from offline.recipe import Recipe
from offline.statistics import SITES, LayerStatistics

SELECTIONS: tuple[tuple[Role, ...], ...] = (("gate", "up"), ("down",))
"""Projections that share one selection of base columns, so that one gather feeds both (METHODS 1.2)."""

Weights = Mapping[Role, Sequence[Tensor]]


@dataclass(frozen=True)
class CompressedLayer:
    """tensors: by full checkpoint name; report: what d2moe_stats.json tells of this layer."""

    tensors: dict[str, Tensor]
    report: dict[str, Any]


def compress_layer(
    number: int, weights: Weights, statistics: LayerStatistics, config: CheckpointConfig, recipe: Recipe
) -> CompressedLayer:
    """Base and deltas of one layer (METHODS 1.1-1.3).

    weights: per role and expert [out, in], in their stored dtype, which is also the dtype of the result.
    The base is pruned and rounded to that dtype first, so that the deltas absorb what both lost.
    """
    if not all(torch.isfinite(energy).all() for energy in statistics.energy.values()):
        raise InputError(f"layer {number}: activations overflow float32 on the calibration text; use another text")
    dtype = weights["gate"][0].dtype
    tensors: dict[str, Tensor] = {}
    bases: dict[Role, Tensor | None] = dict.fromkeys(ROLES)
    if recipe.base.merge != "none":
        for selection in SELECTIONS:
            merged = {role: _merge(role, weights[role], statistics, recipe) for role in selection}
            columns = _select(merged, statistics, config.layers[number][selection[0]].kept_columns, config)
            for role in selection:
                stored = merged[role][:, columns.long()].to(dtype)
                tensors[config.tensor_name(number, 0, role, "base")] = stored
                tensors[config.tensor_name(number, 0, role, "base_columns")] = columns.clone()
                tensors[config.tensor_name(number, 0, role, "base_norms")] = stored.float().norm(dim=0)
                bases[role] = torch.zeros_like(merged[role]).index_copy_(1, columns.long(), stored.float())
    if statistics.fisher is not None:
        statistics.fisher = None  # as large as the layer itself in float32, and no longer needed
    errors = _factor_all(number, weights, bases, statistics, config, recipe, tensors)
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise InputError(f"{name} came out as NaN or infinite; try another dtype of the source or another text")
    report = {"tokens": statistics.tokens.tolist(), "relative_error": errors}
    return CompressedLayer(tensors, report)


def _merge(role: Role, weights: Sequence[Tensor], statistics: LayerStatistics, recipe: Recipe) -> Tensor:
    options = MergeOptions(recipe.base.fisher_epsilon, recipe.base.frequency_power)
    out_features, in_features = weights[0].shape
    merge = MERGES[recipe.base.merge](out_features, in_features, len(weights), options)
    for expert, weight in enumerate(weights):
        fisher = statistics.fisher[role][expert] if statistics.fisher is not None else None
        merge.add(weight, int(statistics.tokens[expert]), int(statistics.tokens.sum()), fisher)
    return merge.result()


def _select(merged: Mapping[Role, Tensor], statistics: LayerStatistics, kept: int, config: CheckpointConfig) -> Tensor:
    joint = torch.stack([base.double().square().sum(dim=0) for base in merged.values()]).sum(dim=0).sqrt()
    inputs = statistics.energy[SITES[next(iter(merged))]].double().sqrt()
    return select_columns(column_scores(joint, inputs), kept, config.pruning.groups)


def _factor_all(
    number: int,
    weights: Weights,
    bases: Mapping[Role, Tensor | None],
    statistics: LayerStatistics,
    config: CheckpointConfig,
    recipe: Recipe,
    tensors: dict[str, Tensor],
) -> dict[Role, list[float]]:
    """Add every delta to `tensors`; returns the whitened relative error per role and expert."""
    errors: dict[Role, list[float]] = {role: [] for role in ROLES}
    for expert in range(config.num_experts):
        for selection in SELECTIONS:
            measured = statistics.mean_gram(expert, SITES[selection[0]])
            gram = shrink_gram(measured, int(statistics.tokens[expert]), recipe.delta.shrinkage)
            for role in selection:
                weight, base = weights[role][expert], bases[role]
                delta = weight.double() if base is None else weight.double() - base.double()
                rank = config.layers[number][role].rank
                u, v = (f.to(weight.dtype) for f in DELTAS[recipe.delta.method](delta, gram, rank))
                tensors[config.tensor_name(number, expert, role, "delta_u")] = u
                tensors[config.tensor_name(number, expert, role, "delta_v")] = v
                approximation = u.double() @ v.double() + (0 if base is None else base.double())
                errors[role].append(relative_error(weight, approximation, gram))
    return errors
