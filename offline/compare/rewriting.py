"""An ordinary dense checkpoint made from a source: other weights in its experts, perhaps fewer of them. One tensor is
in memory at a time. Stock transformers and vLLM load it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from d2moe_vllm.format.kinds import DTYPES, Role, TensorSpec
from offline.errors import InputError
from offline.io.folders import check_new_folder, check_space, new_folder
from offline.io.shards import TORCH_DTYPES, Shard, plan_shards, write_file, write_shards
from offline.source.dense import DenseModel, open_dense
from offline.source.stored import ExpertTensor, expert_tensors

RECORD_FILE = "d2moe_baseline.json"
"""Says what was done to the source's experts."""
ROUTERS = (
    "gate.weight",
    "gate.e_score_correction_bias",
    "experts.e_score_correction_bias",
    "moe_statics.e_score_correction_bias",
    "e_score_correction_bias",
    "expert_bias",
    "router.weight",
    "router.bias",
    "router.layer.weight",
    "router.gate.weight",
    "router.proj.weight",
    "router.per_expert_scale",
)
"""Tensors beside a layer's experts that have a row (or a number) per expert, or are one row of numbers [1, experts]."""


@dataclass(frozen=True)
class Rewrite:
    """What is to be written. experts: in every layer; weight: (layer, expert, role) -> [out, in]; router: (layer, a
    tensor with a row per expert of the source) -> that with a row per expert; None where all experts stay. bias: as
    weight, -> [out] or, where experts have none, None; None where those of the source stay.

    Raises InputError where a layer has no router of the right size.
    """

    model: DenseModel
    experts: int
    weight: Callable[[int, int, Role], Tensor]
    router: Callable[[int, Tensor], Tensor] | None = None
    bias: Callable[[int, int, Role], Tensor | None] | None = None

    def write(self, out: Path, record: Mapping[str, Any]) -> None:
        """Writes the new folder `out`, with `record` beside the weights. Raises InputError where `out` exists or the
        disk is too small."""
        model = self.model
        check_new_folder(out)
        shards = dense_shards(model, self.experts)
        check_space(out.parent, sum(shard.nbytes for shard in shards))
        with new_folder(out) as folder:
            write_shards(folder, shards, self._tensor)
            config = {key: value for key, value in model.config.items() if key != "quantization_config"}
            experts = {key: self.experts for key in model.family.num_experts_keys if key in model.settings}
            config = model.family.changed(config, experts)
            write_file(folder / "config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
            write_file(folder / RECORD_FILE, json.dumps(record) + "\n")
            model.companions.copy(model.folder, folder)
            open_dense(str(folder))  # whole and loadable, or it is not published

    @cached_property
    def _routers(self) -> dict[str, int]:
        return _routers(self.model) if self.router else {}

    @cached_property
    def _parts(self) -> dict[str, ExpertTensor]:
        return dict(_expert_tensors(self.model, self.experts))

    def _tensor(self, name: str) -> Tensor:
        """By the name and in the layout of released checkpoints."""
        if self.router and name in self._routers:
            tensor, layer = self.model.other_tensor(name), self._routers[name]
            return self.router(layer, tensor.T).T.contiguous() if _is_row(tensor) else self.router(layer, tensor)
        if name not in self._parts:
            return self.model.other_tensor(name)
        return self._parts[name].assemble(
            self.weight, self.bias or self.model.bias, TORCH_DTYPES[DTYPES[self.model.dtype]]
        )


def _expert_tensors(model: DenseModel, experts: int) -> Iterator[tuple[str, ExpertTensor]]:
    """Those of the model with so many experts a layer, in the layout of released checkpoints."""
    shape = replace(model.shape, num_experts=experts)
    return expert_tensors(shape, model.family.layouts[0], shape.layers)


def dense_shards(model: DenseModel, experts: int) -> list[Shard]:
    """The files of the model with so many experts a layer. Raises InputError where routers are of another size."""
    specs = dict(model.other_tensors)
    for name in _routers(model) if experts != model.shape.num_experts else ():
        shape = (1, experts) if _is_row(specs[name]) else (experts, *specs[name].shape[1:])
        specs[name] = TensorSpec(specs[name].dtype, shape)
    for name, tensor in _expert_tensors(model, experts):
        specs[name] = TensorSpec(DTYPES[model.dtype], tensor.shape)
    return plan_shards(specs)


def _is_row(tensor: Tensor | TensorSpec) -> bool:
    return len(tensor.shape) == 2 and tensor.shape[0] == 1


def _routers(model: DenseModel) -> dict[str, int]:
    """Name of every tensor that has a row per expert -> its layer."""
    found: dict[str, int] = {}
    for layer in model.shape.layers:
        parent = model.family.experts_prefix(layer).removesuffix(".experts")
        names = [f"{parent}.{name}" for name in ROUTERS if f"{parent}.{name}" in model.other_tensors]
        specs = [model.other_tensors[name] for name in names]
        if not names or any(spec.shape[-1 if _is_row(spec) else 0] != model.shape.num_experts for spec in specs):
            raise InputError(f"layer {layer}: no router with a row per expert under {parent}; leave the baseline out")
        found |= dict.fromkeys(names, layer)
    return found
