"""Weights of few bits and of unequal widths in the layout of the Triton kernels (stored.py); made once after loading.

A matrix of few bits, [out, in], is cut into units of UNIT inputs, which begin where the inputs of whole rows do: a
tensor-parallel rank's first unit may have inputs of its neighbour, whose codes are 0 here. A unit has as many int32
words as a code has bits: [units, bits, outputs], outputs side by side and padded to a multiple of OUTPUTS, so that a
tile is read in whole lines whatever it has of inputs. Words are strings of bits, the first input's lowest; of 3 bits
the first two words have the lower two bits of each code, the third the highest. Scales: bfloat16 [groups, outputs].

Where experts keep some channels only, an expert's are padded to whole units of down's inputs (`Ragged`), in the rows of
gate and up as in the inputs of down: what is added is zero, and every row of what lies between them begins aligned.

Imports torch and not triton.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from d2moe_vllm.ops.cpu.pack import hidden_size
from d2moe_vllm.ops.packing import Packing, from_bits, row_sizes, unpack
from d2moe_vllm.ops.packing import pack as pack_codes
from d2moe_vllm.ops.weights import HalfSpec, LayerSpec, Weights

UNIT = 32
"""Inputs whose codes fill whole words, whatever their bits; every group size is a multiple of it."""
OUTPUTS = 16
"""Outputs are padded to a multiple of it: rows of words and of scales then begin at multiples of 32 bytes."""
AT_ONCE = 1 << 22
"""Codes that are opened at once while packing."""


def round_up(value: int, to: int) -> int:
    return -(-value // to) * to


def units(inputs: int, first: int = 0) -> int:
    """Of a row whose inputs begin at `first` of a whole row."""
    return -(-(first % UNIT + inputs) // UNIT) if inputs else 0


class Ragged(NamedTuple):
    """Where experts' channels are, int32 [E] each, on the kernels' device.

    width: channels as they are padded, a multiple of UNIT; 0 for an expert that keeps none. shift: how many of these
    come before the first that is the expert's. start: sum of the widths of earlier experts that have deltas, -1 for
    an expert without. first: sum of the widths of all earlier experts. group_shift: units of down's first group that
    another rank has. group_start: sum of the groups of earlier experts that have deltas. place: its number among
    these, -1 for none.
    """

    width: Tensor
    shift: Tensor
    start: Tensor
    first: Tensor
    group_shift: Tensor
    group_start: Tensor
    place: Tensor


def shifts(spec: LayerSpec) -> list[int]:
    """Of experts that keep some channels only: how many inputs of down's first unit are another rank's."""
    return [first % UNIT if spec.w2.delta else 0 for first in spec.skipped]


def padded_widths(spec: LayerSpec) -> list[int]:
    """And their channels as they are padded."""
    pairs = zip(spec.widths, shifts(spec), strict=True)
    return [round_up(shift + width, UNIT) if width else 0 for width, shift in pairs]


@lru_cache(maxsize=1024)
def ragged(
    widths: tuple[int, ...],
    skipped: tuple[int, ...],
    without: tuple[int, ...],
    how: Packing | None,
    device: torch.device,
) -> Ragged:
    """What kernels are told of LayerSpec.widths, .skipped and .without where down's deltas are packed as `how` says.

    Copied to the device when a layer is first called, which is before any graph is captured.
    """
    rows: list[tuple[int, ...]] = []
    start = first = group_start = place = 0
    for expert, (width, before) in enumerate(zip(widths, skipped, strict=True)):
        shift = before % UNIT if how else 0
        padded = round_up(shift + width, UNIT) if width else 0
        own = expert not in without
        group_shift = before % how.group_size // UNIT if how else 0
        known = (start, place) if own else (-1, -1)
        rows.append((padded, shift, known[0], first, group_shift, group_start, known[1]))
        first += padded
        if own:
            place += 1
            start += padded
            group_start += how.row_groups(width, before) if how else 0
    return Ragged(*torch.tensor(rows, dtype=torch.int32, device="cpu").t().contiguous().to(device))


def pack(w13: Weights, w2: Weights, spec: LayerSpec) -> tuple[Weights, Weights]:
    """The two halves of a layer in this backend's layout: what is packed or flat is flat, all else the same tensor.

    Packed matrices become int32. They take the storage of the original where both have one size: packing then needs
    room for one matrix more for a moment. channels: int32, see `_places`. bias of gate and up, where experts keep some
    channels only: as the channels are padded. `fused_experts` has to be given the same spec.
    """
    hidden = hidden_size(w2, spec)
    return (
        _Half(w13, spec.w13, spec, hidden, down=False).packed(),
        _Half(w2, spec.w2, spec, hidden, down=True).packed(),
    )


class _Matrix(NamedTuple):
    """One matrix as a checkpoint has it, [rows, inputs]; before, outputs: with so many rows of zeros before, and so
    many rows in all; first: where in a whole row its inputs begin; width: inputs in all, where it is not packed."""

    rows: int
    inputs: int
    first: int = 0
    before: int = 0
    outputs: int = 0
    width: int = 0


class _Half:
    """One half of a layer, to be packed."""

    def __init__(self, weights: Weights, half: HalfSpec, spec: LayerSpec, hidden: int, *, down: bool) -> None:
        self.weights, self.half, self.spec, self.hidden, self.down = weights, half, spec, hidden, down
        self.inputs = spec.intermediate_size if self.down else hidden
        self.outputs = hidden if self.down else spec.intermediate_size
        own = [expert for expert in range(len(spec.widths)) if expert not in spec.without]
        padded, shift = padded_widths(spec), shifts(spec)
        self.own = [(spec.widths[e], spec.skipped[e], shift[e], padded[e]) for e in own]

    def packed(self) -> Weights:
        weights, half, how = self.weights, self.half, self.half.delta
        found: dict[str, Tensor] = {}
        cut = half.delta_first if weights.delta_columns is not None else 0
        side = [(self.outputs, inputs, cut) for inputs in half.ranks]
        self._of_experts("delta_u", [side], found, tall=not self.down)
        self._of_experts("a", [side], found)
        self._of_experts("delta_v", [[(sum(half.ranks), self.inputs, half.delta_first)]], found, wide=self.down)
        parts = [[(self.outputs, self.inputs, half.delta_first)]] * len(half.ranks)
        self._of_experts("dense", parts, found, tall=not self.down, wide=self.down)
        self._of_layer("shared_v", how, [(sum(half.ranks), self.inputs, half.delta_first)], found)
        count = 0 if weights.bases is None else len(weights.bases)
        self._of_layer("bases", how, [(sum(half.ranks), self.inputs, 0)], found, count)
        kept = self.inputs if weights.base_columns is None else len(weights.base_columns)
        self._of_layer("base", half.base, [(self.outputs * len(half.ranks), kept, half.base_first)], found)
        self._of_layer("base_u", half.base, [(self.outputs, inputs, 0) for inputs in half.base_ranks], found)
        self._of_layer("base_v", half.base, [(sum(half.base_ranks), self.inputs, half.base_first)], found)
        if self.spec.widths and not self.down and isinstance(weights.bias, Tensor):
            found["bias"] = self._bias(weights.bias)
        if self.spec.widths and weights.channels is not None and self.spec.intermediate_size:
            found["channels"] = _places(weights.channels, self.spec)
        return weights._replace(**found)

    def _of_experts(
        self,
        name: str,
        parts: Sequence[Sequence[tuple[int, int, int]]],
        found: dict[str, Tensor],
        *,
        tall: bool = False,
        wide: bool = False,
    ) -> None:
        """parts: one below the other, in each of them (rows, inputs, first) side by side. tall: rows are channels that
        an expert keeps; wide: inputs are."""
        values, scales = getattr(self.weights, name), getattr(self.weights, f"{name}_scales")
        flat = bool(self.spec.widths) and (tall or wide)
        if not isinstance(values, Tensor) or not values.numel() or (self.half.delta is None and not flat):
            return
        every = self.own if flat else [(0, 0, 0, 0)] * len(values)
        matrices = []
        for width, skipped, shift, padded in every:
            tops = [
                [
                    _Matrix(
                        width if flat and tall else rows,
                        width if flat and wide else inputs,
                        skipped if flat and wide else first,
                        shift if flat and tall else 0,
                        padded if flat and tall else rows,
                        padded if flat and wide else inputs,
                    )
                    for rows, inputs, first in side
                ]
                for side in parts
            ]
            matrices.append(tops)
        found |= _laid(name, values, scales, self.half.delta, matrices)

    def _of_layer(
        self,
        name: str,
        how: Packing | None,
        side: Sequence[tuple[int, int, int]],
        found: dict[str, Tensor],
        count: int = 1,
    ) -> None:
        """`count` matrices that all experts share."""
        values, scales = getattr(self.weights, name), getattr(self.weights, f"{name}_scales")
        if how is not None and values is not None:
            found |= _laid(name, values, scales, how, [[[_Matrix(*one, outputs=one[0]) for one in side]]] * count)

    def _bias(self, bias: Tensor) -> Tensor:
        """[2 padded width] of every expert; [padded width] of those without a gate."""
        spec, parts = self.spec, len(self.half.ranks)
        each = bias.split([parts * width for width in spec.widths])
        sizes = zip(each, shifts(spec), padded_widths(spec), spec.widths, strict=True)
        padded = [F.pad(one.view(parts, -1), (shift, width - shift - own)) for one, shift, width, own in sizes if own]
        return torch.cat([one.flatten() for one in padded]) if padded else bias


def _laid(
    name: str,
    values: Tensor,
    scales: Tensor | None,
    how: Packing | None,
    matrices: Sequence[Sequence[Sequence[_Matrix]]],
) -> dict[str, Tensor]:
    """Matrices of every owner, [parts one below the other][side by side], one after the other.

    In the storage they have, where no one's size changes.
    """
    flat, own_scales = values.reshape(-1), None if scales is None else scales.reshape(-1)
    made: list[Tensor] = []
    made_scales: list[Tensor] = []
    pairs = [(below, _row_sizes(how, below)) for of_owner in matrices for below in of_owner]
    sizes = [(sum(map(_size(how), below)), sum(map(_scales(how), below))) for below, _ in pairs]
    before = [(below[0].rows * row, below[0].rows * groups) for below, (row, groups) in pairs]
    kept = [
        tensor is not None and tensor.is_contiguous() and [s[i] for s in sizes] == [b[i] for b in before]
        for i, tensor in enumerate((values, scales))
    ]
    at = at_scales = 0
    for (below, (row, groups)), (size, size_scales) in zip(pairs, before, strict=True):
        rows = below[0].rows
        block = flat[at : at + size].view(rows, row)
        block_scales = (
            None if own_scales is None else own_scales[at_scales : at_scales + size_scales].view(rows, groups)
        )
        new, new_scales = _one(block, block_scales, how, below)
        if kept[0]:
            block.view(-1).copy_(new)
        else:
            made.append(new)
        if own_scales is not None and new_scales is not None:
            if kept[1]:
                own_scales[at_scales : at_scales + size_scales].copy_(new_scales)
            else:
                made_scales.append(new_scales)
        at, at_scales = at + size, at_scales + size_scales
    result = {name: flat if kept[0] else torch.cat(made)}
    if how is not None:
        result[name] = result[name].view(torch.int32)
        assert own_scales is not None
        result[f"{name}_scales"] = own_scales if kept[1] else torch.cat(made_scales)
    return result


def _row_sizes(how: Packing | None, side: Sequence[_Matrix]) -> tuple[int, int]:
    """Elements, or bytes, and scales of a row of matrices side by side, as a checkpoint has them."""
    inputs = [one.inputs for one in side]
    return (sum(inputs), 0) if how is None else row_sizes(how, inputs, side[0].first)


def _size(how: Packing | None) -> Callable[[_Matrix], int]:
    """Elements, or bytes, of a matrix as it is laid."""

    def size(one: _Matrix) -> int:
        if how is None:
            return one.outputs * one.width
        return units(one.inputs, one.first) * how.bits * 4 * round_up(one.outputs, OUTPUTS)

    return size


def _scales(how: Packing | None) -> Callable[[_Matrix], int]:
    """And scales."""
    return lambda one: how.row_groups(one.inputs, one.first) * round_up(one.outputs, OUTPUTS) if how else 0


def _one(
    values: Tensor, scales: Tensor | None, how: Packing | None, side: Sequence[_Matrix]
) -> tuple[Tensor, Tensor | None]:
    """Matrices that lie side by side, [rows, ...], laid one after the other: flat; side by side where not packed."""
    if how is None or scales is None:
        one = side[0]
        after = one.outputs - one.before - one.rows if one.rows else 0
        # Zeros in the rows and inputs that are no expert's channels.
        return F.pad(values, (0, (one.width - one.inputs) * (len(side) == 1), one.before, after)).reshape(-1), None
    codes = values.split([how.row_bytes(one.inputs) for one in side], dim=1)
    groups = scales.split([how.row_groups(one.inputs, one.first) for one in side], dim=1)
    words = [_words(code, how, one).flatten() for code, one in zip(codes, side, strict=True)]
    laid = []
    for own, one in zip(groups, side, strict=True):
        after = round_up(one.outputs, OUTPUTS) - one.before - one.rows
        laid.append(F.pad(own.t(), (one.before, after)).flatten())
    return torch.cat(words).view(torch.uint8), torch.cat(laid)


def _words(codes: Tensor, how: Packing, one: _Matrix) -> Tensor:
    """int32 [units, bits, outputs] of codes [rows, bytes]."""
    bits, count, before = how.bits, units(one.inputs, one.first), one.first % UNIT
    found = torch.zeros(count, bits, round_up(one.outputs, OUTPUTS), dtype=torch.int32, device=codes.device)
    if not found.numel():
        return found
    at_once = max(AT_ONCE // (count * UNIT), 1)
    for first in range(0, one.rows, at_once):
        rows = codes[first : first + at_once]
        if bits != 3 and not before:
            # A row is the string of bits that words are.
            whole = F.pad(rows, (0, count * bits * 4 - rows.shape[1])).contiguous().view(torch.int32)
            words = whole.view(len(rows), count, bits)
        else:
            opened = F.pad(unpack(rows, bits, one.inputs), (before, count * UNIT - before - one.inputs))
            planes = [(opened & 3, 2), (opened >> 2, 1)] if bits == 3 else [(opened, bits)]
            each = [pack_codes(plane.contiguous(), own).contiguous().view(torch.int32) for plane, own in planes]
            words = torch.cat([plane.view(len(rows), count, -1) for plane in each], dim=2)
        place = one.before + first
        found[:, :, place : place + len(rows)] = words.permute(1, 2, 0)
    return found


def _places(bits: Tensor, spec: LayerSpec) -> Tensor:
    """int32 [sum of padded widths + E I]: of each padded channel its number in the base, -1 for none; then of each
    expert and each of the base's channels where it is among the expert's, as they are padded, -1 for none."""
    inner, device = spec.intermediate_size, bits.device
    kept = from_bits(bits, inner)
    # Counted on the host's side of the format: as many as are set, in ascending order.
    ascending = (~kept).to(torch.uint8).argsort(dim=1, stable=True)
    forward, shift, padded = [], shifts(spec), padded_widths(spec)
    for expert, width in enumerate(spec.widths):
        after = padded[expert] - shift[expert] - width if width else 0
        before = shift[expert] if width else 0
        forward.append(F.pad(ascending[expert, :width].int(), (before, after), value=-1))
    begin = torch.tensor(shift, dtype=torch.int32, device="cpu").to(device).unsqueeze(1)
    order = kept.cumsum(dim=1, dtype=torch.int32) - 1 + begin
    return torch.cat([*forward, torch.where(kept, order, -1).flatten()])
