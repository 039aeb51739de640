"""`make plan-hours`: arithmetic, not a measurement: what compressing real models would take on other machines, in
docs/performance.md.

The work is counted as `d2moe plan` counts it; how fast a machine does each kind of it is one core's measured rate times
its cores and a share that is lost to memory and to waiting, or what a data sheet says and a share of that.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from measuring import put_tables
from places import ROOT
from real_models import MODELS

from offline.algebra.products import Products
from offline.io.units import durations
from offline.plan.duration import estimate_seconds
from offline.plan.make import first_budget, make_plan
from offline.plan.plan import Plan
from offline.plan.rates import Rates
from offline.plan.recipe import Recipe
from offline.source.dense import open_dense

PAGE = ROOT / "docs" / "performance.md"
CORE = Rates(
    rows=1.5e11, products=1.5e11, factors=4e10, eigen=7e10, columns=1.5e4, numbers=1.5e7, touched=1.1e10, bytes=1.8e9
)
"""One core of a server processor with AVX-512 in float32, as `plan` measured it (Xeon of 2023)."""
AMX = 5e11
"""The same core's products in bfloat16."""


@dataclass(frozen=True)
class Machine:
    """products: of calibration; memory: bytes that a run may take."""

    rates: Rates
    products: Products
    memory: int


def of_cores(cores: int, rows: float, products: Products, memory: int) -> Machine:
    """Products keep three quarters of what cores add up to, factorizations half; what reads and writes memory stops at
    eight cores' worth, the loop over columns and hashing are one thread's."""
    many = replace(
        CORE,
        rows=0.75 * cores * rows,
        products=0.75 * cores * CORE.products,
        factors=0.5 * cores * CORE.factors,
        eigen=0.5 * cores * CORE.eigen,
        numbers=0.5 * cores * CORE.numbers,
        touched=min(cores, 8) * CORE.touched,
    )
    return Machine(many, products, memory)


H100 = Rates(
    rows=2.5e14, products=3.5e13, factors=1.5e13, eigen=1e12, columns=1e4, numbers=1e10, touched=4e11, bytes=1.8e9
)
"""Half of the data sheet's TF32 tensor cores, of its float32, a quarter of its float64, half of its bandwidth; a column
is a dozen kernels of 8 microseconds."""
MACHINES: Mapping[str, Machine] = {
    "16 cores, AVX-512": of_cores(16, CORE.rows, "float32", 128 * 10**9),
    "16 cores, AMX": of_cores(16, AMX, "bfloat16", 128 * 10**9),
    "64 cores, AMX": of_cores(64, AMX, "bfloat16", 512 * 10**9),
    "one H100": Machine(H100, "bfloat16", 80 * 10**9),
}
RATIO = 0.8


def table() -> str:
    heads = "".join(f" {name} |" for name in MACHINES)
    lines = [f"| model, `--ratio {RATIO:g}` |{heads}", "|---|" + "---:|" * len(MACHINES)]
    with tempfile.TemporaryDirectory() as folder:
        for name, write in MODELS.items():
            model = open_dense(str(write(Path(folder) / name)))
            cells, first = [], first_budget(model, Recipe.model_validate({"ratio": RATIO}))
            for machine in MACHINES.values():
                plan = make_plan(model, first.problem.recipe, memory=machine.memory, first=first)
                least, most = estimate_seconds(_with(plan, machine.products), rates=machine.rates)
                cells.append(durations(least, most))
            lines.append(f"| {name}, {model.reader.nbytes / 1e9:.0f} GB | {' | '.join(cells)} |")
    return "\n".join(lines)


def _with(plan: Plan, products: Products) -> Plan:
    return replace(plan, resources=replace(plan.resources, products=products))


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    put_tables(PAGE, {"plan-hours": table()})
    print(f"table written to {os.path.relpath(PAGE)}")


if __name__ == "__main__":
    main()
