"""That a row's result is the same bits alone, in a crowd, and on any number of threads."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

CROWD = 67


def same_bits(some: Callable[[Tensor], Tensor]) -> None:
    """some: the results of rows by their numbers, below CROWD."""
    together = some(torch.arange(CROWD))
    for size in (1, 2, 13, 31):
        rows = torch.randperm(CROWD, generator=torch.Generator().manual_seed(size))[:size]
        assert torch.equal(some(rows), together[rows]), size
    assert not torch.equal(together[:2], together[2:4])
    before = torch.get_num_threads()
    try:
        for threads in (1, 3, 8):
            torch.set_num_threads(threads)
            assert torch.equal(some(torch.arange(CROWD)), together), threads
    finally:
        torch.set_num_threads(before)
