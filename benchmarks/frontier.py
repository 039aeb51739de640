"""`make frontier`: the default at many sizes, beside the best that one setting for all layers gives at that size, and
beside version 1's default; tables in docs/quality.md.

Needs the models and texts of ../shared, which a clone does not have. Every measurement is kept in
build/frontier/results.json, so an interrupted run continues; a change of the code that compresses starts afresh.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# One thread each, and as many processes as cores: these models are too small to share a core's work.
os.environ["OMP_NUM_THREADS"] = "1"

from measuring import measure_all, perplexity, put_tables, silent
from places import ROOT, SHARED, code_hash

from d2moe_vllm.format.files import read_config
from d2moe_vllm.format.words import describe
from offline.compare.frontier import Point, perplexity_at
from offline.errors import UnreachableError
from offline.io.shards import Reader
from offline.plan.recipe import Recipe
from offline.run.compress import compress
from offline.source.text import as_text

PAGE = ROOT / "docs" / "quality.md"
FOLDER = ROOT / "build" / "frontier"
CODE = ("d2moe_vllm", "offline")
"""What decides over a result."""
SIZES: Mapping[str, Sequence[float]] = {
    "tiny-mixtral": (0.347, 0.525, 0.57, 0.591, 0.611, 0.615, 0.631, 0.635, 0.646, 0.655, 0.664, 0.67),
    "tiny-mixtral-scratch": (0.347, 0.525, 0.57, 0.591, 0.611, 0.615, 0.631, 0.635, 0.646, 0.655, 0.664, 0.67),
    "small-mixtral": (0.625, 0.679, 0.703, 0.732, 0.779, 0.791, 0.797),
}
"""Model -> ratios, by which the experts keep from half to a fifteenth of their bytes."""
LESS = (0.2, 0.4, 0.6)
"""Ratios at which version 1's default was measured."""
ONE_SETTING: Mapping[str, Sequence[tuple[float, float]]] = {
    "tiny-mixtral": (
        (51.6, 66.97), (26.6, 67.44), (20.3, 68.55), (17.4, 68.32), (14.6, 68.99), (14.1, 73.71), (11.8, 71.18),
        (11.3, 75.13), (9.7, 77.06), (8.5, 78.09), (7.2, 83.94), (6.4, 86.64),
    ),
    "small-mixtral": (
        (50.0, 72.82), (26.6, 72.55), (20.3, 72.88), (14.1, 74.00), (17.4, 74.28), (8.5, 74.81), (7.2, 74.25),
        (6.4, 75.46),
    ),
}  # fmt: skip
"""Model -> (share of the experts' bytes left, perplexity) of one setting for all layers: bits, channels by one global
ranking with the rest refitted, some with a 4-bit base. Measured in memory, independently of this code."""
UNMEASURED = "tiny-mixtral-scratch"
"""The model of which there are no such figures."""
SETTINGS: Mapping[str, tuple[int, Sequence[float]]] = {
    "16 bits": (16, (0.2, 0.347)),
    "8 bits": (8, (0.347, 0.525)),
    "4 bits": (4, (0.525, 0.57, 0.611)),
    "3 bits": (3, (0.57, 0.611, 0.635, 0.664)),
    "2 bits": (2, (0.615, 0.631, 0.646, 0.67)),
}
"""Name -> bits and ratios at which they are measured on it by this code: all layers with these bits, no base, and
as many channels as there is room for."""
TEXT = SHARED / "data" / "wikitext2-valid.txt"
CALIBRATION = SHARED / "data" / "calib.txt"
DEFAULT = "default"
VERSION_1 = "bits 16"


@dataclass(frozen=True)
class Job:
    """One compression and its perplexity; setting: DEFAULT, VERSION_1 or one of SETTINGS; None for the dense model."""

    model: str
    ratio: float = 0.0
    setting: str | None = None

    @property
    def key(self) -> str:
        return json.dumps([self.model, self.ratio, self.setting])

    def measure(self) -> dict[str, Any]:
        """left: share of the experts' bytes; nothing where the ratio cannot be reached."""
        source = SHARED / "models" / self.model
        if self.setting is None:
            return {"left": 1.0, "perplexity": perplexity(source, TEXT), "stores": "", "removed": 0.0}
        own: dict[str, Any] = {}
        if self.setting == VERSION_1:
            own = {"bits": 16}
        elif self.setting != DEFAULT:
            own = {"bits": SETTINGS[self.setting][0], "delta": {"method": "dense"}, "base": {"kind": "none"}}
        recipe = Recipe.model_validate({"ratio": self.ratio, "calibration": {"windows": 128, "seq_len": 256}, **own})
        with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
            out = Path(folder) / "model"
            try:
                compress(str(source), out, recipe, as_text(CALIBRATION), console=silent())
            except UnreachableError:
                return {}
            config = read_config(out)
            return {
                "left": config.expert_bytes / (config.layer_bytes * len(config.layers)),
                "perplexity": perplexity(out, TEXT),
                "stores": describe(config),
                "removed": 1 - Reader(out).nbytes / config.source.bytes,
            }


Results = Mapping[str, dict[str, Any]]


def jobs(models: Sequence[str]) -> list[Job]:
    """What matters most first."""
    found = [Job(model) for model in models]
    found += [Job(model, ratio, DEFAULT) for model in models for ratio in SIZES[model]]
    found += [Job(model, ratio, setting) for model in models for ratio in LESS for setting in (DEFAULT, VERSION_1)]
    if UNMEASURED in models:
        found += [Job(UNMEASURED, ratio, name) for name, (_, ratios) in SETTINGS.items() for ratio in ratios]
    return found


def best_setting(found: Sequence[Point], share: float) -> float | None:
    """What one setting gives at a size, at its best: on the lower hull of its rows, in the logarithms of perplexity and
    bytes; the largest row's above them, None below the smallest. Between neighbouring rows alone a size that few
    settings hit would look worse than it is."""
    hull: list[Point] = []
    for one in sorted(found, key=lambda one: (one.share, one.perplexity)):
        while len(hull) > 1 and not _bends_up(hull[-2], hull[-1], one):
            hull.pop()
        if not hull or one.perplexity < hull[-1].perplexity:
            hull.append(one)
    return hull[-1].perplexity if hull and share > hull[-1].share else perplexity_at(hull, share)


def _bends_up(first: Point, second: Point, third: Point) -> bool:
    """Whether the line through the three is convex at the second."""
    at = perplexity_at([first, third], second.share)
    return at is None or second.perplexity < at


def points_of(model: str, results: Results) -> list[Point]:
    """Of one setting for all layers: measured elsewhere, and by this code."""
    found = [Point("", 0.0, share / 100, value) for share, value in ONE_SETTING.get(model, ())]
    for key, result in results.items():
        name, ratio, setting = json.loads(key)
        if name == model and setting in SETTINGS and result:
            found.append(Point(setting, ratio, result["left"], result["perplexity"]))
    return found


def frontier_table(models: Sequence[str], results: Results) -> str:
    """The default at every size; beside it the best of one setting there."""
    lines = ["| model, `--ratio` | experts' bytes left | perplexity | loss | one setting for all layers, at that size |"
             " the default beside it | stores |", "|---|---:|---:|---:|---:|---:|---|"]  # fmt: skip
    for model in models:
        dense, points = results[Job(model).key]["perplexity"], points_of(model, results)
        for ratio in SIZES[model]:
            found = results[Job(model, ratio, DEFAULT).key]
            value, beside = found["perplexity"], best_setting(points, found["left"])
            change = "" if beside is None else f"{100 * (value / beside - 1):+.1f} %"
            loss, best = 100 * (value / dense - 1), "" if beside is None else f"{beside:.2f}"
            lines.append(
                f"| `{model}`, {ratio:g} | {100 * found['left']:.1f} % | {value:.2f} | {loss:+.1f} % "
                f"| {best} | {change} | {found['stores']} |"
            )
    return "\n".join(lines)


def settings_table(models: Sequence[str], results: Results) -> str:
    """One setting for all layers, by this code: share of the experts' bytes and perplexity."""
    lines = ["| " + " | ".join(SETTINGS) + " |", "|---" * len(SETTINGS) + "|"]
    cells = []
    for name, (_, ratios) in SETTINGS.items() if UNMEASURED in models else ():
        found = (results[Job(UNMEASURED, ratio, name).key] for ratio in ratios)
        cells.append("<br>".join(f"{100 * one['left']:.1f} %: {one['perplexity']:.2f}" for one in found if one))
    return "\n".join([*lines, f"| {' | '.join(cells)} |"])


def version_1_table(models: Sequence[str], results: Results) -> str:
    """Version 1's default, `--bits 16`, beside today's at the same ratio."""
    lines = ["| model, `--ratio` | `--bits 16` | default | experts' bytes left, each |", "|---|---:|---:|---:|"]
    for model in models:
        for ratio in LESS:
            before, now = (results[Job(model, ratio, setting).key] for setting in (VERSION_1, DEFAULT))
            lines.append(
                f"| `{model}`, {ratio:g} | {before['perplexity']:.2f} | {now['perplexity']:.2f} | "
                f"{100 * before['left']:.1f} %, {100 * now['left']:.1f} % |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--processes", type=int, help="at a time; as many as there are cores by default")
    parser.add_argument("--print", action="store_true", help="print the tables, and leave docs/quality.md as it is")
    options = parser.parse_args()
    if not SHARED.is_dir():
        raise SystemExit("make frontier needs the models and texts of ../shared")
    FOLDER.mkdir(parents=True, exist_ok=True)
    results = measure_all(jobs(options.models), FOLDER / "results.json", code_hash(CODE), options.processes)
    tables = {
        "frontier": frontier_table(options.models, results),
        "settings": settings_table(options.models, results),
        "version-1": version_1_table(options.models, results),
    }
    if options.print or options.models != list(SIZES):
        print("\n\n".join(tables.values()))
        return
    put_tables(PAGE, tables)
    print(f"tables written to {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
