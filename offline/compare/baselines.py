"""Baselines for `d2moe compare` that keep the original architecture: the same model with fewer experts (METHODS,
Baselines). Experts are counted over the calibration windows, then some are dropped, or several become one.

The result is an ordinary dense checkpoint: every layer has the same, smaller number of experts, the router lost the
others' rows, config.json says the new number. `d2moe_baseline.json` says, per layer and new expert, which of the
source's experts it was made from. For fewer bits see rounding.py; what the project's own pipeline can do is a recipe.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from d2moe_vllm.format.kinds import Role
from offline.compare.rewriting import Rewrite, dense_shards
from offline.errors import UnreachableError
from offline.io.folders import check_new_folder
from offline.io.progress import Steps
from offline.run.usage import Usage
from offline.source.dense import DenseModel

COLUMNS = 1 << 16
"""Weights of every expert that are widened at once where experts are compared."""

Members = list[list[int]]
"""Per new expert of a layer the source's experts that it is made from, ascending."""


Choose = Callable[[DenseModel, int, Usage, int], Members]
"""(model, layer, usage, experts wanted) -> what they are made from."""


# How many experts, and which


def fewer_experts(model: DenseModel, ratio: float) -> int:
    """The largest number of experts a layer whose files are at most (1 - ratio) of the source's bytes.

    Raises UnreachableError where the router could not choose its experts among so few.
    """
    step, least = _group_step(model), _least(model)
    for experts in range(model.shape.num_experts - step, least - 1, -step):
        if stored_ratio(model, experts) >= ratio:
            return experts
    most = max(stored_ratio(model, least), 0.0)
    raise UnreachableError(
        f"ratio {ratio:g} cannot be reached: with {least} experts a layer, as many as the router needs, the ratio is "
        f"{most:.3f}; choose a lower ratio",
        most,
    )


def stored_ratio(model: DenseModel, experts: int) -> float:
    """Share of the source's bytes that is gone with so many experts a layer."""
    return 1 - sum(shard.nbytes for shard in dense_shards(model, experts)) / model.reader.nbytes


def _group_step(model: DenseModel) -> int:
    """Groups of experts that the router chooses among first keep equal sizes."""
    return int(model.settings.get("n_group") or 1)


def _least(model: DenseModel) -> int:
    groups, chosen = _group_step(model), int(model.settings.get("topk_group") or 1)
    # A group is judged by its two best experts (DeepSeek-V3), and the chosen groups must hold enough experts.
    each = max(-(-model.shape.experts_per_token // (chosen if groups > 1 else 1)), 2)
    return groups * each


def _in_groups(model: DenseModel, experts: int) -> list[tuple[range, int]]:
    """(a group's experts, how many of them remain)."""
    groups = _group_step(model)
    size = model.shape.num_experts // groups
    return [(range(start, start + size), experts // groups) for start in range(0, groups * size, size)]


def keep_best(model: DenseModel, scores: Tensor, experts: int) -> Members:
    """The experts of highest score, in their old order; of equal ones the first."""
    kept: list[int] = []
    for group, count in _in_groups(model, experts):
        best = scores[group.start : group.stop].argsort(descending=True, stable=True)[:count]
        kept += sorted(group.start + int(place) for place in best)
    return [[expert] for expert in kept]


def by_frequency(model: DenseModel, layer: int, usage: Usage, experts: int) -> Members:
    """Drops the experts that fewest tokens are routed to."""
    return keep_best(model, usage.tokens, experts)


def by_output_norm(model: DenseModel, layer: int, usage: Usage, experts: int) -> Members:
    """Drops the experts whose weighted output is smallest, in the mean over the tokens routed to them."""
    return keep_best(model, usage.output / usage.tokens.clamp(min=1), experts)


def by_distance(model: DenseModel, layer: int, usage: Usage, experts: int) -> Members:
    """Joins the experts whose weights are nearest to one another."""
    distances = weight_distances(model, layer)
    clusters: Members = []
    for group, count in _in_groups(model, experts):
        inside = distances[group.start : group.stop, group.start : group.stop]
        clusters += [[group.start + expert for expert in members] for members in cluster(inside, count)]
    return clusters


def weight_distances(model: DenseModel, layer: int) -> Tensor:
    """||W_i - W_j|| over gate, up and down together, float64 [experts, experts]; channels are taken as they lie."""
    products = torch.zeros(model.shape.num_experts, model.shape.num_experts, dtype=torch.float64)
    for role in model.shape.roles:
        weights = [model.weight(layer, expert, role).flatten() for expert in range(model.shape.num_experts)]
        for start in range(0, len(weights[0]), COLUMNS):
            part = torch.stack([weight[start : start + COLUMNS].double() for weight in weights])
            products += part @ part.T
    squares = products.diagonal()
    return (squares[:, None] + squares[None, :] - 2 * products).clamp(min=0).sqrt()


def cluster(distances: Tensor, count: int) -> Members:
    """Agglomerative clustering with average linkage, until `count` clusters are left; by their first members."""
    clusters = [[number] for number in range(len(distances))]
    between = distances.clone().fill_diagonal_(float("inf"))
    while len(clusters) > count:
        first, second = sorted(divmod(int(between.argmin()), len(clusters)))
        left, right = len(clusters[first]), len(clusters[second])
        joined = (left * between[first] + right * between[second]) / (left + right)
        between[first], between[:, first] = joined, joined
        between[first, first] = float("inf")
        rest = [number for number in range(len(clusters)) if number != second]
        between = between[rest][:, rest]
        clusters[first] = sorted(clusters[first] + clusters[second])
        del clusters[second]
    return clusters


FEWER_EXPERTS: Mapping[str, Choose] = {
    "frequency": by_frequency,
    "output-norm": by_output_norm,
    "merge": by_distance,
}
"""Name -> which of a layer's experts remain, and from what."""
RECIPES: Mapping[str, Mapping[str, Any]] = {
    "low-rank": {"bits": 16},
    "svd": {"allocation": "uniform", "base": {"kind": "none"}},
    "channels": {"bits": 16, "base": {"kind": "none"}, "delta": {"method": "dense"}},
}
"""Name -> settings of a recipe: what the project's own pipeline can do."""


class Bits(NamedTuple):
    """bits: of a weight; feedback: whether what a column loses is made up for by those to come."""

    bits: int
    feedback: bool


ROUNDED: Mapping[str, Bits] = {
    f"{name}-{bits}": Bits(bits, feedback)
    for name, feedback in (("rtn", False), ("gptq", True))
    for bits in (8, 4, 3, 2)
}
"""Of rounding.py: experts keep all their weights in fewer bits; the size does not follow the ratio."""
BASELINES = (*FEWER_EXPERTS, *RECIPES, *ROUNDED)


# Writing


def write_fewer(
    model: DenseModel, name: str, experts: int, usage: Mapping[int, Usage], out: Path, steps: Steps
) -> None:
    """The model with so many experts a layer, chosen by the baseline `name`, as a dense checkpoint in the new folder
    `out`; one tensor in memory at a time. `steps` is told of every layer. Raises InputError where `out` exists."""
    check_new_folder(out)
    steps.label(f"{name}: choosing experts")
    made: dict[int, list[dict[int, float]]] = {}
    for layer in model.shape.layers:
        members = FEWER_EXPERTS[name](model, layer, usage[layer], experts)
        made[layer] = [_shares(usage[layer], one) for one in members]
        steps.advance(1)
    steps.label(f"{name}: writing the checkpoint")

    def weight(layer: int, expert: int, role: Role) -> Tensor:
        return _average(made[layer][expert], lambda old: model.weight(layer, old, role))

    def bias(layer: int, expert: int, role: Role) -> Tensor | None:
        if not model.shape.biased:
            return None
        return _average(made[layer][expert], lambda old: _there(model.bias(layer, old, role)))

    def router(layer: int, rows: Tensor) -> Tensor:
        return torch.stack([_average(shares, rows.__getitem__) for shares in made[layer]])

    record = {"baseline": name, "layers": {layer: [sorted(one) for one in found] for layer, found in made.items()}}
    Rewrite(model, experts, weight, router, bias).write(out, record)


def _there(bias: Tensor | None) -> Tensor:
    if bias is None:
        raise ValueError("experts of a model that has biases have them all")
    return bias


def _shares(usage: Usage, members: Sequence[int]) -> dict[int, float]:
    """Each member's share in their average: by how often it is used, equal where none of them ever is."""
    tokens = usage.tokens[list(members)]
    shares = tokens / tokens.sum() if tokens.sum() else torch.full_like(tokens, 1 / len(members))
    return dict(zip(members, shares.tolist(), strict=True))


def _average(shares: Mapping[int, float], fetch: Callable[[int], Tensor]) -> Tensor:
    """In float32, rounded once; a single member as it is, bit by bit."""
    if len(shares) == 1:
        return fetch(next(iter(shares)))
    first = fetch(next(iter(shares)))
    total = torch.zeros_like(first, dtype=torch.float32)
    for expert, share in shares.items():
        total.add_(fetch(expert).float(), alpha=share)
    return total.to(first.dtype)
