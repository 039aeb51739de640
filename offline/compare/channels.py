"""A baseline for `d2moe compare`: intermediate channels of experts are removed, over all layers at once, by the
second-order score sum (dL/dh * h)² (METHODS, Baselines; as HEAPr ranks its atomic experts).

Every expert ends with another width, which no config of these families can say. So the channels that go are zero (rows
of gate and up, the column of down) in a checkpoint of the original architecture and size, which stock transformers
and vLLM load; what it would take without the zeros is counted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from d2moe_vllm.format.config import DTYPE_BYTES, DTYPES, Role
from offline.compare.baselines import CHANNELS
from offline.compare.rewriting import Rewrite, dense_shards
from offline.errors import InputError, UnreachableError
from offline.io.progress import Steps
from offline.methods.layer import LayerJob
from offline.plan.plan import Plan, make_plan
from offline.plan.recipe import Base, Calibration, Recipe
from offline.plan.resources import layer_work
from offline.run.sweep import Run
from offline.source.dense import DenseModel
from offline.source.text import Windows
from offline.work.statistics import channel_scores
from offline.work.workdir import WorkDir, fingerprint

PART = "channels"
"""A layer's part that holds its scores."""

Scores = Mapping[int, Tensor]
"""Layer -> float64 [experts, intermediate]."""
Pruned = Mapping[int, Tensor]
"""Layer -> bool [experts, intermediate], true for channels that go."""


def channel_bytes(model: DenseModel) -> int:
    """Of one channel as it is written: a row of gate, one of up and a column of down."""
    return 3 * model.shape.hidden_size * DTYPE_BYTES[DTYPES[model.dtype]]


def channels_to_prune(model: DenseModel, ratio: float) -> int:
    """The smallest number of channels without which the files are at most (1 - ratio) of the source's bytes.

    Raises UnreachableError where there are not so many.
    """
    shape = model.shape
    written = sum(shard.nbytes for shard in dense_shards(model, shape.num_experts))
    count = max(math.ceil((written - (1 - ratio) * model.reader.nbytes) / channel_bytes(model)), 0)
    every = len(shape.layers) * shape.num_experts * shape.intermediate_size
    if count > every:
        most = max(1 - (written - every * channel_bytes(model)) / model.reader.nbytes, 0.0)
        raise UnreachableError(
            f"ratio {ratio:g} cannot be reached: without any channel the ratio is {most:.3f}; choose a lower ratio",
            most,
        )
    return count


# Scores


class ChannelScores(Run):
    """A compression's sweep backwards, at which every layer's channels are scored; nothing is merged or factored."""

    def _merge(self, job: LayerJob) -> None:
        self.steps.label(f"layer {job.number + 1}/{self.layers}: channel scores")
        scores = []
        for expert in range(job.experts):
            scores.append(channel_scores(job.weights(expert), job.routing, expert, job.activation).cpu())
            self.steps.advance(self.costs.merge / job.experts)
        found = torch.stack(scores)
        if not torch.isfinite(found).all():
            raise InputError(f"layer {job.number}: gradients overflow on the calibration text; use another")
        self.work.save_part(job.number, PART, {"scores": found})

    def _factor(self, job: LayerJob) -> None:
        pass


def scoring_plan(model: DenseModel, calibration: Calibration, memory: int | None) -> Plan:
    """How the sweep runs: as that of a compression that needs gradients, of which nothing else counts. Raises
    InputError where memory does not suffice."""
    shape = model.shape
    share = len(shape.layers) * shape.num_experts * shape.intermediate_size * channel_bytes(model) / model.reader.nbytes
    # Any ratio that can be reached.
    ratio = round(min(share, 1) / 2, 3)
    recipe = Recipe(ratio=ratio, base=Base(kind="none", groups=1), calibration=calibration)
    return make_plan(model, recipe, memory=memory, allow_larger=True)


def score_channels(plan: Plan, windows: Windows, folder: Path, device: torch.device, console: Console) -> Scores:
    """Scores of all channels over the calibration windows, by the plan of `scoring_plan`; activations lie in `folder`,
    where an interrupted run is continued. Raises InputError where gradients overflow."""
    model, costs = plan.model, layer_work(plan)
    mark = fingerprint(model, plan.recipe.to_json(), windows.sha256, {"device": device.type}) | {"what": PART}
    work = WorkDir(folder, mark, restart=True)
    try:
        total = model.num_layers * (costs.forward + costs.record) + len(model.shape.layers) * costs.merge
        with Steps(total, console) as steps:
            ChannelScores(plan, windows.tokens, work, steps, device).compress_layers()
        found = {layer: work.load_part(layer, PART)["scores"] for layer in model.shape.layers}
        work.remove()
    finally:
        work.close()
    return found


def lowest(scores: Scores, count: int) -> Pruned:
    """The `count` channels of lowest score, of all layers and experts together; of equal ones the first."""
    flat = torch.cat([one.flatten() for one in scores.values()])
    pruned = torch.zeros(len(flat), dtype=torch.bool)
    pruned[flat.argsort(stable=True)[:count]] = True
    parts = pruned.split([one.numel() for one in scores.values()])
    return {layer: part.view_as(one) for (layer, one), part in zip(scores.items(), parts, strict=True)}


# Writing


def write_pruned(model: DenseModel, pruned: Pruned, out: Path) -> None:
    """The model with these channels zero, as a dense checkpoint in the new folder `out`; its record says how many each
    expert keeps, and what is left when the zeros are not counted. Raises InputError where `out` exists."""

    def weight(layer: int, expert: int, role: Role) -> Tensor:
        mask = pruned[layer][expert]
        return model.weight(layer, expert, role).masked_fill(mask if role == "down" else mask[:, None], 0)

    gone, shards = sum(int(one.sum()) for one in pruned.values()), dense_shards(model, model.shape.num_experts)
    parameters = sum(spec.numel for shard in shards for spec in shard.tensors.values())
    record = {
        "baseline": CHANNELS,
        "layers": {layer: (~one).sum(dim=1).tolist() for layer, one in pruned.items()},
        "pruned_channels": gone,
        "counted": {
            "bytes": sum(shard.nbytes for shard in shards) - gone * channel_bytes(model),
            "parameters": parameters - gone * 3 * model.shape.hidden_size,
        },
    }
    Rewrite(model, model.shape.num_experts, weight).write(out, record)
