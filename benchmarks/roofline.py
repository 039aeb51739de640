"""A prediction for GPUs, not a measurement: the time that reading and arithmetic take at a device's published figures.

Per kernel the larger of bytes / bandwidth and operations / peak, added up over a layer, for our Triton kernels and for
vLLM's dense fused MoE. Left out, for both alike: starting kernels, padding to tiles, partial sums where one is split, a
second reading of anything. `make roofline` writes all rows to build/bench/roofline.md.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import NamedTuple

from layer_shapes import BYTES, SCOPES, SHAPES, Shape, Sizes, experts_in_use, multiple, sizes

from d2moe_vllm.ops.triton.tiles import SLOT_ROWS

OUT = Path(__file__).resolve().parent.parent / "build" / "bench" / "roofline.md"
RATIOS = (0.2, 0.4, 0.6, 0.8)
TOKENS = (1, 4, 16, 64, 256, 1024)
FLOAT = 4


class Device(NamedTuple):
    """bandwidth: bytes per second. peak: bfloat16 operations per second of the tensor cores, dense."""

    bandwidth: float
    peak: float


DEVICES = {
    "A100 SXM 80 GB": Device(2039e9, 312e12),
    "H100 SXM": Device(3350e9, 989e12),
    "B200": Device(8000e9, 2250e12),
}
"""As NVIDIA's data sheets have them."""


class Work(NamedTuple):
    """One kernel's. weights: bytes of parameters that it reads; moved: all bytes, these included. flops: of products,
    two for a multiplication and an addition."""

    kernel: str
    weights: float
    moved: float
    flops: float

    def seconds(self, device: Device) -> float:
        return max(self.moved / device.bandwidth, self.flops / device.peak)


def product(kernel: str, rows: float, inputs: int, outputs: int, matrices: float, moved: float) -> Work:
    """rows times one of `matrices` different [inputs, outputs]; moved: bytes besides the matrices."""
    weights = matrices * inputs * outputs * BYTES
    return Work(kernel, weights, weights + moved, 2 * rows * inputs * outputs)


def ours(layer: Sizes, tokens: int, active: float) -> list[Work]:
    """The kernels of one call, in order, where `active` different experts are routed to."""
    hidden, inner, _, top_k = layer.shape
    pairs, rank, (in_base, mixed) = tokens * top_k, layer.rank, layer.columns
    ids, selects, kept = pairs * FLOAT, layer.scope != "off", layer.kept[1]
    # A column's number, and where columns are selected its norm.
    columns = [count * FLOAT * (1 + selects) for count in layer.kept]
    mix = pairs * kept * BYTES + tokens * kept * (FLOAT if selects else BYTES) + 2 * ids
    select = [Work("select columns 2", columns[1], columns[1] + tokens * (kept * FLOAT + mixed * BYTES), 0)]
    return [
        Work("sort pairs by expert", 0, 2 * ids, 0),
        Work("columns 13", columns[0], columns[0] + tokens * (hidden + in_base) * BYTES, 0),
        product("base 13", tokens, in_base, 2 * inner, 1, tokens * (in_base + 2 * inner) * BYTES),
        product("shrink 13", pairs, hidden, 2 * rank, active, (tokens * hidden + pairs * 2 * rank) * BYTES),
        product(
            "expand 13, activate", pairs, 2 * rank, inner, active,
            (pairs * 2 * rank + tokens * 2 * inner + pairs * inner) * BYTES,
        ),
        Work("mix", 0, mix, 2 * pairs * kept),
        *select * selects,
        product("base 2", tokens, mixed, hidden, 1, tokens * (mixed * BYTES + hidden * FLOAT)),
        product("shrink 2", pairs, inner, rank, active, pairs * (inner + rank) * BYTES),
        product("expand 2", pairs, rank, hidden, active, pairs * (rank * BYTES + hidden * FLOAT)),
        Work("combine", 0, (tokens + pairs) * hidden * FLOAT + tokens * hidden * BYTES + 2 * ids, 2 * pairs * hidden),
    ]  # fmt: skip


class Mixed(NamedTuple):
    """A MoBE layer (METHODS 3): gate and up of `rank` columns of A, mixed from `bases`; down dense."""

    shape: Shape
    bases: int
    rank: int


def mixed_sizes(shape: Shape, ratio: float) -> Mixed | None:
    """Where `ratio` of the dense layer is gone, with as many bases as the recipe's default; None where down's share
    alone is more."""
    hidden, inner, experts, _ = shape
    bases, kept = max(experts // 4, 2), 1.5 * (1 - ratio) - 0.5
    rank = (kept * experts * inner * hidden - experts * bases) / (experts * inner + bases * hidden)
    return Mixed(shape, bases, multiple(rank, 16)) if rank >= 16 else None


def ours_mixed(layer: Mixed, tokens: int, active: float) -> list[Work]:
    """The kernels of one call to a MoBE layer. V is mixed for each SLOT_ROWS rows of an expert; bases count as read
    once, which holds where the L2 cache keeps what several programs read at about the same time."""
    (hidden, inner, _, top_k), bases, k = layer.shape, layer.bases, 2 * layer.rank
    pairs = tokens * top_k
    ids = pairs * FLOAT
    weights = (bases * k * hidden + active * 2 * bases) * BYTES
    mixes = 2 * max(active, pairs / SLOT_ROWS) * bases * k * hidden
    return [
        Work("sort pairs by expert", 0, 2 * ids, 0),
        Work(
            "mix and shrink 13", weights, weights + (tokens * hidden + pairs * k) * BYTES,
            mixes + 2 * pairs * k * hidden,
        ),
        product("expand 13, activate", pairs, k, inner, active, pairs * (k + inner) * BYTES),
        product("down", pairs, inner, hidden, active, pairs * (inner * BYTES + hidden * FLOAT)),
        Work("combine", 0, pairs * hidden * FLOAT + tokens * hidden * BYTES + 2 * ids, 2 * pairs * hidden),
    ]  # fmt: skip


def dense(shape: Shape, tokens: int, active: float) -> list[Work]:
    """vLLM's fused MoE: two grouped products, the activation and the sum between and after them."""
    hidden, inner, _, top_k = shape
    pairs = tokens * top_k
    return [
        Work("sort pairs by expert", 0, 2 * pairs * FLOAT, 0),
        product("w13", pairs, hidden, 2 * inner, active, (tokens * hidden + pairs * 2 * inner) * BYTES),
        Work("activate", 0, pairs * 3 * inner * BYTES, 0),
        product("w2", pairs, inner, hidden, active, pairs * (inner + hidden) * BYTES),
        Work("sum", 0, (pairs + tokens) * hidden * BYTES, 0),
    ]


def seconds(works: list[Work], device: Device) -> float:
    return sum(work.seconds(device) for work in works)


def layer_rows() -> list[str]:
    """Markdown: every shape, ratio, scope and number of tokens, on every device."""
    rows = [
        "| shape | ratio | scope | tokens | experts in use | byte ratio | "
        + " | ".join(f"{name}: dense µs | ours µs | speed-up" for name in DEVICES)
        + " |",
        "|" + "---|" * (6 + 3 * len(DEVICES)),
    ]
    for name, shape in SHAPES.items():
        for ratio in RATIOS:
            for scope in SCOPES:
                layer = sizes(shape, ratio, scope)
                rows += [_layer_row(name, f"{ratio:.0%}", scope, layer, tokens) for tokens in TOKENS]
    for (name, shape), ratio in itertools.product(SHAPES.items(), RATIOS):
        if (mixed := mixed_sizes(shape, ratio)) is not None:
            rows += [_layer_row(f"MoBE: {name}", f"{ratio:.0%}", "off", mixed, tokens) for tokens in TOKENS]
    return rows


def works(layer: Sizes | Mixed, tokens: int) -> tuple[list[Work], list[Work]]:
    """Ours and the dense layer's."""
    active = experts_in_use(layer.shape, tokens)
    mine = ours_mixed(layer, tokens, active) if isinstance(layer, Mixed) else ours(layer, tokens, active)
    return mine, dense(layer.shape, tokens, active)


def _layer_row(name: str, ratio: str, scope: str, layer: Sizes | Mixed, tokens: int) -> str:
    mine, theirs = works(layer, tokens)
    byte_ratio = sum(work.moved for work in theirs) / sum(work.moved for work in mine)
    cells = [name, ratio, scope, str(tokens), f"{experts_in_use(layer.shape, tokens):.1f}", f"{byte_ratio:.2f}"]
    for device in DEVICES.values():
        both = seconds(theirs, device), seconds(mine, device)
        cells += [f"{both[0] * 1e6:.1f}", f"{both[1] * 1e6:.1f}", f"{both[0] / both[1]:.2f}"]
    return f"| {' | '.join(cells)} |"


def kernel_rows(layer: Sizes | Mixed, tokens: int) -> list[str]:
    """Markdown: each kernel's bytes, operations and time, ours before the dense layer's."""
    mine, theirs = works(layer, tokens)
    rows = [f"| kernel | weights MB | moved MB | GFLOP | {' | '.join(f'{name}, µs' for name in DEVICES)} |"]
    rows.append("|---|" + "---:|" * (3 + len(DEVICES)))
    for side, kernels in (("", mine), ("dense: ", theirs)):
        total = Work("together", *(sum(column) for column in list(zip(*kernels, strict=True))[1:]))
        for work in [*kernels, total]:
            times = [seconds(kernels, device) if work is total else work.seconds(device) for device in DEVICES.values()]
            figures = [work.weights / 1e6, work.moved / 1e6, work.flops / 1e9, *(time * 1e6 for time in times)]
            rows.append(f"| {side}{work.kernel} | {' | '.join(f'{figure:.2f}' for figure in figures)} |")
    return rows


def main() -> None:
    lines = ["# Prediction, not a measurement", "", " ".join(__doc__.split()), "", "## Layers", "", *layer_rows()]
    for name, shape in SHAPES.items():
        for tokens in (1, 16, 256):
            lines += ["", f"## {name} at 40 %, scope off, {tokens} tokens, by kernel", ""]
            lines += kernel_rows(sizes(shape, 0.4, "off"), tokens)
            mixed = mixed_sizes(shape, 0.4)
            assert mixed is not None
            lines += ["", f"## {name} at 40 % by MoBE, {tokens} tokens, by kernel", "", *kernel_rows(mixed, tokens)]
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text("\n".join(lines) + "\n")
    print(f"written to {OUT}")


if __name__ == "__main__":
    main()
