"""What rounding is expected to cost, in nats, measured on a sample of rows (METHODS 4.3).

A row of a matrix is rounded without regard to the others, given what the matrix reads. So a few rows tell what all
would lose, and all bits that may be chosen are tried in one pass over the columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from d2moe_vllm.format.kinds import GROUP_SIZE
from offline.algebra.rounding import round_matrices

SAMPLE = 64
"""Rows of a matrix that are rounded to see what all would lose."""


def rounding_losses(
    weights: Sequence[Tensor],
    sensitivities: Sequence[Tensor],
    gram: Tensor,
    bits: Sequence[int],
    *,
    group_size: int = GROUP_SIZE,
    dtype: torch.dtype = torch.bfloat16,
    sample: int = SAMPLE,
) -> list[float]:
    """1/2 sum_r S_r d_r G d_rᵀ for every matrix, d_r the error of its row r: the second-order expectation of the loss.

    weights: float32 [out, in] each, all reading inputs of the mean second moment `gram` [in, in]; a projection's delta
    appears as often as there are bits to try it with. sensitivities: float64 [out] each, S_r = sum over tokens of
    (dL/dy_r)² at the projection's output, the gate counted once, there or in G. bits: 16 is not rounded, and loses
    nothing; 0 is not stored, and loses all. Up to `sample` rows are rounded, evenly spaced; that the others lose as
    much for their S_r ||w_r||² is what is assumed. Raises ValueError as `round_matrices` does.
    """
    tried = [number for number, one in enumerate(bits) if one not in (0, 16)]
    rows = [_sample(len(weight), sample, weight.device) for weight in weights]
    few = {number: weights[number][rows[number]] for number in tried}
    found = round_matrices(list(few.values()), gram, [bits[number] for number in tried], group_size=group_size,
                           dtype=dtype) if tried else []  # fmt: skip
    errors = {number: few[number] - one.dense() for number, one in zip(tried, found, strict=True)}
    losses = []
    for number, (weight, sensitivity) in enumerate(zip(weights, sensitivities, strict=True)):
        if bits[number] == 16:
            losses.append(0.0)
            continue
        mine = rows[number]
        error = errors.get(number, weight[mine])
        measured = 0.5 * float(sensitivity[mine] @ ((error @ gram.float()) * error).sum(dim=1, dtype=torch.float64))
        size = sensitivity * weight.double().square().sum(dim=1)
        seen, every = float(size[mine].sum()), float(size.sum())
        losses.append(max(measured, 0.0) * (every / seen if seen > 0 else len(weight) / len(mine)))
    return losses


def _sample(rows: int, count: int, device: torch.device) -> Tensor:
    """int64, ascending, evenly spaced; all where there are no more."""
    return (torch.arange(min(count, rows), device=device) * rows // min(count, rows)).long()


def row_shares(weights: Sequence[Tensor], sensitivities: Sequence[Tensor]) -> Tensor:
    """How gate and up's loss by rounding is spread over their rows, which are the intermediate channels: by
    S_r ||w_r||². weights: [out, in] each; sensitivities: float64 [out] each. Returns float64 [out], of sum 1."""
    pairs = zip(weights, sensitivities, strict=True)
    return _shares(sum((one * weight.double().square().sum(dim=1) for weight, one in pairs),
                       torch.zeros_like(sensitivities[0])))  # fmt: skip


def column_shares(gram: Tensor) -> Tensor:
    """How down's loss by rounding is spread over its columns: by the mean square of what they read, as all columns of
    a group have one scale. gram: [in, in]. Returns float64 [in], of sum 1."""
    return _shares(gram.diagonal().double().clamp(min=0))


def _shares(sizes: Tensor) -> Tensor:
    total = float(sizes.sum())
    return sizes / total if total > 0 else torch.full_like(sizes, 1 / len(sizes))
