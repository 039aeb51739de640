"""Checkpoint tensors -> this rank's parameters of one MoE layer; refuses what does not fit or is not complete.

Knows neither vLLM nor any backend: a rank is (tensor-parallel rank and size, which experts are local).

Tensor-parallel slices need no collective of their own (the layer's all-reduce adds up): gate and up
replicate V and shard U and base by output rows; down shards V and base by input columns and replicates U.
Kept columns are spread evenly over `groups` slices of the input, so a rank's are one contiguous run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from d2moe_vllm.checkfiles import check_columns
from d2moe_vllm.checkpoint import CheckpointConfig, CheckpointError, Role

SHARD_ROLES: dict[str, Role] = {"w1": "gate", "w3": "up", "w2": "down"}
"""vLLM's shard ids."""

SHARED_KINDS = ("base", "base_columns", "base_norms")
"""What rides with expert 0 and belongs to every rank, wherever expert 0 lives."""


class LayerLoader:
    """Allocates one MoE layer's parameters and fills them, tensor by tensor, in any order.

    local_expert: global expert number -> this rank's index, -1 if the expert lives elsewhere.
    Raises CheckpointError, in one line, where groups or sizes do not divide by tp_size.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        layer: int,
        *,
        num_local_experts: int,
        local_expert: Callable[[int], int],
        tp_rank: int = 0,
        tp_size: int = 1,
    ) -> None:
        groups = config.pruning.groups
        if groups % tp_size or config.intermediate_size % tp_size:
            raise CheckpointError(
                f"tensor-parallel size {tp_size} does not divide this checkpoint's {groups} column groups and "
                f"{config.intermediate_size} intermediate channels; use a size that divides both"
            )
        self.config, self.layer = config, layer
        self.num_local_experts, self.local_expert = num_local_experts, local_expert
        self.tp_rank, self.tp_size = tp_rank, tp_size
        self.loaded: set[tuple[str, Role, int]] = set()
        self._arrived: dict[tuple[str, Role], Tensor] = {}

    @property
    def intermediate_size(self) -> int:
        """This rank's share of the intermediate channels."""
        return self.config.intermediate_size // self.tp_size

    def empty_parameters(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Uninitialised parameters by name, in the layout of ops.reference.fused_experts, on the default device.

        Columns and norms get valid values, because `--load-format dummy` leaves integers as they are.
        """
        layer, experts = self.config.layers[self.layer], self.num_local_experts
        hidden, own = self.config.hidden_size, self.intermediate_size
        parameters: dict[str, Tensor] = {}
        if rank := layer.gate.rank + layer.up.rank:
            parameters["w13_delta_u"] = torch.empty(experts, own, rank, dtype=dtype)
            parameters["w13_delta_v"] = torch.empty(experts, rank, hidden, dtype=dtype)
        if kept := layer.gate.kept_columns:
            parameters["w13_base"] = torch.empty(kept, 2 * own, dtype=dtype)
            parameters["w13_base_columns"] = self._spread(hidden, kept, self.config.pruning.groups)
            parameters["w13_base_norms"] = torch.ones(kept, dtype=torch.float32)
        if rank := layer.down.rank:
            parameters["w2_delta_u"] = torch.empty(experts, hidden, rank, dtype=dtype)
            parameters["w2_delta_v"] = torch.empty(experts, rank, own, dtype=dtype)
        if kept := layer.down.kept_columns // self.tp_size:
            parameters["w2_base"] = torch.empty(kept, hidden, dtype=dtype)
            parameters["w2_base_columns"] = self._spread(own, kept, self.config.pruning.groups // self.tp_size)
            parameters["w2_base_norms"] = torch.ones(kept, dtype=torch.float32)
        return parameters

    @staticmethod
    def _spread(inputs: int, kept: int, groups: int) -> Tensor:
        """The first columns of every group."""
        within = torch.arange(kept // groups, dtype=torch.int32)
        starts = torch.arange(groups, dtype=torch.int32) * (inputs // groups)
        return (starts.unsqueeze(1) + within).flatten()

    def weight_loader(self, kind: str) -> Callable[..., bool | None]:
        """The `weight_loader` attribute of the parameters of one kind ("delta_u", "base", ...)."""

        def load(
            param: Tensor,
            loaded_weight: Tensor,
            weight_name: str,
            shard_id: str,
            expert_id: int,
            return_success: bool = False,
        ) -> bool | None:
            stored = self.load(param.data, loaded_weight, kind, SHARD_ROLES[shard_id], expert_id)
            return stored if return_success else None

        # Llama-4's and others' own loaders ask for this before they pass the expert's number.
        load.supports_moe_loading = True  # type: ignore[attr-defined]
        return load

    def load(self, param: Tensor, tensor: Tensor, kind: str, role: Role, expert: int) -> bool:
        """Copy this rank's part of one checkpoint tensor into its parameter.

        Returns False where nothing of it belongs on this rank. Raises CheckpointError, naming the tensor,
        for a wrong shape and for columns that break the format.
        """
        shared = kind in SHARED_KINDS
        self._check_shape(tensor, kind, role, expert)
        local = 0 if shared else self.local_expert(expert)
        if local < 0:
            return False
        if kind == "base_columns":
            check_columns(self._name(kind, role, expert), tensor.tolist(), self.config, role)
        if shared:
            self._load_shared(param, tensor, kind, role)
        else:
            self._load_delta(param[local], tensor, kind, role)
        self.loaded.add((kind, role, 0 if shared else expert))
        return True

    def missing(self) -> list[str]:
        """Checkpoint names of this rank's tensors that have not been loaded, in checkpoint order."""
        names = []
        for role in self.config.projections:
            projection = self.config.layers[self.layer][role]
            expected = [(kind, 0) for kind in SHARED_KINDS if projection.kept_columns]
            experts = [e for e in range(self.config.num_experts) if projection.rank and self.local_expert(e) >= 0]
            expected += [(kind, expert) for expert in experts for kind in ("delta_u", "delta_v")]
            names += [self._name(k, role, e) for k, e in expected if (k, role, e) not in self.loaded]
        return names

    def _load_delta(self, param: Tensor, tensor: Tensor, kind: str, role: Role) -> None:
        """param: the local expert's [out, k] or [k, in]."""
        if role == "down":
            param.copy_(tensor if kind == "delta_u" else self._inputs(tensor))
            return
        rank = self.config.layers[self.layer].gate.rank
        part = slice(0, rank) if role == "gate" else slice(rank, None)
        if kind == "delta_u":
            param[:, part].copy_(self._outputs(tensor))
        else:
            param[part].copy_(tensor)

    def _load_shared(self, param: Tensor, tensor: Tensor, kind: str, role: Role) -> None:
        if kind == "base":
            if role == "down":
                param.copy_(self._inputs(tensor).t())
            else:
                start = 0 if role == "gate" else self.intermediate_size
                param[:, start : start + self.intermediate_size].copy_(self._outputs(tensor).t())
        elif role == "down":
            offset = self.tp_rank * self.intermediate_size if kind == "base_columns" else 0
            param.copy_(self._inputs(tensor) - offset)
        else:
            self._load_joint(param, tensor, kind, role)

    def _load_joint(self, param: Tensor, tensor: Tensor, kind: str, role: Role) -> None:
        """Columns and norms of gate and up, which share one selection: both have to arrive."""
        self._arrived[kind, role] = tensor
        other: Role = "up" if role == "gate" else "gate"
        if (kind, other) not in self._arrived:
            return
        twin = self._arrived.pop((kind, other))
        self._arrived.pop((kind, role))
        if kind == "base_norms":
            param.copy_((tensor.float().square() + twin.float().square()).sqrt())
        elif torch.equal(tensor, twin):
            param.copy_(tensor)
        else:
            names = f"{self._name(kind, 'gate', 0)} and {self._name(kind, 'up', 0)}"
            raise CheckpointError(f"{names} differ, gate and up share one selection; compress the model again")

    def _outputs(self, tensor: Tensor) -> Tensor:
        """This rank's output rows."""
        size = tensor.shape[0] // self.tp_size
        return tensor.narrow(0, self.tp_rank * size, size)

    def _inputs(self, tensor: Tensor) -> Tensor:
        """This rank's input columns (the last dimension)."""
        size = tensor.shape[-1] // self.tp_size
        return tensor.narrow(-1, self.tp_rank * size, size)

    def _name(self, kind: str, role: Role, expert: int) -> str:
        return self.config.tensor_name(self.layer, expert, role, kind)

    def _check_shape(self, tensor: Tensor, kind: str, role: Role, expert: int) -> None:
        name = self._name(kind, role, expert)
        spec = self.config.projection_tensors(self.layer, role).get(name)
        if spec is None:
            raise CheckpointError(f"{name} does not belong in this checkpoint; its config.json lists no such tensor")
        if tuple(tensor.shape) != spec.shape:
            raise CheckpointError(f"{name} is {list(tensor.shape)}, expected {list(spec.shape)}; copy it again")


def options(config: CheckpointConfig, layer: int, tp_size: int, scope: str, *, prune_down: bool) -> Mapping[str, Any]:
    """What ops.fused_experts needs to know of a layer on one rank, besides num_experts and activation.

    prune_down False: use all kept columns of down (expert parallelism, METHODS 1.5).
    """
    projections, groups = config.layers[layer], config.pruning.groups
    down_used = projections.down.used_columns if prune_down else projections.down.kept_columns
    return {
        "gate_rank": projections.gate.rank,
        "scope": scope,
        "w13_groups": groups,
        "w13_used": projections.gate.used_columns,
        "w2_groups": groups // tp_size,
        "w2_used": down_used // tp_size,
    }
