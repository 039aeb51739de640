"""`make calibration-tokens`: what the default loses over the number of tokens it is calibrated on, and with products in
bfloat16, in docs/quality.md.

Needs the models and texts of ../shared. What counts is how many rows an expert sees for each of its widest matrix's
inputs, by which models of other sizes can be judged. Results: build/calibration, kept as those of `make frontier` are.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# One thread each, and as many processes as cores: these models are too small to share a core's work.
os.environ["OMP_NUM_THREADS"] = "1"

from measuring import measure_all, perplexity, put_tables, silent
from places import ROOT, SHARED, code_hash

from offline.algebra.products import Products, has_bfloat16
from offline.plan.recipe import Recipe
from offline.run.compress import compress
from offline.source.dense import open_dense
from offline.source.text import as_text

PAGE = ROOT / "docs" / "quality.md"
FOLDER = ROOT / "build" / "calibration"
TEXT, CALIBRATION = (SHARED / "data" / name for name in ("wikitext2-valid.txt", "calib.txt"))
MODELS = ("tiny-mixtral", "tiny-mixtral-scratch")
RATIOS = (0.525, 0.611)
"""A quarter and a seventh of the experts' bytes: with nearly all channels, and without many."""
PRODUCTS: Sequence[Products] = ("float32", "bfloat16")
WINDOWS: Mapping[int, int] = {2: 3, 4: 3, 8: 3, 16: 2, 32: 2, 64: 1, 128: 1, 256: 1}
"""Windows of LENGTH tokens -> draws of them, whose mean is told: few windows may be any."""
LENGTH = 256
USUAL = 128
"""Windows, as by default."""
TRIED = (0.4, 0.525, 0.57, 0.611)
"""Ratios at which products are compared: from 43 to 14 % of the experts' bytes."""


@dataclass(frozen=True)
class Job:
    """One compression and its perplexity; windows: 0 for the dense model."""

    model: str
    ratio: float = 0.0
    windows: int = 0
    seed: int = 0
    products: Products = "float32"

    @property
    def key(self) -> str:
        return json.dumps([self.model, self.ratio, self.windows, self.seed, self.products])

    def measure(self) -> float:
        source = SHARED / "models" / self.model
        if not self.windows:
            return perplexity(source, TEXT)
        calibration = {"windows": self.windows, "seq_len": LENGTH, "seed": self.seed, "products": self.products}
        recipe = Recipe.model_validate({"ratio": self.ratio, "calibration": calibration})
        with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
            compress(str(source), Path(folder) / "model", recipe, as_text(CALIBRATION), console=silent())
            return perplexity(Path(folder) / "model", TEXT)


def product_jobs(models: Sequence[str]) -> list[Job]:
    return [Job(model, ratio, USUAL, 0, how) for ratio in TRIED for model in models for how in PRODUCTS]


def token_jobs(models: Sequence[str]) -> list[Job]:
    found = [
        Job(model, ratio, windows, seed)
        for windows, draws in WINDOWS.items()
        for model in models
        for ratio in RATIOS
        for seed in range(draws)
    ]
    return [*(Job(model) for model in models), *found]


def rows_for_each_input(model: str, windows: int) -> float:
    """That an expert sees on average, of the widest matrix's inputs."""
    return open_dense(str(SHARED / "models" / model)).shape.rows_for_each_input(windows * LENGTH)


def table(models: Sequence[str], results: Mapping[str, Any]) -> str:
    columns = [(model, ratio) for model in models for ratio in RATIOS]
    lines = [
        f"| windows of {LENGTH} tokens | rows of an expert for each input | "
        + " | ".join(f"{model}, {ratio:g}" for model, ratio in columns)
        + " |",
        "|---:|---:|" + "---:|" * len(columns),
    ]
    for windows, draws in WINDOWS.items():
        cells = []
        for model, ratio in columns:
            found = [results[Job(model, ratio, windows, seed).key] for seed in range(draws)]
            loss = statistics.fmean(found) / results[Job(model).key] - 1
            spread = f" ± {100 * (max(found) - min(found)) / 2 / results[Job(model).key]:.1f}" if draws > 1 else ""
            cells.append(f"{100 * loss:+.1f}{spread} %")
        lines.append(f"| {windows} | {rows_for_each_input(models[0], windows):g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def products_table(models: Sequence[str], results: Mapping[str, Any]) -> str:
    lines = [
        "| model | " + " | ".join(f"{ratio:g}" for ratio in TRIED) + " |",
        "|---|" + "---:|" * len(TRIED),
    ]
    for model in models:
        cells = []
        for ratio in TRIED:
            usual, tried = (results[Job(model, ratio, USUAL, 0, how).key] for how in PRODUCTS)
            cells.append(f"{usual:.2f} → {tried:.2f} ({100 * (tried / usual - 1):+.2f} %)")
        lines.append(f"| `{model}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--products", action="store_true", help="only what products in bfloat16 cost")
    only.add_argument("--tokens", action="store_true", help="only the loss over the number of tokens")
    parser.add_argument("--processes", type=int, help="at a time; as many as there are cores by default")
    options = parser.parse_args()
    if not SHARED.is_dir():
        raise SystemExit("make calibration-tokens needs the models and texts of ../shared")
    if not options.tokens and not has_bfloat16():
        # It would compute in float32, and the table say that rounding costs nothing.
        raise SystemExit("this processor multiplies no bfloat16, whose cost is to be measured: give --tokens")
    FOLDER.mkdir(parents=True, exist_ok=True)
    code = code_hash(["d2moe_vllm", "offline"])
    wanted = [] if options.tokens else product_jobs(options.models)
    wanted += [] if options.products else token_jobs(options.models)
    results = measure_all(list(dict.fromkeys(wanted)), FOLDER / "results.json", code, options.processes)
    found = {}
    if not options.tokens:
        found["calibration-products"] = products_table(options.models, results)
    if not options.products:
        found["calibration-tokens"] = table(options.models, results)
    if options.models != list(MODELS):
        print("\n\n".join(found.values()))
        return
    put_tables(PAGE, found)
    print(f"table written to {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
