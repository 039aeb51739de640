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
from torch import Tensor

from d2moe_vllm.format.kinds import DTYPE_BYTES, DTYPES, Role
from offline.compare.baselines import CHANNELS
from offline.compare.rewriting import Rewrite, dense_shards
from offline.errors import UnreachableError
from offline.run.scores import Scores
from offline.source.dense import DenseModel

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
