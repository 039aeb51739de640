"""The routed experts of one layer as a torch module whose state dict has a checkpoint's own names.

Used by modeling_d2moe.py, into which it is copied for checkpoints, and layer by layer by offline/.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from d2moe_vllm.ops.reference import HalfSpec, LayerSpec, Weights, fused_experts

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
    own = [expert for expert in range(num_experts) if expert not in trimmed]
    if projection.get("delta") == "dense":
        for expert in own:
            yield expert, "dense", (out_features, in_features)
    if not (rank := projection["rank"]):
        return
    if bases := projection.get("bases", 0):
        yield 0, "bases", (bases, rank, in_features)
        for expert in own:
            yield expert, "a", (out_features, rank)
            yield expert, "alpha", (bases,)
        return
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

    layer: its entry of `quantization_config`, per role ("gate", "up", "down") and with `trimmed`.
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
        self.static_shapes = self.in_place = False
        self._places_on: dict[torch.device, Tensor] = {}
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
                function=self.layer["gate"].get("function") or "",
                batch_invariant=self.scope == "token",
                static_shapes=self.static_shapes,
            ),
        )
        return output.reshape(hidden_states.shape)

    def _half(self, *roles: str) -> HalfSpec:
        own = [self.layer[role] for role in roles]
        ranks, base_ranks = (tuple(entry.get(kind, 0) for entry in own) for kind in ("rank", "base_rank"))
        return HalfSpec(ranks, base_ranks, self.groups, own[0]["used_columns"])

    def _weights(self, device: torch.device, *roles: str) -> Weights:
        """fused_experts' view of gate and up, or of down."""
        first = self.layer[roles[0]]
        tensors: dict[str, Any] = {}
        if ranked := [role for role in roles if self.layer[role]["rank"]]:
            tensors |= self._deltas(device, ranked)
        if first.get("delta") == "dense":
            tensors["dense"] = self._per_expert(range(self.num_experts), list(roles), "dense", 1)
        based = [self.projection(0, role) for role in roles]
        if first["kept_columns"]:
            norms = [projection("base_norms") for projection in based]
            tensors["base"] = self._join(0, list(roles), "base", 0).t()
            tensors["base_columns"] = based[0]("base_columns")
            tensors["base_norms"] = norms[0] if len(norms) == 1 else (norms[0].square() + norms[1].square()).sqrt()
        if low_rank := [role for role in roles if self.layer[role].get("base_rank", 0)]:
            tensors["base_u"] = self._join(0, low_rank, "base_u", 1)
            tensors["base_v"] = self._join(0, low_rank, "base_v", 0)
        return Weights(**tensors)

    def _deltas(self, device: torch.device, roles: list[str]) -> dict[str, Any]:
        """Weights' delta fields; without static shapes an expert's matrices are put together when it is visited."""
        first = self.layer[roles[0]]
        own = [expert for expert in range(self.num_experts) if expert not in self.trimmed]
        if first.get("bases", 0):
            return {
                "bases": self._join(0, roles, "bases", 1),
                "alpha": self._per_expert(own, roles, "alpha", 0),
                "a": self._per_expert(own, roles, "a", 1),
            }
        places = self._places(device, own) if self.trimmed else None
        distinct = first.get("distinct_u", 0)
        fields: dict[str, Any] = {
            "delta_u": self._per_expert(range(distinct) if distinct else own, roles, "delta_u", 1),
            "u_index": self.projection(0, roles[0])("u_index") if distinct else places,
        }
        if first.get("delta", "factors") == "columns":
            return fields | {"delta_columns": self._per_expert(own, roles, "delta_columns", 0), "v_index": places}
        if first.get("shared_v", False):
            return fields | {"shared_v": self._join(0, roles, "shared_v", 0)}
        return fields | {"delta_v": self._per_expert(own, roles, "delta_v", 0), "v_index": places}

    def _places(self, device: torch.device, own: list[int]) -> Tensor:
        """Of each expert among those that have deltas, -1 for none; kept on the device only where it is used there."""
        where = device if self.static_shapes else torch.device("cpu")
        if where not in self._places_on:
            index = [own.index(expert) if expert in own else -1 for expert in range(self.num_experts)]
            self._places_on[where] = torch.tensor(index, device=where)
        return self._places_on[where]

    def _per_expert(self, experts: Sequence[int], roles: list[str], kind: str, axis: int) -> Tensor | _PerExpert:
        matrices = _PerExpert(len(experts), lambda place: self._join(experts[place], roles, kind, axis))
        return torch.stack(list(matrices)) if self.static_shapes and experts else matrices

    def _join(self, expert: int, roles: list[str], kind: str, axis: int) -> Tensor:
        parts = [self.projection(expert, role)(kind) for role in roles]
        if len(parts) == 1:
            return parts[0]
        if self.in_place and kind not in INDEX_KINDS and not torch.compiler.is_compiling():
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
