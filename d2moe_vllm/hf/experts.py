"""The routed experts of one layer as a torch module whose state dict has a checkpoint's own names.

Used by modeling_d2moe.py, into which it is copied for checkpoints, and layer by layer by offline/.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from d2moe_vllm.ops.reference import fused_experts


class D2Projection(nn.Module):
    """One expert's tensors for one projection, by the names they have in a checkpoint.

    delta_u [out, rank] and delta_v [rank, in]; with kept_columns (expert 0) also base [out, kept],
    base_columns int32 [kept] and base_norms float32 [kept]. Contents are undefined until loaded.
    """

    def __init__(self, out_features: int, in_features: int, rank: int, kept_columns: int = 0) -> None:
        super().__init__()
        if rank:
            self.delta_u = nn.Parameter(torch.empty(out_features, rank), requires_grad=False)
            self.delta_v = nn.Parameter(torch.empty(rank, in_features), requires_grad=False)
        if kept_columns:
            self.base = nn.Parameter(torch.empty(out_features, kept_columns), requires_grad=False)
            self.register_buffer("base_columns", torch.zeros(kept_columns, dtype=torch.int32))
            self.register_buffer("base_norms", torch.zeros(kept_columns, dtype=torch.float32))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> D2Projection:
        norms = self._buffers.get("base_norms")
        super()._apply(fn, recurse)
        moved = self._buffers.get("base_norms")
        if norms is not None and moved is not None and moved.dtype != torch.float32:
            # model.to(bfloat16) must not round what selections are made by.
            self._buffers["base_norms"] = norms.to(moved.device)
        return self


class _PerExpert(Sequence[Tensor]):
    """Matrices indexed by expert, put together when asked for: nothing is held twice."""

    def __init__(self, length: int, get: Callable[[int], Tensor]) -> None:
        self._length, self._get = length, get

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, expert: Any) -> Any:
        if not 0 <= expert < self._length:
            raise IndexError(expert)
        return self._get(expert)


class D2Experts(nn.Module):
    """The routed experts of one layer, in place of transformers' own module.

    layer: per role ("gate", "up", "down") the checkpoint's rank, kept_columns and used_columns.
    projections: role -> submodule name (Mixtral: w1, w3, w2); state-dict names are `{expert}.{name}.{kind}`.
    activation: a name of `ops.reference.ACTIVATIONS` or a callable. scope: "batch", "token" or "off"; an
    attribute that may be changed between calls. padding_mask: bool [T] or None, likewise.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        layer: Mapping[str, Mapping[str, int]],
        *,
        groups: int,
        projections: Mapping[str, str],
        activation: str | Callable[[Tensor], Tensor] = "silu",
        scope: str = "off",
    ) -> None:
        super().__init__()
        self.num_experts, self.intermediate_size = num_experts, intermediate_size
        self.layer, self.groups, self.projections = layer, groups, dict(projections)
        self.activation, self.scope = activation, scope
        self.padding_mask: Tensor | None = None
        for expert in range(num_experts):
            modules = nn.Module()
            for role, name in self.projections.items():
                down = role == "down"
                out_features, in_features = (
                    (hidden_size, intermediate_size) if down else (intermediate_size, hidden_size)
                )
                kept = layer[role]["kept_columns"] if expert == 0 else 0
                modules.add_module(name, D2Projection(out_features, in_features, layer[role]["rank"], kept))
            self.add_module(str(expert), modules)

    def projection(self, expert: int, role: str) -> D2Projection:
        return getattr(getattr(self, str(expert)), self.projections[role])

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [..., H], top_k_index int [T, K], top_k_weights [T, K]: [..., H]. METHODS 1.6."""
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        # Only a selection shared by the batch can be influenced by padding rows.
        mask = self.padding_mask if self.scope == "batch" else None
        if mask is not None and mask.shape[0] != rows.shape[0]:
            raise ValueError(f"padding mask for {mask.shape[0]} rows, but {rows.shape[0]} tokens reach the experts")
        gate, down = self.layer["gate"], self.layer["down"]
        tensors = [rows, top_k_weights, top_k_index, *self._gate_up_tensors(), *self._down_tensors(), mask]
        output = fused_experts(
            *tensors,
            num_experts=self.num_experts,
            gate_rank=gate["rank"],
            activation=self.activation,
            scope=self.scope,
            w13_groups=self.groups,
            w13_used=gate["used_columns"],
            w2_groups=self.groups,
            w2_used=down["used_columns"],
        )
        return output.reshape(hidden_states.shape)

    def _gate_up_tensors(self) -> Iterator[Any]:
        """Deltas u and v, base, its columns and norms, in fused_experts' layout and order."""
        ranked = [role for role in ("gate", "up") if self.layer[role]["rank"]]
        for kind, axis in (("delta_u", 1), ("delta_v", 0)):
            yield self._per_expert(ranked, kind, axis) if ranked else None
        gate, up = self.projection(0, "gate"), self.projection(0, "up")
        if not hasattr(gate, "base"):
            yield from (None, None, None)
            return
        yield torch.cat([gate.base, up.base]).t()
        yield gate.base_columns
        yield (gate.base_norms.square() + up.base_norms.square()).sqrt()

    def _down_tensors(self) -> Iterator[Any]:
        ranked = ["down"] if self.layer["down"]["rank"] else []
        for kind in ("delta_u", "delta_v"):
            yield self._per_expert(ranked, kind, 0) if ranked else None
        down = self.projection(0, "down")
        if not hasattr(down, "base"):
            yield from (None, None, None)
            return
        yield down.base.t()
        yield down.base_columns
        yield down.base_norms

    def _per_expert(self, roles: list[str], kind: str, axis: int) -> _PerExpert:
        def join(expert: int) -> Tensor:
            parts = [getattr(self.projection(expert, role), kind) for role in roles]
            return parts[0] if len(parts) == 1 else torch.cat(parts, dim=axis)

        return _PerExpert(self.num_experts, join)
