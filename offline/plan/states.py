"""Which layers' inputs a sweep backwards keeps: one of every few, and those of the last stretch.

Every layer's input would be a file of the whole calibration text for each layer. With one of every few kept and those
between computed anew, stretch by stretch, about twice the square root of their number is there at a time (Chen et al.,
Training Deep Nets with Sublinear Memory Cost, arXiv 1604.06174), for one more run over each layer. More are kept where
the working folder stays no larger than the model all the same (resources.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class States:
    """Of a model with so many layers; every: one of so many is kept, about the square root of their number by 0."""

    layers: int
    every: int = 0

    def __post_init__(self) -> None:
        if not self.every:
            object.__setattr__(self, "every", max(round(math.sqrt(self.layers)), 1))

    def is_kept(self, layer: int) -> bool:
        """Whether a layer's input stays until a sweep backwards has passed it; `layers`: the last one's output."""
        return layer % self.every == 0 and layer < self.layers

    @property
    def start(self) -> frozenset[int]:
        """Inputs that are there when a sweep backwards begins: those that are kept, and all of the last stretch."""
        last = (self.layers - 1) // self.every * self.every
        return frozenset(layer for layer in range(self.layers) if self.is_kept(layer) or layer >= last) | {self.layers}

    def there(self, layer: int) -> frozenset[int]:
        """Inputs that are there while a layer runs backwards, of those up to it."""
        last = layer // self.every * self.every
        return frozenset(number for number in range(layer + 1) if self.is_kept(number) or number >= last)

    def recomputed(self, *, first: bool) -> int:
        """How many inputs a whole sweep backwards computes anew; first: whether the last stretch is there still."""
        return sum(not self.is_kept(layer) and not (first and layer in self.start) for layer in range(self.layers))
