"""A prediction for GPUs, not a measurement: the time that reading and arithmetic take at a device's published figures.

Per kernel the larger of bytes / bandwidth and operations / peak, added up over a layer, for our Triton kernels and for
vLLM's dense fused MoE. Left out, for both alike: starting kernels, padding to tiles, partial sums where one is split, a
second reading of anything. `make roofline` writes all rows to build/bench/roofline.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from layer_shapes import BYTES, SCOPES, SHAPES, Shape, Sizes, experts_in_use, sizes

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
                rows += [_layer_row(name, f"{ratio:.0%}", layer, tokens) for tokens in TOKENS]
    return rows


def _layer_row(name: str, ratio: str, layer: Sizes, tokens: int) -> str:
    active = experts_in_use(layer.shape, tokens)
    mine, theirs = ours(layer, tokens, active), dense(layer.shape, tokens, active)
    byte_ratio = sum(work.moved for work in theirs) / sum(work.moved for work in mine)
    cells = [name, ratio, layer.scope, str(tokens), f"{active:.1f}", f"{byte_ratio:.2f}"]
    for device in DEVICES.values():
        both = seconds(theirs, device), seconds(mine, device)
        cells += [f"{both[0] * 1e6:.1f}", f"{both[1] * 1e6:.1f}", f"{both[0] / both[1]:.2f}"]
    return f"| {' | '.join(cells)} |"


def kernel_rows(layer: Sizes, tokens: int) -> list[str]:
    """Markdown: each kernel's bytes, operations and time, ours before the dense layer's."""
    active = experts_in_use(layer.shape, tokens)
    rows = [f"| kernel | weights MB | moved MB | GFLOP | {' | '.join(f'{name}, µs' for name in DEVICES)} |"]
    rows.append("|---|" + "---:|" * (3 + len(DEVICES)))
    for side, works in (("", ours(layer, tokens, active)), ("dense: ", dense(layer.shape, tokens, active))):
        total = Work("together", *(sum(column) for column in list(zip(*works, strict=True))[1:]))
        for work in [*works, total]:
            times = [seconds(works, device) if work is total else work.seconds(device) for device in DEVICES.values()]
            figures = [work.weights / 1e6, work.moved / 1e6, work.flops / 1e9, *(time * 1e6 for time in times)]
            rows.append(f"| {side}{work.kernel} | {' | '.join(f'{figure:.2f}' for figure in figures)} |")
    return rows


def main() -> None:
    lines = ["# Prediction, not a measurement", "", " ".join(__doc__.split()), "", "## Layers", "", *layer_rows()]
    for name, shape in SHAPES.items():
        for tokens in (1, 16, 256):
            lines += ["", f"## {name} at 40 %, scope off, {tokens} tokens, by kernel", ""]
            lines += kernel_rows(sizes(shape, 0.4, "off"), tokens)
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text("\n".join(lines) + "\n")
    print(f"written to {OUT}")


if __name__ == "__main__":
    main()
