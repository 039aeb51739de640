"""What a compression consists of, by kind, and how fast this machine does each: measured in a second, not assumed.

A processor that multiplies fast may factor slowly, and what small models spend is neither: it is the loop over columns.
So a plan counts work of each kind, and its seconds are those of the machine it is made on.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache, partial

import torch

from offline.algebra.products import Products, multiplying
from offline.algebra.rounding import feedback_of, round_matrix

_GRAIN = 512
"""Inputs of the matrices that are rounded to see how fast that is."""


@dataclass(frozen=True)
class Work:
    """rows: operations of products with calibration rows, which may be bfloat16 ones; products: of all others, in
    float32, of float64 ones twice as many; factors: float64 operations of Cholesky factorizations, inverses and
    solutions; eigen: of eigenproblems and singular values; columns: that are rounded one after another, with all rows
    of the matrices that go together; numbers: that are rounded; touched: float32 numbers that are read or written by
    what is no product; bytes: that are written to a file and hashed."""

    rows: float = 0.0
    products: float = 0.0
    factors: float = 0.0
    eigen: float = 0.0
    columns: float = 0.0
    numbers: float = 0.0
    touched: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, one.name) + getattr(other, one.name) for one in fields(Work)))

    def __mul__(self, times: float) -> Work:
        return Work(*(getattr(self, one.name) * times for one in fields(Work)))

    __rmul__ = __mul__

    def seconds(self, rates: Rates) -> float:
        """All of it, one kind after the other."""
        return sum(getattr(self, one.name) / getattr(rates, one.name) for one in fields(Work))


@dataclass(frozen=True)
class Rates:
    """How much of each kind of `Work` is done in a second."""

    rows: float
    products: float
    factors: float
    eigen: float
    columns: float
    numbers: float
    touched: float
    bytes: float


@cache
def measured(device: str = "cpu", products: Products = "float32") -> Rates:
    """Of this machine, by this process's threads; once, as a comparison plans row by row. products: with rows."""
    on = torch.device(device)
    # Numbers of its own: what a caller draws afterwards is not to depend on whether this was measured before.
    draw = partial(torch.randn, generator=torch.Generator(on).manual_seed(0), device=on)
    rows, weight = draw(512, 2048), draw(2048, 2048)
    operations = 2 * rows.numel() * len(weight)
    usual = operations / _quickest(lambda: rows @ weight.T, on)
    with multiplying(products):
        of_rows = operations / _quickest(lambda: rows @ weight.T, on)
    size = 2048  # large enough for the speed of large ones, up to a third
    factors = size**3 / _quickest(partial(feedback_of, torch.eye(size, device=on), size, on), on, 1)
    some = draw(_GRAIN, _GRAIN, dtype=torch.float64)
    eigen = 15 * _GRAIN**3 / _quickest(lambda: torch.linalg.eigh(some @ some.T), on, 1)
    gram = torch.eye(_GRAIN, device=on)
    few, many = (_quickest(partial(round_matrix, draw(count, _GRAIN), gram, 3), on, 1) for count in _ROWS)
    more = _ROWS[1] - _ROWS[0]
    number = max(many - few - more * _GRAIN**2 / usual, 1e-9) / (more * _GRAIN)
    touched = 3 * rows.numel() / _quickest(lambda: rows.mul_(1.0).add_(rows), on) * 4 / 3
    content = bytes(1 << 24)
    hashed = len(content) / _quickest(lambda: hashlib.sha256(content), on)
    return Rates(of_rows, usual, factors, eigen, _GRAIN / few, 1 / number, touched, hashed)


_ROWS = (64, 1024)
"""Of the matrices that are rounded: with the first nearly all that takes time is the loop."""


def _quickest(run: Callable[[], object], device: torch.device, times: int = 2) -> float:
    """Seconds of the quickest of some runs: what else the machine does makes it no slower."""
    run()
    found = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - start)
    return min(found)
