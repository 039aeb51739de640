"""Matrices rounded to few bits, column by column, with feedback (GPTQ, arXiv 2210.17323; METHODS 4.1).

What a column loses is spread over the columns to come, as far as their inputs go together. Integers at 8 and 4 bits,
half-integers at 3 and 2, where a level at zero would waste one of few.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from d2moe_vllm.format.kinds import GROUP_SIZE

BLOCK = 128
"""Columns after which what they lost reaches the rest by one matrix product; a multiple of every group size."""
FEW = 32
"""Columns after which it reaches the rest of their block in the same way; a power of two, as group sizes are."""
LEAF = 128
"""Rows of a triangular matrix that is inverted without halving it."""
CANDIDATES = 20
"""Scales that are tried for a group."""
SMALLEST = 0.3
"""Of the scale at which nothing is clipped, the smallest that is tried."""
DAMPING = 0.01
"""Of the mean second moment, added to every input's; ten times as much where a factorization fails."""


class Levels(NamedTuple):
    """A code c stands for scale * (c - zero), lowest <= c <= highest."""

    zero: float
    lowest: int
    highest: int

    @property
    def largest(self) -> float:
        """The largest level, in scales."""
        return self.highest - self.zero


LEVELS: Mapping[int, Levels] = {
    8: Levels(128, 1, 255), 4: Levels(8, 1, 15), 3: Levels(3.5, 0, 7), 2: Levels(1.5, 0, 3),
}  # fmt: skip
"""Bits of a code -> what it stands for."""


@dataclass(frozen=True)
class Rounded:
    """codes: uint8 [out, in]; scales: [out, ceil(in / group_size)], in the dtype they are stored in; damping: what was
    added to the second moment, in its mean."""

    codes: Tensor
    scales: Tensor
    bits: int
    group_size: int
    damping: float

    def dense(self) -> Tensor:
        """What they stand for, float32 [out, in]."""
        scales = self.scales.float().repeat_interleave(self.group_size, dim=1)[:, : self.codes.shape[1]]
        return (self.codes.float() - LEVELS[self.bits].zero) * scales


def round_matrix(
    weight: Tensor,
    gram: Tensor | None,
    bits: int,
    *,
    group_size: int = GROUP_SIZE,
    dtype: torch.dtype = torch.bfloat16,
) -> Rounded:
    """The matrix in codes of `bits` bits, with a scale in `dtype` for every `group_size` inputs of a row.

    weight: float32 [out, in]; gram: second moment of the inputs, [in, in], symmetric, positive semi-definite, any
    scale; None rounds to nearest, every column alone. Raises ValueError for other bits and for group sizes that do not
    divide BLOCK.
    """
    return round_matrices([weight], gram, [bits], group_size=group_size, dtype=dtype)[0]


def round_matrices(
    weights: Sequence[Tensor],
    gram: Tensor | None,
    bits: Sequence[int],
    *,
    group_size: int = GROUP_SIZE,
    dtype: torch.dtype = torch.bfloat16,
) -> list[Rounded]:
    """Several matrices that read the same inputs, each to its own bits, in one pass over the columns.

    weights: float32 [out_i, in]; bits: one for each of them; all else as for `round_matrix`, whose answers these are to
    the bit. One factorization serves them all, and on small matrices, where what takes time is the loop, they take as
    long as one. Raises ValueError as `round_matrix` does.
    """
    if not set(bits) <= LEVELS.keys() or BLOCK % group_size:
        raise ValueError(
            f"{' '.join(map(str, bits))} bits in groups of {group_size}: only {list(LEVELS)} bits, in groups that "
            f"divide {BLOCK}"
        )
    # Column after column is read and written, so they lie one after another.
    left = torch.cat([weight.float().mT for weight in weights], dim=1)
    inputs, rows = left.shape
    parts = [len(weight) for weight in weights]
    levels = _Rows.of(bits, parts, left.device)
    importance, feedback, damping = feedback_of(gram, inputs, left.device)
    codes = torch.empty(left.shape, dtype=torch.uint8, device=left.device)
    scales = torch.empty(-(-inputs // group_size), rows, dtype=dtype, device=left.device)
    lost = torch.empty(min(BLOCK, inputs), rows, device=left.device)
    spread = torch.empty(min(FEW, inputs), rows, device=left.device)
    for start in range(0, inputs, BLOCK):
        stop = min(start + BLOCK, inputs)
        for first in range(start, stop, FEW):
            last = min(first + FEW, stop)
            for column in range(first, last):
                group = column // group_size
                if column % group_size == 0:
                    end = min(column + group_size, inputs)
                    scales[group] = best_scales(left[column:end].mT.contiguous(), importance[column:end], levels, dtype)
                    scale = scales[group].float()
                    divisor = _divisor(scale)
                code = _nearest(left[column], divisor, levels)
                codes[column] = code
                if feedback is None:
                    continue
                own = feedback[column]
                error = torch.sub(left[column], code.sub_(levels.zero).mul_(scale), out=lost[column - start])
                error.div_(own[column])
                if rest := last - column - 1:
                    # In two steps: of one fused step the last bits may depend on how many rows there are.
                    left[column + 1 : last].sub_(torch.mul(own[column + 1 : last, None], error, out=spread[:rest]))
            if feedback is not None:
                _spread(lost[first - start : last - start], feedback[first:last, last:stop], left[last:stop], parts)
        if feedback is not None:
            _spread(lost[: stop - start], feedback[start:stop, stop:], left[stop:], parts)
    return [
        Rounded(code.mT.contiguous(), scale.mT.contiguous(), number, group_size, damping)
        for code, scale, number in zip(codes.split(parts, dim=1), scales.split(parts, dim=1), bits, strict=True)
    ]


def _spread(lost: Tensor, feedback: Tensor, left: Tensor, parts: Sequence[int]) -> None:
    """Takes from columns to come, [n, rows], what columns lost, [m, rows]; feedback: [m, n]."""
    if len(left):
        # Matrix by matrix, each as it would lie by itself: a product's last bits may depend on both.
        for part, beyond in zip(lost.split(parts, dim=1), left.split(parts, dim=1), strict=True):
            beyond.sub_(feedback.mT @ part.contiguous())


class _Rows(NamedTuple):
    """Levels row by row, float32 [rows] each."""

    zero: Tensor
    lowest: Tensor
    highest: Tensor

    @classmethod
    def of(cls, bits: Sequence[int], rows: Sequence[int], device: torch.device) -> _Rows:
        """rows: of the matrix with these bits."""
        repeats = torch.tensor(rows)
        columns = [torch.tensor([LEVELS[one][field] for one in bits]) for field in range(3)]
        return cls(*(column.float().repeat_interleave(repeats).to(device) for column in columns))


def feedback_of(gram: Tensor | None, inputs: int, device: torch.device) -> tuple[Tensor, Tensor | None, float]:
    """The inputs' mean squares, float32 [in]; the upper Cholesky factor C of the inverse second moment, CᵀC = G⁻¹,
    float32 [in, in], None for none; and the damping that it took.

    With the inputs in reverse order, G = L Lᵀ: L⁻¹, reversed again, is C. So G is never inverted.
    """
    if gram is None or float(mean := gram.diagonal().double().mean()) <= 0:
        return torch.ones(inputs, device=device), None, 0.0
    damping = DAMPING
    importance = (gram.diagonal().double() / mean).float()
    while True:
        # One float64 matrix, in place, in the order of its columns, which LAPACK wants: at real sizes it is gigabytes.
        moment = gram.flip(0, 1).double().div_(mean).mT
        moment.diagonal().add_(damping)
        if cholesky_(moment):
            _invert_(moment)
            found = moment.float()
            del moment
            return importance + damping, found.flip(0, 1).contiguous(), damping
        damping *= 10


def cholesky_(matrix: Tensor) -> bool:
    """Puts the lower factor of a symmetric matrix, float64 [n, n] in the order of its columns, in its own place; False
    where it is not positive definite, with which it is lost."""
    info = torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(matrix, out=(matrix, info))
    return not bool(info)


def _invert_(lower: Tensor) -> None:
    """Puts the inverse of a lower triangular matrix, float64 [n, n], in its own place: by halves, so that nearly all of
    it is products."""
    size = len(lower)
    if size <= LEAF:
        identity = torch.eye(size, dtype=lower.dtype, device=lower.device)
        lower.copy_(torch.linalg.solve_triangular(lower, identity, upper=False))
        return
    half = -(-size // 2 // LEAF) * LEAF
    first, below, second = lower[:half, :half], lower[half:, :half], lower[half:, half:]
    _invert_(first)
    _invert_(second)
    torch.mm(second @ below, first, out=below).neg_()


def best_scales(weight: Tensor, importance: Tensor, levels: _Rows, dtype: torch.dtype) -> Tensor:
    """Of every row the scale, among CANDIDATES, that leaves the least squared error, weighed by `importance`.

    weight: float32 [out, group]; importance: float32 [group]. Rounded to `dtype` before levels are chosen; 0 for a row
    that is all zero, or too small for `dtype`. Returns [out].
    """
    levels = _Rows(*(one[:, None] for one in levels))
    whole = weight.abs().amax(dim=1, keepdim=True) / (levels.highest - levels.zero)
    best, least = torch.zeros_like(whole), torch.full_like(whole, torch.inf)
    for share in torch.linspace(1, SMALLEST, CANDIDATES).tolist():
        scales = (whole * share).to(dtype).float()
        rounded = _nearest(weight, _divisor(scales), levels).sub_(levels.zero).mul_(scales)
        # A sum along each row, not a product with a vector, nor one across rows: their last bits may depend on how many
        # rows there are.
        error = rounded.sub_(weight).square_().mul_(importance).sum(dim=1, keepdim=True)
        better = error < least
        best, least = torch.where(better, scales, best), torch.where(better, error, least)
    return best[:, 0].to(dtype)


def _divisor(scales: Tensor) -> Tensor:
    """What weights are divided by: where a scale is 0 any code stands for 0, and the middle one is taken."""
    return torch.where(scales > 0, scales, torch.inf)


def _nearest(weight: Tensor, divisor: Tensor, levels: _Rows) -> Tensor:
    """Codes as float32, of the shape of `weight`; divisor and levels by row, so that they go with it."""
    return torch.div(weight, divisor).add_(levels.zero).round_().clamp_(levels.lowest, levels.highest)
