"""Matrices of few bits (METHODS 4.1): codes packed along the input, and what they stand for.

A row of codes is a string of bits, least significant bits first, padded to whole bytes; every `group_size` inputs of
it share a scale. Travels inside checkpoints, with reference.py: it imports torch and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Packing(NamedTuple):
    """How a matrix is packed: a code c of `bits` bits stands for scale * (c - zero)."""

    bits: int
    zero: float
    group_size: int

    def row_bytes(self, inputs: int) -> int:
        return -(-inputs * self.bits // 8)

    def row_groups(self, inputs: int, first: int = 0) -> int:
        """Scales of a row's inputs first..first+inputs-1: a group that is cut counts."""
        return -(-(first % self.group_size + inputs) // self.group_size) if inputs else 0


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 [..., in], every one below 2^bits, as uint8 [..., ceil(in bits / 8)]. bits: 2, 3, 4 or 8."""
    if bits == 8:
        return codes
    inputs = codes.shape[-1]
    codes = F.pad(codes, (0, -inputs % 8)).unflatten(-1, (-1, 8)).long()
    words = (codes << bits * torch.arange(8, device=codes.device)).sum(dim=-1, keepdim=True)
    rows = (words >> 8 * torch.arange(bits, device=codes.device) & 255).to(torch.uint8).flatten(-2)
    return rows[..., : -(-inputs * bits // 8)].contiguous()


def unpack(packed: Tensor, bits: int, inputs: int) -> Tensor:
    """The reverse of `pack`."""
    if bits == 8:
        return packed
    if 8 % bits == 0:
        shifts = bits * torch.arange(8 // bits, dtype=torch.uint8, device=packed.device)
        return (packed.unsqueeze(-1) >> shifts & (1 << bits) - 1).flatten(-2)[..., :inputs]
    threes = F.pad(packed, (0, -packed.shape[-1] % 3)).unflatten(-1, (-1, 3)).int()
    words = threes[..., 0] | threes[..., 1] << 8 | threes[..., 2] << 16
    shifts = bits * torch.arange(8, dtype=torch.int32, device=packed.device)
    return (words.unsqueeze(-1) >> shifts & (1 << bits) - 1).to(torch.uint8).flatten(-2)[..., :inputs]


def unpacked(packed: Tensor, scales: Tensor, how: Packing, inputs: int, first: int = 0) -> Tensor:
    """What codes [..., ceil(in bits / 8)] and scales [..., groups] stand for, exactly: float32 [..., in].

    first: place of the first of these inputs in the row that the groups count from: a group may have begun before.
    """
    values = unpack(packed, how.bits, inputs).float().sub_(how.zero)
    within = first % how.group_size
    if not within and inputs % how.group_size == 0:
        return values.unflatten(-1, (-1, how.group_size)).mul_(scales.float().unsqueeze(-1)).flatten(-2)
    groups = torch.arange(within, within + inputs, device=packed.device) // how.group_size
    return values.mul_(scales.float().index_select(-1, groups))


def narrow(packed: Tensor, scales: Tensor, how: Packing, inputs: int, first: int, own: int) -> tuple[Tensor, Tensor]:
    """Codes and scales of the inputs first..first+own-1 of rows of `inputs`: codes packed anew, groups as they are."""
    codes = unpack(packed, how.bits, inputs)[..., first : first + own].contiguous()
    groups = slice(first // how.group_size, first // how.group_size + how.row_groups(own, first))
    return pack(codes, how.bits), scales[..., groups]


def opened(values: Tensor, scales: Tensor, how: Packing, parts: Sequence[int], first: int = 0) -> Tensor:
    """What rows [..., bytes] stand for, float32 [..., in], where `parts` inputs lie side by side, each packed alone;
    first: see `unpacked`."""
    codes = values.split([how.row_bytes(part) for part in parts], dim=-1)
    groups = scales.split([how.row_groups(part, first) for part in parts], dim=-1)
    pairs = zip(codes, groups, parts, strict=True)
    found = [unpacked(code, scale, how, part, first) for code, scale, part in pairs]
    return found[0] if len(found) == 1 else torch.cat(found, dim=-1)


class StoredMatrices(Sequence[Tensor]):
    """Matrices of experts that lie packed, or flat, or both; opened one at a time, in `dtype`.

    values, scales: [D, rows, ...], or flat, one matrix after the other. rows, parts, first: of each of the D matrices
    its rows, the inputs that lie side by side in one, each packed on its own, and where in a whole row they begin.
    """

    def __init__(
        self,
        values: Tensor,
        scales: Tensor | None,
        how: Packing | None,
        rows: Sequence[int],
        parts: Sequence[tuple[int, ...]],
        first: Sequence[int],
        dtype: torch.dtype,
    ) -> None:
        self._how, self._parts, self._first, self._dtype = how, parts, first, dtype
        sizes = [(sum(part), 0) for part in parts]
        if how is not None:
            sizes = [row_sizes(how, part, begin) for part, begin in zip(parts, first, strict=True)]
        self._values = _matrices(values, rows, [size for size, _ in sizes])
        self._scales = None if scales is None else _matrices(scales, rows, [size for _, size in sizes])

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, place: Any) -> Any:
        return self._open(self._values[place], None if self._scales is None else self._scales[place], place)

    def index_select(self, dim: int, place: Tensor) -> Tensor:
        """As a tensor's, of matrices that are not flat; place: int [1]."""
        scales = None if self._scales is None else self._scales.index_select(dim, place)  # type: ignore[union-attr]
        return self._open(self._values.index_select(dim, place), scales, 0)  # type: ignore[union-attr]

    def _open(self, values: Tensor, scales: Tensor | None, place: int) -> Tensor:
        if self._how is None or scales is None:
            return values
        return opened(values, scales, self._how, self._parts[place], self._first[place]).to(self._dtype)


def row_sizes(how: Packing, parts: Sequence[int], first: int = 0) -> tuple[int, int]:
    """Bytes and scales of a row in which `parts` inputs lie side by side."""
    return sum(map(how.row_bytes, parts)), sum(how.row_groups(part, first) for part in parts)


def _matrices(values: Tensor, rows: Sequence[int], widths: Sequence[int]) -> Tensor | list[Tensor]:
    """[D, rows, width] as it is; flat ones one by one."""
    if values.dim() > 1:
        return values
    shapes = list(zip(rows, widths, strict=True))
    pieces = values.split([height * width for height, width in shapes])
    return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]


def to_bits(places: Tensor) -> Tensor:
    """bool [..., n] as uint8 [..., ceil(n / 8)], least significant bits first."""
    bits = F.pad(places.to(torch.uint8), (0, -places.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (bits << torch.arange(8, dtype=torch.uint8, device=bits.device)).sum(dim=-1, dtype=torch.uint8)


def from_bits(bits: Tensor, count: int) -> Tensor:
    """The reverse: bool [..., count]."""
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (bits.unsqueeze(-1) >> places & 1).flatten(-2)[..., :count].bool()
