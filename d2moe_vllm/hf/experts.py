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
    SCALES,
    STORAGES,
    Dtype,
    Kind,
    Role,
    Shape,
    Stored,
    halves_of,
    layer_of,
    owners,
    roles_of,
    stored_tensors,
    width,
)
from d2moe_vllm.ops.packing import Packing, from_bits, to_bits, unpacked
from d2moe_vllm.ops.reference import fused_experts
from d2moe_vllm.ops.weights import HalfSpec, LayerSpec, Weights

_INTEGERS = {"I32": torch.int32, "U8": torch.uint8}


class D2Projection(nn.Module):
    """One expert's tensors for one projection, by the names they have in a checkpoint.

    Which these are, the table of kinds says. Contents are undefined until loaded.
    """

    def add(self, one: Stored, projection: Any) -> None:
        shape, storage = one.spec.shape, one.kind.storage(projection)
        if one.spec.dtype in ("I32", "U8"):
            # Not to be taken for weights, and left alone by model.to(dtype).
            self.register_buffer(one.name, torch.zeros(shape, dtype=_INTEGERS[one.spec.dtype]))
        elif one.is_scales:
            self.register_buffer(one.name, torch.zeros(shape, dtype=torch.bfloat16))
        elif one.kind.content == "norms":
            self.register_buffer(one.name, torch.zeros(shape, dtype=torch.float32))
        else:
            dtype = None if storage is None else getattr(torch, storage.type)
            self.register_parameter(one.name, nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False))

    def forward(self, kind: str, how: Packing | None = None, inputs: int = 0) -> Tensor:
        """The tensor of that kind; a packed one as what it stands for, in float32: how, and how many inputs a row has.

        Asked for by a call, since accelerate brings offloaded weights when a module is called: read as an attribute
        they would be on the meta device, and torch computes with those without a word."""
        found = getattr(self, kind)
        return found if how is None else unpacked(found, getattr(self, kind + SCALES), how, inputs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> D2Projection:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None and moved.dtype != buffer.dtype:
                # model.to(float16) must round neither what selections are made by nor scales.
                self._buffers[name] = buffer.to(moved.device)
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

    layer: its entry of `quantization_config`, per role ("gate", "up", "down", or the last two) and with `trimmed`.
    dtype: the checkpoint's. projections: role -> submodule name (Mixtral: w1, w3, w2), of each role that experts have;
    state-dict names are `{expert}.{name}.{kind}`. activation: a name of `ops.reference.ACTIVATIONS` or a callable.
    swiglu: of `quantization_config`. scope: "batch", "token" or "off".

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
        swiglu: Mapping[str, float] | None = None,
        scope: str = "off",
    ) -> None:
        super().__init__()
        self.num_experts, self.intermediate_size = num_experts, intermediate_size
        self.layer = layer_of(layer)
        self.groups, self.projections = groups, dict(projections)
        self.gate_up = halves_of(self.projections)["w13"]
        self.activation, self.scope = activation, scope
        self.swiglu = () if swiglu is None else tuple(swiglu[name] for name in ("limit", "alpha", "beta"))
        self.trimmed = self.layer.trimmed
        self.padding_mask: Tensor | None = None
        self.static_shapes = self.in_place = False
        self._places_on: dict[torch.device, Tensor] = {}
        self._channels_on: dict[torch.device, Tensor] = {}
        for expert in range(num_experts):
            modules = nn.Module()
            for name in self.projections.values():
                modules.add_module(name, D2Projection())
            self.add_module(str(expert), modules)
        self.shape = Shape(num_experts, hidden_size, intermediate_size, dtype)
        for role in roles_of(self.projections):
            for one in stored_tensors(self.shape, role, self.layer):
                self.projection(one.expert, role).add(one, getattr(self.layer, role))

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

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor | None = None, top_k_weights: Tensor | None = None
    ) -> Tensor:
        """hidden_states [..., H], top_k_index int [T, K], top_k_weights [T, K]: [..., H]. METHODS 1.6.

        Without the last two, hidden_states [E T, H] is all tokens once for each expert, times the router's weight, 0
        where a token does not go (Llama 4): [E T, H]."""
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        if top_k_index is None or top_k_weights is None:
            return self._scaled(rows).reshape(hidden_states.shape)
        # Only a selection shared by the batch can be influenced by padding rows.
        mask = self.padding_mask if self.scope == "batch" else None
        return self._run(rows, top_k_index, top_k_weights, mask).reshape(hidden_states.shape)

    def _scaled(self, rows: Tensor) -> Tensor:
        """rows [E T, H], times the router's weights: what each expert gives for those that are not 0, else 0."""
        tokens, going = len(rows) // self.num_experts, rows.ne(0).any(dim=1)
        number = torch.arange(len(rows), device=rows.device)
        mask = self.padding_mask if self.scope == "batch" else None
        if self.static_shapes:
            index = torch.where(going, number // tokens, -1)
            mask = None if mask is None else mask.repeat(self.num_experts)
            return self._run(rows, index[:, None], rows.new_ones(len(rows), 1), mask)
        own = number[going]
        mask = None if mask is None else mask[own % tokens]
        found = self._run(rows[own], (own // tokens)[:, None], rows.new_ones(len(own), 1), mask)
        return torch.zeros_like(rows).index_copy(0, own, found)

    def _run(self, rows: Tensor, top_k_index: Tensor, top_k_weights: Tensor, mask: Tensor | None) -> Tensor:
        if mask is not None and mask.shape[0] != rows.shape[0]:
            raise ValueError(f"padding mask for {mask.shape[0]} rows, but {rows.shape[0]} tokens reach the experts")
        every, channels = self.intermediate_size, self.layer.channels
        widths = () if channels is None else tuple(width(self.layer, e, every) for e in range(self.num_experts))
        return fused_experts(
            rows,
            top_k_weights,
            top_k_index,
            self._weights(rows.device, *self.gate_up),
            self._weights(rows.device, "down"),
            mask,
            LayerSpec(
                num_experts=self.num_experts,
                intermediate_size=width(self.layer, None, self.intermediate_size),
                w13=self._half(*self.gate_up),
                w2=self._half("down"),
                activation=self.activation,
                scope=self.scope,
                function=self.layer.up.function or "",
                batch_invariant=self.scope == "token",
                static_shapes=self.static_shapes,
                widths=widths,
                skipped=(0,) * len(widths),
                without=self.trimmed if widths else (),
                swiglu=self.swiglu,
            ),
        )

    def _half(self, *roles: Role) -> HalfSpec:
        own = [getattr(self.layer, role) for role in roles]
        ranks, base_ranks = tuple(entry.rank for entry in own), tuple(entry.base_rank for entry in own)
        return HalfSpec(ranks, base_ranks, self.groups, own[0].used_columns)

    def _weights(self, device: torch.device, *roles: Role) -> Weights:
        """fused_experts' view of gate and up, or of down; without static shapes an expert's matrices are put together
        when it is visited."""
        tensors: dict[str, Any] = {}
        for kind in KINDS:
            if kind.content == "mask":
                continue
            if having := [role for role in roles if kind.present(self.layer, role)]:
                tensors[kind.name] = self._at_run_time(kind, having)
        if self.trimmed and (tensors.keys() & {"delta_u", "dense"}):
            places = self._places(device, [e for e in range(self.num_experts) if e not in self.trimmed])
            tensors = {"u_index": places, **tensors}
            if tensors.keys() & {"delta_v", "delta_columns"}:
                tensors["v_index"] = places
        if roles == ("down",) and self.layer.channels is not None and self.layer.channels.base is not None:
            tensors["channels"] = self._channels(device)
        return Weights(**tensors)

    def _channels(self, device: torch.device) -> Tensor:
        """Which of the base's channels each expert has, uint8 [E, ceil(n / 8)]."""
        if device not in self._channels_on:
            base = from_bits(self.projection(0, "down")("base_channels"), self.intermediate_size)
            own = [self.projection(expert, "down")("channels") for expert in range(self.num_experts)]
            self._channels_on[device] = to_bits(from_bits(torch.stack(own), self.intermediate_size)[:, base])
        return self._channels_on[device]

    def _at_run_time(self, kind: Kind, roles: list[Role]) -> Any:
        """One kind's tensors of some projections side by side, or the one that these have in common."""
        if kind.axis is None:
            found = [self._whole(0, role, kind) for role in roles]
            joint = kind.content == "norms" and len(found) > 1
            return (found[0].square() + found[1].square()).sqrt() if joint else found[0]
        if kind.owner == "layer":
            joined = self._join(0, roles, kind)
            return joined.mT if kind.input_major else joined
        experts = owners(kind, roles[0], self.layer, self.num_experts)
        matrices = _PerExpert(len(experts), lambda place: self._join(experts[place], roles, kind))
        alike = self.static_shapes and experts and self.layer.channels is None
        return torch.stack(list(matrices)) if alike else matrices

    def _places(self, device: torch.device, own: list[int]) -> Tensor:
        """Of each expert among those that have deltas, -1 for none; kept on the device only where it is used there."""
        where = device if self.static_shapes else torch.device("cpu")
        if where not in self._places_on:
            index = [own.index(expert) if expert in own else -1 for expert in range(self.num_experts)]
            self._places_on[where] = torch.tensor(index, device=where)
        return self._places_on[where]

    def _whole(self, expert: int, role: Role, kind: Kind) -> Tensor:
        """A projection's tensor of a kind; of a packed one what it stands for."""
        if (storage := kind.packed(getattr(self.layer, role))) is None:
            return self.projection(expert, role)(kind.name)
        stored, owner = STORAGES[storage.type], None if kind.owner == "layer" else expert
        inputs = self.shape.size_of(kind.sizes[-1], role, self.layer, owner)
        how = Packing(stored.bits, stored.zero, storage.group_size)
        return self.projection(expert, role)(kind.name, how, inputs)

    def _join(self, expert: int, roles: list[Role], kind: Kind) -> Tensor:
        parts, axis = [self._whole(expert, role, kind) for role in roles], kind.axis or 0
        if len(parts) == 1:
            return parts[0]
        stored = not kind.is_index and kind.packed(getattr(self.layer, roles[0])) is None
        if self.in_place and stored and not torch.compiler.is_compiling():
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
