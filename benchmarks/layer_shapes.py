"""What one layer's weights come to in bytes: shared by the layer benchmark and the roofline."""

from __future__ import annotations

from typing import NamedTuple

from d2moe_vllm.ops import shapes
from d2moe_vllm.ops.shapes import GROUPS, SHAPES, SPARSITY, Shape, multiple

__all__ = ["GROUPS", "SHAPES", "SPARSITY", "Shape", "multiple"]

BYTES = 2
SCOPES = ("off", "batch")


STORAGES = {
    "int8": (None, 8),
    "int4": (None, 4),
    "int3": (None, 3),
    "int2": (None, 2),
    "base int4, delta int2": (4, 2),
}
"""Bits of a base, and of each expert's own matrices, that are stored whole."""


class Sizes(NamedTuple):
    """See shapes.Sizes."""

    shape: Shape
    scope: str
    kept: tuple[int, int]
    used: tuple[int, int]
    rank: int

    @property
    def columns(self) -> tuple[int, int]:
        """Of the base, that one forward pass reads."""
        return self.used if self.scope != "off" else self.kept

    @property
    def base_bytes(self) -> int:
        """Of these columns."""
        hidden, inner = self.shape[:2]
        return (2 * self.columns[0] * inner + self.columns[1] * hidden) * BYTES

    @property
    def expert_bytes(self) -> int:
        """Of one expert's deltas."""
        return 3 * self.rank * (self.shape.hidden + self.shape.intermediate) * BYTES


def sizes(shape: Shape, ratio: float, scope: str) -> Sizes:
    return Sizes(shape, scope, *shapes.sizes(shape, ratio, scope))


def dense_expert_bytes(shape: Shape) -> int:
    return 3 * shape.hidden * shape.intermediate * BYTES


def experts_in_use(shape: Shape, tokens: int) -> float:
    """Expected number of different experts, where every token goes to top_k of them, all equally likely."""
    return shape.experts * (1 - (1 - shape.top_k / shape.experts) ** tokens)
