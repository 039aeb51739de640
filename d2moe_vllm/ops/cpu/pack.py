"""Weights of a layer in the layout of the CPU backend's kernels (csrc/storage.h, csrc/kernels.h).

Made once after loading, by the library that will read them: layouts differ between processors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from d2moe_vllm.ops.cpu.library import I64, load
from d2moe_vllm.ops.packing import Packing, row_sizes
from d2moe_vllm.ops.weights import UNGATED_BASES, UNGATED_SWIGLU, HalfSpec, LayerSpec, Weights

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""By their numbers in api.cpp."""
SLICE = 64
"""Outputs that the kernels compute at once (csrc/kernels.h)."""


class _Factors(NamedTuple):
    """Matrices of one size as a checkpoint has them: values [D, out, in], or codes [D, out, bytes] with scales [D, out,
    groups]; first: where in a whole row their inputs begin."""

    values: Tensor
    scales: Tensor | None
    inputs: int
    first: int = 0


def pack(w13: Weights, w2: Weights, spec: LayerSpec, *, int8: bool = False) -> tuple[Weights, Weights]:
    """The two halves of a layer in this backend's layout; what is packed is flat, all else the same tensor.

    int8: for rows that are rounded to 8 bits. `fused_experts` has to be given the same, and the same spec. What is
    packed takes the storage of the original where both have one size: packing then needs the room of one tensor more
    for a moment, and none afterwards.
    Raises ValueError for weights that no checkpoint has.
    """
    refuse_unknown(w13, w2, spec)
    hidden = hidden_size(w2, spec)
    return (
        _Half(w13, spec.w13, spec, hidden, down=False, int8=int8).packed(),
        _Half(w2, spec.w2, spec, hidden, down=True, int8=int8).packed(),
    )


def in_bytes(how: Packing, int8: bool) -> bool:
    """Whether rows are rounded to 8 bits before they meet a matrix packed so. Bytes are multiplied as floats, whatever
    was asked for: their products with bytes have no room for a second one beside them."""
    return int8 and how.bits < 8


def refuse_unknown(w13: Weights, w2: Weights, spec: LayerSpec) -> None:
    """Raises ValueError for what a validated checkpoint does not have and the kernels would leave out."""
    if w2.bases is not None:
        raise ValueError("bases are for gate and up alone")
    if any((kind is None) != (w13.bases is None) for kind in (w13.alpha, w13.a)):
        raise ValueError("bases need a and alpha, and the other way round")
    if w13.bases is not None and not spec.gate:
        raise ValueError(UNGATED_BASES)
    if spec.swiglu and not spec.gate:
        raise ValueError(UNGATED_SWIGLU)


def selects(weights: Weights, half: HalfSpec, scope: str) -> bool:
    """Whether some of the base's columns are left out, chosen by what they are multiplied with."""
    columns = weights.base_columns
    return scope != "off" and weights.base is not None and columns is not None and half.used < len(columns)


def by_columns(weights: Weights, half: HalfSpec, scope: str) -> bool:
    """Whether the base has a layout of its own, which lets such columns be skipped."""
    return half.base is None and selects(weights, half, scope)


def hidden_size(w2: Weights, spec: LayerSpec) -> int:
    """Down's outputs; 0 where nothing of down is here."""
    if w2.base is not None:
        return w2.base.shape[0 if spec.w2.base else 1]
    if w2.base_u is not None:
        return w2.base_u.shape[0]
    for deltas in (w2.delta_u, w2.dense):
        if isinstance(deltas, Tensor) and deltas.dim() == 3:
            return deltas.shape[1]
    if not isinstance(w2.dense, Tensor):
        return 0
    own = [expert for expert in range(len(spec.widths)) if expert not in spec.without]
    how = spec.w2.delta
    row = sum(row_sizes(how, (spec.widths[e],), spec.skipped[e])[0] if how else spec.widths[e] for e in own)
    return w2.dense.numel() // row if row else 0


class _Half:
    """One half of a layer, to be packed."""

    def __init__(
        self, weights: Weights, half: HalfSpec, spec: LayerSpec, hidden: int, *, down: bool, int8: bool
    ) -> None:
        self.weights, self.half, self.scope, self.hidden = weights, half, spec.scope, hidden
        self.parts, self.down, self.int8 = len(half.ranks), down, int8
        self.inputs = spec.intermediate_size if self.down else hidden
        self.every = spec.widths
        own = [expert for expert in range(len(spec.widths)) if expert not in spec.without]
        self.widths, self.skipped = [spec.widths[e] for e in own], [spec.skipped[e] for e in own]

    def packed(self) -> Weights:
        weights, half = self.weights, self.half
        found: dict[str, Tensor] = {}
        # Whose outputs or inputs are the channels that an expert keeps: how many rows for each of these, or in all.
        of_down = {"delta_v": half.ranks[0], "dense": self.hidden}
        of_gate_up = {"delta_u": 1, "dense": self.parts}
        cut = half.delta_first if weights.delta_columns is not None else 0
        for name, inputs, first in (
            ("delta_u", half.ranks, cut),
            ("delta_v", (self.inputs,), half.delta_first),
            ("dense", (self.inputs,), half.delta_first),
            ("a", half.ranks, 0),
        ):
            values, scales = getattr(weights, name), getattr(weights, f"{name}_scales")
            if not isinstance(values, Tensor) or not values.numel():
                continue
            parts = self.parts if name == "dense" else 1
            rows = (of_down if self.down else of_gate_up).get(name) if self.widths else None
            if rows is None:
                factors = _cut(values, scales, half.delta, parts, inputs, first)
            else:
                factors = self._flat(values, scales, rows, parts, inputs, first)
            found |= _packed(name, values, scales, half.delta, factors, self.int8)
        if weights.bases is not None and half.delta is None:
            found["bases"] = _pack_mixed(weights.bases, half.ranks)
        elif weights.bases is not None:
            # [m, gate's rows and then up's, ...]
            assert weights.bases_scales is not None
            both = (tensor.split(list(half.ranks), dim=1) for tensor in (weights.bases, weights.bases_scales))
            factors = [_Factors(values, scales, self.hidden) for values, scales in zip(*both, strict=True)]
            # Never for rows of 8 bits: they are opened to be mixed.
            found |= _packed("bases", weights.bases, weights.bases_scales, half.delta, factors, int8=False)
        found |= self._of_layer("shared_v", half.delta, (self.inputs,), half.delta_first)
        found |= self._of_layer("base_u", half.base, half.base_ranks)
        found |= self._of_layer("base_v", half.base, (self.inputs,), half.base_first)
        if weights.base is not None and by_columns(weights, half, self.scope):
            found["base"] = _pack_bases(weights.base, self.parts)
        elif weights.base is not None and half.base is None:
            # The original is input-major.
            outputs = weights.base.t().unflatten(0, (self.parts, -1))
            found |= _packed("base", weights.base, None, None, [_Factors(outputs, None, len(weights.base))], int8=False)
        elif weights.base is not None:
            kept = self.inputs if weights.base_columns is None else len(weights.base_columns)
            found |= self._of_layer("base", half.base, (kept,), half.base_first, self.parts)
        if isinstance(weights.bias, Tensor):
            found["bias"] = self._biases(weights.bias)
        return weights._replace(**found)

    def _biases(self, bias: Tensor) -> Tensor:
        """[E, parts * n], float32, n a multiple of SLICE: part by part, zero behind each expert's own."""
        if self.down or not self.every:
            each = list(bias)
        else:
            each = list(bias.split([self.parts * width for width in self.every]))
        longest = max((len(one) // self.parts for one in each), default=0)
        found = torch.zeros(len(each), self.parts, -(-longest // SLICE) * SLICE)
        for one, to in zip(each, found, strict=True):
            to[:, : len(one) // self.parts] = one.view(self.parts, -1)
        return found.flatten(1)

    def _flat(
        self, values: Tensor, scales: Tensor | None, rows: int, parts: int, inputs: Sequence[int], first: int
    ) -> list[_Factors]:
        """Matrices that lie flat, expert by expert, part by part of all experts."""
        how, each = self.half.delta, []
        for width, skipped in zip(self.widths, self.skipped, strict=True):
            height, own, begin = (rows, (width,), skipped) if self.down else (rows * width, inputs, first)
            sizes = (sum(own), 0) if how is None else row_sizes(how, own, begin)
            of_expert, values = values[: height * sizes[0]].view(1, height, sizes[0]), values[height * sizes[0] :]
            of_scales = None
            if scales is not None:
                of_scales, scales = scales[: height * sizes[1]].view(1, height, sizes[1]), scales[height * sizes[1] :]
            each.append(_cut(of_expert, of_scales, how, parts, own, begin))
        return [factors for part in zip(*each, strict=True) for factors in part]

    def _of_layer(
        self, name: str, how: Packing | None, inputs: Sequence[int], first: int = 0, parts: int = 1
    ) -> dict[str, Tensor]:
        """A matrix that all experts share, [parts * out, inputs side by side]."""
        values, scales = getattr(self.weights, name), getattr(self.weights, f"{name}_scales")
        if values is None:
            return {}
        one = None if scales is None else scales.unsqueeze(0)
        return _packed(name, values, scales, how, _cut(values.unsqueeze(0), one, how, parts, inputs, first), self.int8)


def _cut(
    values: Tensor, scales: Tensor | None, how: Packing | None, parts: int, inputs: Sequence[int], first: int
) -> list[_Factors]:
    """Matrices [D, parts * out, inputs side by side] as factors, all D of one after all D of the other."""
    if parts > 1:
        rows = [None] * parts if scales is None else scales.chunk(parts, dim=1)
        return [_Factors(v, s, inputs[0], first) for v, s in zip(values.chunk(parts, dim=1), rows, strict=True)]
    sizes = [(own, 0) if how is None else row_sizes(how, (own,), first) for own in inputs]
    columns = values.split([size for size, _ in sizes], dim=2)
    groups = [None] * len(sizes) if scales is None else scales.split([size for _, size in sizes], dim=2)
    return [_Factors(v, s, own, first) for v, s, own in zip(columns, groups, inputs, strict=True)]


def _packed(
    name: str, values: Tensor, scales: Tensor | None, how: Packing | None, factors: Sequence[_Factors], int8: bool
) -> dict[str, Tensor]:
    """Factors one after the other: flat, under their name, and their scales; see `pack` for whose storage they take."""
    library = load()
    if how is None or scales is None:
        dtype = DTYPES.index(values.dtype)
        sizes = [len(f.values) * library.d2moe_packed_size(dtype, f.values.shape[1], f.inputs) for f in factors]
        packed = torch.empty(sum(sizes), dtype=values.dtype)
        for one, to in zip(factors, packed.split(sizes), strict=True):
            strides = (I64 * 3)(*one.values.stride())
            library.d2moe_pack_factors(dtype, one.values.data_ptr(), strides, *one.values.shape, to.data_ptr())
        return {name: _in_place(values, packed)}
    shapes = [(how.bits, how.group_size, f.first, f.values.shape[1], f.inputs) for f in factors]
    counts = [len(f.values) for f in factors]
    code_sizes = [n * library.d2moe_codes_size(*shape) for n, shape in zip(counts, shapes, strict=True)]
    scale_sizes = [n * library.d2moe_scales_size(*shape) for n, shape in zip(counts, shapes, strict=True)]
    codes, of_codes = (
        torch.empty(sum(code_sizes), dtype=values.dtype),
        torch.empty(sum(scale_sizes), dtype=scales.dtype),
    )
    places = zip(factors, codes.split(code_sizes), of_codes.split(scale_sizes), strict=True)
    for one, to, to_scales in places:
        assert one.scales is not None
        pointers = []
        for tensor in (one.values, one.scales):
            # A last dimension that is cut keeps its stride, which is 1.
            pointers += [tensor.data_ptr(), (I64 * 2)(*tensor.stride()[:2])]
        shape = (*one.values.shape[:2], one.inputs)
        how_it_lies = (how.bits, how.group_size, one.first, in_bytes(how, int8))
        library.d2moe_pack_codes(*how_it_lies, *pointers, *shape, to.data_ptr(), to_scales.data_ptr())
    return {name: _in_place(values, codes), f"{name}_scales": _in_place(scales, of_codes)}


def _pack_mixed(w: Tensor, ranks: Sequence[int]) -> Tensor:
    """w [m, k, in], of which V's are mixed: flat, gate's rows before up's."""
    library, dtype = load(), DTYPES.index(w.dtype)
    parts = w.split(list(ranks), dim=1)
    sizes = [len(p) * library.d2moe_packed_size(dtype, p.shape[1], p.shape[2]) for p in parts]
    packed = torch.empty(sum(sizes), dtype=w.dtype)
    for part, to in zip(parts, packed.split(sizes), strict=True):
        library.d2moe_pack_mixed(dtype, part.data_ptr(), (I64 * 3)(*part.stride()), *part.shape, to.data_ptr())
    return _in_place(w, packed)


def _pack_bases(w: Tensor, parts: int) -> Tensor:
    """w [kept, parts * out]: flat, packed part by part."""
    library, dtype = load(), DTYPES.index(w.dtype)
    w = w.contiguous()
    kept, out = w.shape[0], w.shape[1] // parts
    packed = torch.empty(parts * library.d2moe_packed_base_size(dtype, out, kept), dtype=w.dtype)
    library.d2moe_pack_bases(dtype, w.data_ptr(), w.stride(0), parts, out, kept, packed.data_ptr())
    return _in_place(w, packed)


def _in_place(w: Tensor, packed: Tensor) -> Tensor:
    kept = w.reshape(-1).copy_(packed) if w.is_contiguous() and w.numel() == packed.numel() else packed
    load().d2moe_huge_pages(kept.data_ptr(), kept.nbytes)
    return kept
