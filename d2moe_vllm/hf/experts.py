"""The routed experts of one layer as a torch module whose state dict has a checkpoint's own names.

Used by modeling_d2moe.py, into which it is copied for checkpoints, and layer by layer by offline/.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from d2moe_vllm.ops.reference import Weights, fused_experts

INDEX_KINDS = ("base_columns", "delta_columns", "u_index")
"""The tensors that say which columns, or whose U; all others but base_norms (float32) have the weights' dtype."""


def projection_shapes(
    projection: Mapping[str, Any], trimmed: Sequence[int], num_experts: int, out_features: int, in_features: int
) -> Iterator[tuple[int, str, tuple[int, ...]]]:
    """(expert, kind, shape) of every tensor a checkpoint stores of one projection of one layer.

    projection: the layer's entry of `quantization_config` for one role. trimmed: experts without deltas.
    """
    if kept := projection["kept_columns"]:
        yield 0, "base", (out_features, kept)
        yield 0, "base_columns", (kept,)
        yield 0, "base_norms", (kept,)
    if base_rank := projection.get("base_rank", 0):
        yield 0, "base_u", (out_features, base_rank)
        yield 0, "base_v", (base_rank, in_features)
    if not (rank := projection["rank"]):
        return
    own = [expert for expert in range(num_experts) if expert not in trimmed]
    shared_v, distinct_u = projection.get("shared_v", False), projection.get("distinct_u", 0)
    if shared_v:
        yield 0, "shared_v", (rank, in_features)
    if distinct_u:
        yield 0, "u_index", (num_experts,)
    for j in range(distinct_u) if distinct_u else own:
        yield j, "delta_u", (out_features, rank)
    for expert in () if shared_v else own:
        if projection.get("delta", "factors") == "columns":
            yield expert, "delta_columns", (rank,)
        else:
            yield expert, "delta_v", (rank, in_features)


class D2Projection(nn.Module):
    """One expert's tensors for one projection, by the names they have in a checkpoint.

    Which these are, projection_shapes says. Contents are undefined until loaded.
    """

    def add(self, kind: str, shape: tuple[int, ...]) -> None:
        if kind in INDEX_KINDS:
            self.register_buffer(kind, torch.zeros(shape, dtype=torch.int32))
        elif kind == "base_norms":
            self.register_buffer(kind, torch.zeros(shape, dtype=torch.float32))
        else:
            self.register_parameter(kind, nn.Parameter(torch.empty(shape), requires_grad=False))

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

    layer: its entry of `quantization_config`, per role ("gate", "up", "down") and with `trimmed`.
    projections: role -> submodule name (Mixtral: w1, w3, w2); state-dict names are `{expert}.{name}.{kind}`.
    activation: a name of `ops.reference.ACTIVATIONS` or a callable. scope: "batch", "token" or "off"; an
    attribute that may be changed between calls. padding_mask: bool [T] or None, likewise.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        layer: Mapping[str, Any],
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
        self.trimmed = tuple(layer.get("trimmed", ()))
        self.padding_mask: Tensor | None = None
        for expert in range(num_experts):
            modules = nn.Module()
            for name in self.projections.values():
                modules.add_module(name, D2Projection())
            self.add_module(str(expert), modules)
        for role in self.projections:
            sizes = (hidden_size, intermediate_size) if role == "down" else (intermediate_size, hidden_size)
            for expert, kind, shape in projection_shapes(layer[role], self.trimmed, num_experts, *sizes):
                self.projection(expert, role).add(kind, shape)

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
        output = fused_experts(
            rows,
            top_k_weights,
            top_k_index,
            self._weights("gate", "up"),
            self._weights("down"),
            mask,
            num_experts=self.num_experts,
            gate_rank=gate["rank"],
            base_gate_rank=gate.get("base_rank", 0),
            activation=self.activation,
            scope=self.scope,
            w13_groups=self.groups,
            w13_used=gate["used_columns"],
            w2_groups=self.groups,
            w2_used=down["used_columns"],
            batch_invariant=self.scope == "token",
        )
        return output.reshape(hidden_states.shape)

    def _weights(self, *roles: str) -> Weights:
        """fused_experts' view of gate and up, or of down; nothing per expert is put together yet."""
        first = self.layer[roles[0]]
        ranked = [role for role in roles if self.layer[role]["rank"]]
        tensors: dict[str, Any] = {}
        if ranked:
            tensors["delta_u"] = self._per_expert(first.get("distinct_u", 0) or self.num_experts, ranked, "delta_u", 1)
            if first.get("delta", "factors") == "columns":
                tensors["delta_columns"] = self._per_expert(self.num_experts, ranked, "delta_columns", 0)
            elif first.get("shared_v", False):
                tensors["shared_v"] = self._join(0, ranked, "shared_v", 0)
            else:
                tensors["delta_v"] = self._per_expert(self.num_experts, ranked, "delta_v", 0)
            tensors["u_index"] = self._u_index(ranked[0])
        based = [self.projection(0, role) for role in roles]
        if first["kept_columns"]:
            norms = [projection.base_norms for projection in based]
            tensors["base"] = torch.cat([projection.base for projection in based]).t()
            tensors["base_columns"] = based[0].base_columns
            tensors["base_norms"] = norms[0] if len(norms) == 1 else (norms[0].square() + norms[1].square()).sqrt()
        if low_rank := [role for role in roles if self.layer[role].get("base_rank", 0)]:
            tensors["base_u"] = self._join(0, low_rank, "base_u", 1)
            tensors["base_v"] = self._join(0, low_rank, "base_v", 0)
        return Weights(**tensors)

    def _u_index(self, role: str) -> Tensor | None:
        """Whose U each expert uses, -1 for none; None: its own."""
        if self.layer[role].get("distinct_u", 0):
            return self.projection(0, role).u_index
        if not self.trimmed:
            return None
        return torch.tensor([-1 if expert in self.trimmed else expert for expert in range(self.num_experts)])

    def _join(self, expert: int, roles: list[str], kind: str, axis: int) -> Tensor:
        parts = [getattr(self.projection(expert, role), kind) for role in roles]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=axis)

    def _per_expert(self, length: int, roles: list[str], kind: str, axis: int) -> _PerExpert:
        return _PerExpert(length, lambda expert: self._join(expert, roles, kind, axis))
