"""`make bench-stages`: the stages of one expert's calibration and rounding at Mixtral-8x7B's shapes, each beside how it
was done before: the two in turn, medians of their times and of their ratios. For docs/performance.md.

Random weights and rows. What was before: moments as whole products, in float32; gradients and moments in passes of
their own; the factor for feedback from the inverse of the moment; hidden states in float32.
Results: build/bench/stages.json. Options: --help.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from measuring import put_tables
from places import ROOT
from torch import Tensor
from torch.nn.functional import linear, silu

from d2moe_vllm.format.kinds import Role
from d2moe_vllm.ops.reference import gated
from offline.algebra.moments import Moment
from offline.algebra.products import Products, has_bfloat16, multiplying
from offline.algebra.rounding import DAMPING, feedback_of
from offline.io.shards import write_file
from offline.source.sites import Site
from offline.work.activations import Rows
from offline.work.statistics import Routing, Weights, gradients, mean_gram

RESULTS = ROOT / "build" / "bench" / "stages.json"
PAGE = ROOT / "docs" / "performance.md"


@dataclass(frozen=True)
class Stage:
    """name: what is done; before, now: ways of doing it."""

    name: str
    before: Callable[[], object]
    now: Callable[[], object]


def stages(hidden: int, channels: int, rows: int, folder: Path) -> Iterator[Stage]:
    """Of an expert [channels, hidden] that so many rows are routed to."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=draw) * scale

    x, middle = normal(rows, hidden), normal(rows, channels)
    matrices: dict[Role, Tensor] = {
        "gate": normal(channels, hidden, scale=hidden**-0.5).bfloat16(),
        "up": normal(channels, hidden, scale=hidden**-0.5).bfloat16(),
        "down": normal(hidden, channels, scale=channels**-0.5).bfloat16(),
    }
    weights, swiglu = Weights(matrices), gated(silu)
    best: Products = "bfloat16" if has_bfloat16() else "float32"

    def expert() -> Tensor:
        inner = silu(linear(x, weights["gate"].float())) * linear(x, weights["up"].float())
        return linear(inner, weights["down"].float())

    def within(products: Products, run: Callable[[], object]) -> Callable[[], object]:
        def computed() -> object:
            with multiplying(products):
                return run()

        return computed

    def moment() -> Tensor:
        total = Moment(channels)
        total.add(middle)
        return total.mean(rows)

    yield Stage("the expert forwards", within("float32", expert), within(best, expert))
    yield Stage("second moment of down's inputs", lambda: (middle.T @ middle).div_(rows), within(best, moment))

    tokens = torch.zeros(rows, 1, dtype=torch.int32)
    names = {name: _rows(folder / name, values) for name, values in (("x", x), ("up", normal(rows, hidden)))}

    def routing(products: Products) -> Routing:
        gates = torch.full((rows, 1), 0.5)
        return Routing(names["x"], tokens, gates, names["up"], rows, torch.device("cpu"), products)

    def apart() -> object:
        every, found = (
            routing("float32"),
            gradients(weights, routing("float32"), 0, swiglu, fisher=True, gate_weighted=True),
        )
        sites: tuple[Site, ...] = ("input", "middle")
        grams = {site: mean_gram(weights, every, 0, site, swiglu, gate_weighted=True) for site in sites}
        return replace(found, grams=grams)

    def together() -> object:
        return gradients(weights, routing(best), 0, swiglu, fisher=True, gate_weighted=True, sites=("input", "middle"))

    yield Stage("gradients, Fisher information and both moments", apart, together)

    gram = moment()

    def from_inverse() -> Tensor:
        wide = gram.double().div_(gram.diagonal().double().mean())
        wide.diagonal().add_(DAMPING)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(wide))
        return torch.linalg.cholesky(inverse, upper=True).float()

    def directly() -> Tensor | None:
        return feedback_of(gram, channels, torch.device("cpu"))[1]

    yield Stage("the factor for feedback, of down", from_inverse, directly)
    yield Stage(
        "hidden states to disk, checked and back",
        lambda: _there_and_back(folder / "states", x, torch.float32),
        lambda: _there_and_back(folder / "states", x, torch.bfloat16),
    )


def _rows(path: Path, values: Tensor) -> Rows:
    array = Rows(path.with_suffix(".partial"), *values.shape)
    array.allocate()
    array.write(slice(0, len(values)), values)
    array.publish(path)
    return Rows(path, *values.shape)


def _there_and_back(path: Path, values: Tensor, dtype: torch.dtype) -> Tensor:
    array = Rows(path.with_suffix(".partial"), *values.shape, dtype)
    array.allocate()
    array.write(slice(0, len(values)), values)
    array.publish(path)
    found = Rows(path, *values.shape, dtype)
    assert found.whole()
    return found.read(slice(0, len(values)))


def timed(stage: Stage, times: int) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {"before": [], "now": []}
    for _ in range(times):
        for name, run in (("before", stage.before), ("now", stage.now)):
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    ratios = [before / now for before, now in zip(seconds["before"], seconds["now"], strict=True)]
    return {"stage": stage.name, **seconds, "ratio": statistics.median(ratios)}


def table(found: list[dict[str, Any]]) -> str:
    lines = ["| stage | before | now | before over now |", "|---|---:|---:|---:|"]
    for row in found:
        before, now = (statistics.median(row[name]) for name in ("before", "now"))
        lines.append(f"| {row['stage']} | {before:.2f} s | {now:.2f} s | {row['ratio']:.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=14336)
    parser.add_argument("--rows", type=int, default=2048, help="routed to the expert")
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="the table into docs/performance.md")
    options = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for stage in stages(options.hidden, options.intermediate, options.rows, Path(folder)):
            found.append(timed(stage, options.times))
            print(table(found).splitlines()[-1], flush=True)
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    shape = {"hidden": options.hidden, "intermediate": options.intermediate, "rows": options.rows}
    write_file(RESULTS, json.dumps({**shape, "threads": torch.get_num_threads(), "stages": found}, indent=1) + "\n")
    if options.write:
        put_tables(PAGE, {"stages": table(found)})
    print(f"written to {os.path.relpath(RESULTS)}")


if __name__ == "__main__":
    main()
