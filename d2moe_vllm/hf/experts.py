"""The routed experts of one layer as a torch module whose state dict has a checkpoint's own names.

Used by modeling_d2moe.py, into which it is copied for checkpoints, and layer by layer by offline/.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from d2moe_vllm.format.kinds import (
    KINDS,
    ROLES,
    Dtype,
    Kind,
    Role,
    Shape,
    Stored,
    owners,
    projection_of,
    stored_tensors,
)
from d2moe_vllm.ops.reference import HalfSpec, LayerSpec, Weights, fused_experts


class D2Projection(nn.Module):
    """One expert's tensors for one projection, by the names they have in a checkpoint.

    Which these are, the table of kinds says. Contents are undefined until loaded.
    """

    def add(self, one: Stored, projection: Any) -> None:
        shape, storage = one.spec.shape, one.kind.storage(projection)
        if one.kind.is_index:
            self.register_buffer(one.name, torch.zeros(shape, dtype=torch.int32))
        elif one.kind.content == "norms":
            self.register_buffer(one.name, torch.zeros(shape, dtype=torch.float32))
        else:
            dtype = None if storage is None else getattr(torch, storage.type)
            self.register_parameter(one.name, nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False))

    def forward(self, kind: str) -> Tensor:
        """The tensor of that kind. Asked for by a call, since accelerate brings offloaded weights when a module is
        called: read as an attribute they would be on the meta device, and torch computes with those without a word."""
        return getattr(self, kind)

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

    layer: its entry of `quantization_config`, per role ("gate", "up", "down") and with `trimmed`. dtype: the
    checkpoint's.
    projections: role -> submodule name (Mixtral: w1, w3, w2); state-dict names are `{expert}.{name}.{kind}`.
    activation: a name of `ops.reference.ACTIVATIONS` or a callable. scope: "batch", "token" or "off".

    Attributes that may be changed between calls: scope; padding_mask, bool [T] or None; static_shapes, as in
    fused_experts, at the price of a copy of all deltas in every call; in_place: gate's and up's weights are joined in
    the first call and stay so, without which every call joins those it needs.

    Some modeling code visits a ModuleList of experts itself: `len(experts)` and `experts[e](rows)` are for that.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        layer: Mapping[str, Any],
        *,
        groups: int,
        projections: Mapping[Role, str],
        dtype: Dtype,
        activation: str | Callable[[Tensor], Tensor] = "silu",
        scope: str = "off",
    ) -> None:
        super().__init__()
        self.num_experts, self.intermediate_size = num_experts, intermediate_size
        self.layer = {role: projection_of(layer[role]) for role in ROLES}
        self.groups, self.projections = groups, dict(projections)
        self.activation, self.scope = activation, scope
        self.trimmed = tuple(layer.get("trimmed", ()))
        self.padding_mask: Tensor | None = None
        self.static_shapes = self.in_place = False
        self._places_on: dict[torch.device, Tensor] = {}
        for expert in range(num_experts):
            modules = nn.Module()
            for name in self.projections.values():
                modules.add_module(name, D2Projection())
            self.add_module(str(expert), modules)
        shape = Shape(num_experts, hidden_size, intermediate_size, dtype)
        for role, entry in self.layer.items():
            for one in stored_tensors(shape, role, entry, self.trimmed):
                self.projection(one.expert, role).add(one, entry)

    def projection(self, expert: int, role: Role) -> D2Projection:
        return getattr(getattr(self, str(expert)), self.projections[role])

    def __len__(self) -> int:
        return self.num_experts

    def __getitem__(self, expert: int) -> Callable[[Tensor], Tensor]:
        """One expert alone: a function of rows [n, H] that returns [n, H]. IndexError, as of a list."""
        number = range(self.num_experts)[expert]

        def run(rows: Tensor) -> Tensor:
            if self.scope != "off":
                raise ValueError(
                    f"d2moe_scope {self.scope!r} needs all experts of a token at once, and this model's code visits "
                    "them one by one; use d2moe_scope 'off', or transformers' own code of this model"
                )
            shape = (rows.shape[0], 1)
            return self(rows, torch.full(shape, number, device=rows.device), rows.new_ones(shape))

        return run

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [..., H], top_k_index int [T, K], top_k_weights [T, K]: [..., H]. METHODS 1.6."""
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        # Only a selection shared by the batch can be influenced by padding rows.
        mask = self.padding_mask if self.scope == "batch" else None
        if mask is not None and mask.shape[0] != rows.shape[0]:
            raise ValueError(f"padding mask for {mask.shape[0]} rows, but {rows.shape[0]} tokens reach the experts")
        output = fused_experts(
            rows,
            top_k_weights,
            top_k_index,
            self._weights(rows.device, "gate", "up"),
            self._weights(rows.device, "down"),
            mask,
            LayerSpec(
                num_experts=self.num_experts,
                intermediate_size=self.intermediate_size,
                w13=self._half("gate", "up"),
                w2=self._half("down"),
                activation=self.activation,
                scope=self.scope,
                function=self.layer["gate"].function or "",
                batch_invariant=self.scope == "token",
                static_shapes=self.static_shapes,
            ),
        )
        return output.reshape(hidden_states.shape)

    def _half(self, *roles: Role) -> HalfSpec:
        own = [self.layer[role] for role in roles]
        ranks, base_ranks = tuple(entry.rank for entry in own), tuple(entry.base_rank for entry in own)
        return HalfSpec(ranks, base_ranks, self.groups, own[0].used_columns)

    def _weights(self, device: torch.device, *roles: Role) -> Weights:
        """fused_experts' view of gate and up, or of down; without static shapes an expert's matrices are put together
        when it is visited."""
        tensors: dict[str, Any] = {}
        for kind in KINDS:
            if having := [role for role in roles if kind.present(self.layer[role])]:
                tensors[kind.name] = self._at_run_time(kind, having)
        if self.trimmed and "delta_u" in tensors:
            places = self._places(device, [e for e in range(self.num_experts) if e not in self.trimmed])
            tensors = {"u_index": places, **tensors}
            if "shared_v" not in tensors:
                tensors["v_index"] = places
        return Weights(**tensors)

    def _at_run_time(self, kind: Kind, roles: list[Role]) -> Any:
        """One kind's tensors of some projections side by side, or the one that these have in common."""
        if kind.axis is None:
            found = [self.projection(0, role)(kind.name) for role in roles]
            joint = kind.content == "norms" and len(found) > 1
            return (found[0].square() + found[1].square()).sqrt() if joint else found[0]
        if kind.owner == "layer":
            joined = self._join(0, roles, kind)
            return joined.mT if kind.input_major else joined
        experts = owners(kind, self.layer[roles[0]], self.num_experts, self.trimmed)
        matrices = _PerExpert(len(experts), lambda place: self._join(experts[place], roles, kind))
        return torch.stack(list(matrices)) if self.static_shapes and experts else matrices

    def _places(self, device: torch.device, own: list[int]) -> Tensor:
        """Of each expert among those that have deltas, -1 for none; kept on the device only where it is used there."""
        where = device if self.static_shapes else torch.device("cpu")
        if where not in self._places_on:
            index = [own.index(expert) if expert in own else -1 for expert in range(self.num_experts)]
            self._places_on[where] = torch.tensor(index, device=where)
        return self._places_on[where]

    def _join(self, expert: int, roles: list[Role], kind: Kind) -> Tensor:
        parts, axis = [self.projection(expert, role)(kind.name) for role in roles], kind.axis or 0
        if len(parts) == 1:
            return parts[0]
        if self.in_place and not kind.is_index and not torch.compiler.is_compiling():
            return _side_by_side(parts, axis)
        return torch.cat(parts, dim=axis)


def _side_by_side(parts: list[Tensor], axis: int) -> Tensor:
    """Tensors joined along an axis; they become views of the result, so that joining them again costs nothing."""
    first, shape = parts[0], list(parts[0].shape)
    shape[axis] = sum(part.shape[axis] for part in parts)
    stride = tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
    place = first.storage_offset()
    for part in parts:
        apart = part.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
        if apart or part.stride() != stride or part.storage_offset() != place:
            break
        place += part.shape[axis] * stride[axis]
    else:
        return first.as_strided(shape, stride, first.storage_offset())
    with torch.inference_mode(False), torch.no_grad():
        joined = torch.cat(parts, dim=axis)
        for part, view in zip(parts, joined.split([part.shape[axis] for part in parts], dim=axis), strict=True):
            part.data = view
    return joined
