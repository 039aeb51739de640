"""Base by merging the experts of a layer (D2-MoE §3.2, METHODS 1.1): a table of named functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Evidence:
    """What calibration knows about the experts of one projection.

    tokens: int64 [experts], routed tokens; fisher: per expert float32 [out, in], or None if not gathered.
    """

    tokens: Tensor
    fisher: Sequence[Tensor] | None
    epsilon: float
    frequency_power: float


def fisher_merge(weights: Sequence[Tensor], evidence: Evidence) -> Tensor:
    """sum_i F_i * W_i / sum_i F_i, element-wise (D2-MoE eq. 4-5).

    weights: per expert [out, in]. F_i + epsilon * mean(F) enters both sums, so that positions and experts
    without any evidence fall back to the plain mean. Returns float32 [out, in].
    Raises ValueError where no Fisher information was gathered.
    """
    if evidence.fisher is None:
        raise ValueError("the fisher merge needs Fisher information")
    share = evidence.tokens.double() / evidence.tokens.sum().clamp(min=1)
    power = share**evidence.frequency_power
    mean = sum(float(f.double().mean()) * float(p) for f, p in zip(evidence.fisher, power, strict=True))
    mean /= len(weights)
    if mean == 0:
        return mean_merge(weights, evidence)
    total = torch.zeros_like(weights[0], dtype=torch.float32)
    norm = torch.zeros_like(total)
    for weight, fisher, factor in zip(weights, evidence.fisher, power, strict=True):
        # Divided by the mean, so that tiny Fisher values cannot underflow.
        importance = (fisher.double() * (float(factor) / mean)).float() + evidence.epsilon
        total.addcmul_(importance, weight.float())
        norm += importance
    return total / norm


def mean_merge(weights: Sequence[Tensor], evidence: Evidence) -> Tensor:
    """The plain mean; float32 [out, in]."""
    return _weighted(weights, torch.ones(len(weights)))


def frequency_merge(weights: Sequence[Tensor], evidence: Evidence) -> Tensor:
    """The mean weighted by routed tokens; the plain mean where none was routed. float32 [out, in]."""
    tokens = evidence.tokens.double()
    return _weighted(weights, tokens if tokens.sum() > 0 else torch.ones(len(weights)))


def _weighted(weights: Sequence[Tensor], factors: Tensor) -> Tensor:
    total = torch.zeros_like(weights[0], dtype=torch.float32)
    for weight, factor in zip(weights, (factors.double() / factors.sum()).tolist(), strict=True):
        total.add_(weight.float(), alpha=factor)
    return total


MERGES: dict[str, Callable[[Sequence[Tensor], Evidence], Tensor]] = {
    "fisher": fisher_merge,
    "mean": mean_merge,
    "frequency": frequency_merge,
}
NEEDS_FISHER = frozenset({"fisher"})
