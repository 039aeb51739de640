"""Second moments of many rows, computed by half: they are symmetric, and at real sizes cost more than all else."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 512
"""Rows of the moment that are added to by one product, up to their place on the diagonal."""


class Moment:
    """The sum of x xᵀ over rows x, float32 [size, size].

    Rows come batch by batch. Blocks above the diagonal are not computed but mirrored at the end: of `n` blocks that is
    (n + 1) / 2n of the work. Up to BLOCK inputs it is the plain product.
    """

    def __init__(self, size: int, device: torch.device | None = None) -> None:
        self._total = torch.zeros(size, size, device=device)

    def add(self, rows: Tensor) -> None:
        """rows: float32 [n, size]."""
        for start in range(0, len(self._total), BLOCK):
            stop = min(start + BLOCK, len(self._total))
            self._total[start:stop, :stop].addmm_(rows[:, start:stop].T, rows[:, :stop])

    def mean(self, count: int) -> Tensor:
        """The sum over `count`, zero where that is 0; in the place of the sum, to which no row can be added then."""
        for start in range(0, len(self._total), BLOCK):
            stop = min(start + BLOCK, len(self._total))
            self._total[:start, start:stop] = self._total[start:stop, :start].T
        return self._total.div_(max(count, 1))
