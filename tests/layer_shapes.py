"""Layers of real models, and what one of them weighs at a ratio: shared by the layer benchmark and the roofline."""

from __future__ import annotations

from typing import NamedTuple

GROUPS, BYTES = 8, 2


class Shape(NamedTuple):
    hidden: int
    intermediate: int
    experts: int
    top_k: int


SHAPES = {
    "Mixtral-8x7B": Shape(4096, 14336, 8, 2),
    "DeepSeekMoE-16B": Shape(2048, 1408, 64, 6),
    "Qwen3-30B-A3B": Shape(2048, 768, 128, 8),
}
SPARSITY = {"off": 0.1, "batch": 0.6}
"""Share of the base's columns that are unused: METHODS' default, and its throughput setting; half of it statically."""


def multiple(value: float, of: int) -> int:
    return max(of, int(value) // of * of)


class Sizes(NamedTuple):
    """A layer of a uniform checkpoint. kept, used: the base's columns, of w13 and w2. rank: of each."""

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
    """What is stored, and used, where `ratio` of the dense layer is gone."""
    hidden, inner, experts, _ = shape
    kept, used = (
        tuple(multiple(size * (1 - share), GROUPS * 16) for size in (hidden, inner))
        for share in (SPARSITY[scope] / 2, SPARSITY[scope])
    )
    base = 2 * kept[0] * inner + kept[1] * hidden
    rank = multiple(((1 - ratio) * experts * 3 * hidden * inner - base) / (experts * 3 * (hidden + inner)), 16)
    return Sizes(shape, scope, (kept[0], kept[1]), (used[0], used[1]), rank)


def dense_expert_bytes(shape: Shape) -> int:
    return 3 * shape.hidden * shape.intermediate * BYTES


def experts_in_use(shape: Shape, tokens: int) -> float:
    """Expected number of different experts, where every token goes to top_k of them, all equally likely."""
    return shape.experts * (1 - (1 - shape.top_k / shape.experts) ** tokens)
