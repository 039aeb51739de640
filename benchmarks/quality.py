"""`make quality`: perplexities of the default recipe, its ablations and a plain SVD, as tables in docs/quality.md.

Needs the models and texts of ../shared, which a clone does not have. Every measurement is kept in
build/quality/results.json, so an interrupted run continues; a change of the code starts afresh.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# One thread each, and as many processes as cores: these models are too small to share a core's work.
os.environ["OMP_NUM_THREADS"] = "1"

from measuring import measure_all, perplexity, put_tables, silent
from places import ROOT, SHARED, code_hash

from d2moe_vllm.format.config import Scope
from offline.plan.recipe import Recipe
from offline.run.compress import compress
from offline.source.text import as_text

PAGE = ROOT / "docs" / "quality.md"
FOLDER = ROOT / "build" / "quality"
RESULTS = FOLDER / "results.json"
MODELS = ("tiny-mixtral", "tiny-mixtral-scratch", "small-mixtral")
ABLATED = MODELS[:2]
"""Models that every recipe is measured on; the third one, five times as large, sees two, at 40 %."""
RATIOS = (0.2, 0.4, 0.6)
CASES = [(model, ratio) for model in ABLATED for ratio in RATIOS]
"""Model and ratio of the main tables' columns."""
CALIBRATION = {"windows": 128, "seq_len": 256}
DEFAULT = "**default**"
UNIFORM: dict[str, Any] = {"allocation": "uniform", "base": {"kind": "semi-dynamic"}}
MAIN: dict[str, dict[str, Any]] = {
    DEFAULT: {},
    "adaptive, a pruned base everywhere": {"base": {"kind": "semi-dynamic"}},
    "adaptive, a full base everywhere": {"base": {"kind": "semi-dynamic", "sparsity": 0.0}},
    "adaptive, no base": {"base": {"kind": "none"}},
    "uniform ranks, a pruned base (the paper's)": UNIFORM,
    "mean base + plain SVD, uniform": {**UNIFORM, "base": {"kind": "semi-dynamic", "merge": "mean"},
                                       "delta": {"method": "svd"}},
}  # fmt: skip
"""Measured in all of CASES."""


def _one(section: str, **values: Any) -> dict[str, Any]:
    return {**UNIFORM, section: {**UNIFORM.get(section, {}), **values}}


OPTIONS: dict[str, dict[str, Any]] = {
    "uniform ranks, a pruned base (the paper's)": UNIFORM,
    "merge: mean": _one("base", merge="mean"),
    "merge: frequency": _one("base", merge="frequency"),
    "merge: regmean": _one("base", merge="regmean"),
    "merge: ties": _one("base", merge="ties"),
    "base: static": _one("base", kind="static"),
    "base: svd": _one("base", kind="svd"),
    "base: none": _one("base", kind="none"),
    "base: full (sparsity 0)": _one("base", sparsity=0.0),
    "delta: svd": _one("delta", method="svd"),
    "delta: asvd": _one("delta", method="asvd"),
    "delta: prune": _one("delta", method="prune"),
    "Gram not gate-weighted": _one("delta", gate_weighted=False),
    "no shrinkage": _one("delta", shrinkage=0.0),
    "shrinkage 1": _one("delta", shrinkage=1.0),
    "calibrated on compressed inputs": _one("calibration", inputs="compressed"),
    "trim 2 of 8 experts": _one("delta", trim=2),
    "share_v": _one("delta", share_v=True),
    "distinct_u 4": _one("delta", distinct_u=4),
    "share_v, distinct_u 4": _one("delta", share_v=True, distinct_u=4),
    "adaptive ranks": {"allocation": "adaptive", "base": {"kind": "semi-dynamic"}},
    "adaptive ranks, base auto": {"allocation": "adaptive", "base": {"kind": "auto"}},
    "adaptive, auto, compressed inputs": {"allocation": "adaptive", "base": {"kind": "auto"},
                                          "calibration": {"inputs": "compressed"}},
}  # fmt: skip
"""Everything that a recipe can choose, one thing changed at a time, at 40 %."""
PAPERS = "uniform ranks, a pruned base (the paper's)"
RECIPES = {**MAIN, **OPTIONS}


@dataclass(frozen=True)
class Job:
    """One compression, calibrated on 85 % of the calibration text and measured on the rest (hold-out) and on the
    unseen text. recipe: None for the dense model; scopes: of dynamic selection, None for the checkpoint's own;
    unseen: whether that text, which takes most of the time, is measured too."""

    model: str
    ratio: float = 0.0
    recipe: str | None = None
    scopes: tuple[Scope | None, ...] = (None,)
    unseen: bool = False

    @property
    def key(self) -> str:
        return json.dumps([self.model, self.ratio, self.recipe and RECIPES[self.recipe], self.scopes, self.unseen])

    def measure(self) -> list[list[float]]:
        """Perplexities: per scope and text."""
        source = SHARED / "models" / self.model
        if self.recipe is None:
            return [_evaluate(source, None, self.unseen)]
        with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
            out = Path(folder) / "model"
            recipe = RECIPES[self.recipe]
            content = {
                "ratio": self.ratio,
                "bits": 16,
                **recipe,
                "calibration": CALIBRATION | recipe.get("calibration", {}),
            }
            compress(str(source), out, Recipe.model_validate(content), as_text(FOLDER / "fit.txt"), console=silent())
            return [_evaluate(out, scope, self.unseen) for scope in self.scopes]


Results = dict[str, list[list[float]]]
SCOPES: tuple[Scope | None, ...] = (None, "token", "batch")


def _dense(model: str) -> Job:
    return Job(model, unseen=True)


def _main(model: str, ratio: float, name: str) -> Job:
    return Job(model, ratio, name, unseen=True)


def jobs() -> list[Job]:
    """Everything that the page shows, what matters most first."""
    found = [_dense(model) for model in MODELS]
    found += [_main(*case, name) for name in MAIN for case in CASES]
    found += [_main(MODELS[2], 0.4, name) for name in (DEFAULT, PAPERS)]
    found += [Job(model, 0.4, name) for name in OPTIONS for model in ABLATED]
    found += [Job(model, ratio, PAPERS, SCOPES) for model in ABLATED for ratio in RATIOS]
    unique = {job.key: job for job in found}
    return list(unique.values())


def write_texts() -> None:
    """The calibration text in two: what is fitted on, and what is held out."""
    text = (SHARED / "data" / "calib.txt").read_text(encoding="utf-8")
    cut = int(len(text) * 0.85)
    (FOLDER / "fit.txt").write_text(text[:cut], encoding="utf-8")
    (FOLDER / "hold-out.txt").write_text(text[cut:], encoding="utf-8")


def _evaluate(folder: Path, scope: Scope | None, unseen: bool) -> list[float]:
    texts = [FOLDER / "hold-out.txt", *([SHARED / "data" / "wikitext2-valid.txt"] if unseen else [])]
    return [perplexity(folder, text, scope=scope) for text in texts]


def main_table(results: Results, text: int) -> str:
    """The main recipes on every model and ratio; the best of each column in bold."""
    lines = _head("recipe", [f"{model} {100 * ratio:.0f} %" for model, ratio in CASES])
    rows = {name: [results[_main(*column, name).key][0][text] for column in CASES] for name in MAIN}
    best = [min(values) for values in zip(*rows.values(), strict=True)]
    for name, values in rows.items():
        cells = [f"**{v:.2f}**" if v == b else f"{v:.2f}" for v, b in zip(values, best, strict=True)]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    dense = ", ".join(f"{model} {results[_dense(model).key][0][text]:.2f}" for model in MODELS)
    third = [results[_main(MODELS[2], 0.4, name).key][0][text] for name in (DEFAULT, PAPERS)]
    larger = f"{MODELS[2]} at 40 %: default {third[0]:.2f}, uniform ranks and a pruned base {third[1]:.2f}."
    return "\n".join([*lines, "", f"Uncompressed: {dense}.", "", larger])


def options_table(results: Results) -> str:
    """One thing changed at a time: perplexity, and the change against the first row."""
    lines = _head("recipe", [f"{model} 40 %" for model in ABLATED])
    first: list[float] = []
    for name in OPTIONS:
        values = [results[Job(model, 0.4, name).key][0][0] for model in ABLATED]
        first = first or values
        cells = [
            f"{v:.2f} ({100 * (v / f - 1):+.1f} %)" if v is not f else f"{v:.2f}"
            for v, f in zip(values, first, strict=True)
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _head(first: str, columns: list[str]) -> list[str]:
    return [f"| {first} | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]


def scopes(results: Results) -> str:
    lines = _head("model, ratio", ["off", "token", "batch"])
    for model in ABLATED:
        for ratio in RATIOS:
            values = [found[0] for found in results[Job(model, ratio, PAPERS, SCOPES).key]]
            lines.append(f"| {model} {100 * ratio:.0f} % | " + " | ".join(f"{v:.2f}" for v in values) + " |")
    return "\n".join(lines)


def main() -> None:
    if not SHARED.is_dir():
        raise SystemExit("make quality needs the models and texts of ../shared")
    FOLDER.mkdir(parents=True, exist_ok=True)
    write_texts()
    results = measure_all(jobs(), RESULTS, code_hash())
    tables = {
        "hold-out": main_table(results, 0),
        "unseen": main_table(results, 1),
        "options": options_table(results),
        "scopes": scopes(results),
    }
    put_tables(PAGE, tables)
    print(f"tables written to {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
