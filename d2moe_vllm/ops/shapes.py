"""Layers of real models, and what is stored of one at a ratio: for benchmarks, predictions and tuning."""

from __future__ import annotations

from typing import NamedTuple

GROUPS = 8
"""Of columns, in these layers; column and rank multiples are 16, as for all real models."""


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
SPARSITY = {"off": 0.1, "token": 0.1, "batch": 0.6}
"""Share of the base's columns that are unused: METHODS' default, and its throughput setting; half of it statically."""


class Sizes(NamedTuple):
    """Of a uniform checkpoint's layer. kept, used: the base's columns, of w13 and w2. rank: of gate, up and down."""

    kept: tuple[int, int]
    used: tuple[int, int]
    rank: int


def sizes(shape: Shape, ratio: float, scope: str) -> Sizes:
    """What is stored, and used, where `ratio` of the dense layer is gone."""
    hidden, inner, experts, _ = shape
    kept, used = (
        (multiple(hidden * (1 - share), GROUPS * 16), multiple(inner * (1 - share), GROUPS * 16))
        for share in (SPARSITY[scope] / 2, SPARSITY[scope])
    )
    base = 2 * kept[0] * inner + kept[1] * hidden
    rank = multiple(((1 - ratio) * experts * 3 * hidden * inner - base) / (experts * 3 * (hidden + inner)), 16)
    return Sizes(kept, used, rank)


def multiple(value: float, of: int) -> int:
    """The largest that is not more than value; at least one."""
    return max(of, int(value) // of * of)
