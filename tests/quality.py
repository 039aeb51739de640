"""`make quality`: perplexities of the default recipe, its ablations and a plain SVD, as tables in docs/quality.md.

Needs the models and texts of ../shared, which a clone does not have. Every measurement is kept in
build/quality/results.json, so an interrupted run continues; a change of the code starts afresh.
"""

from __future__ import annotations

import io
import json
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# One thread each, and as many processes as cores: these models are too small to share a core's work.
os.environ["OMP_NUM_THREADS"] = "1"

from compression import ROOT, SHARED
from rich.console import Console
from run_all import code_hash

from d2moe_vllm.checkpoint import Scope
from offline.evaluation import evaluate
from offline.jobs import compress
from offline.progress import Steps
from offline.recipe import Recipe
from offline.shards import write_file

PAGE = ROOT / "docs" / "quality.md"
FOLDER = ROOT / "build" / "quality"
RESULTS = FOLDER / "results.json"
MODELS = ("tiny-mixtral", "tiny-mixtral-scratch")
RATIOS = (0.2, 0.4, 0.6)
CALIBRATION = {"windows": 128, "seq_len": 256}
DEFAULT = "**default**"
RECIPES: dict[str, dict[str, Any]] = {
    DEFAULT: {},
    "mean base": {"base": {"merge": "mean"}},
    "plain SVD": {"delta": {"method": "svd"}},
    "no base pruning": {"base": {"sparsity": 0.0}},
    "unweighted Gram": {"delta": {"gate_weighted": False}},
    "no shrinkage": {"delta": {"shrinkage": 0.0}},
    "mean base + plain SVD": {"base": {"merge": "mean"}, "delta": {"method": "svd"}},
    "no base: whitened SVD of each expert": {"base": {"merge": "none"}},
}


@dataclass(frozen=True)
class Job:
    """One measurement. recipe: None for the dense model; choose: calibrated on 85 % of the calibration text and
    measured on the rest, else measured on the unseen text."""

    model: str
    choose: bool
    ratio: float = 0.0
    recipe: str | None = None
    scope: Scope | None = None

    @property
    def key(self) -> str:
        return json.dumps(asdict(self))

    def measure(self) -> float:
        """Perplexity."""
        source = SHARED / "models" / self.model
        text = FOLDER / "hold-out.txt" if self.choose else SHARED / "data" / "wikitext2-valid.txt"
        if self.recipe is None:
            return _evaluate(source, text, None)
        calibration = FOLDER / "fit.txt" if self.choose else SHARED / "data" / "calib.txt"
        with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
            out = Path(folder) / "model"
            content = {"ratio": self.ratio, "calibration": CALIBRATION, **RECIPES[self.recipe]}
            compress(str(source), out, Recipe.model_validate(content), calibration, console=_silent())
            return _evaluate(out, text, self.scope)


Results = dict[str, float]


def jobs() -> list[Job]:
    """Everything that the page shows."""
    cases = [(model, ratio) for model in MODELS for ratio in RATIOS]
    found = [Job(model, choose) for choose in (True, False) for model in MODELS]
    found += [Job(*c[:1], choose, c[1], name) for choose in (True, False) for name in RECIPES for c in cases]
    return found + [Job(m, False, ratio, DEFAULT, scope) for m, ratio in cases for scope in ("token", "batch")]


def measure_all(code: str) -> Results:
    """Every job's perplexity; what is known already is not measured again."""
    stored = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    known: Results = stored.get(code, {})
    text = (SHARED / "data" / "calib.txt").read_text(encoding="utf-8")
    cut = int(len(text) * 0.85)
    (FOLDER / "fit.txt").write_text(text[:cut], encoding="utf-8")
    (FOLDER / "hold-out.txt").write_text(text[cut:], encoding="utf-8")
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        waiting = {pool.submit(job.measure): job for job in jobs() if job.key not in known}
        for count, done in enumerate(as_completed(waiting), start=1):
            known[waiting[done].key] = done.result()
            write_file(RESULTS, json.dumps({code: known}, indent=1))
            print(f"{count}/{len(waiting)} {waiting[done].key}: {done.result():.3f}", file=sys.stderr, flush=True)
    return known


def _evaluate(folder: Path, text: Path, scope: Scope | None) -> float:
    return evaluate(str(folder), text, 256, scope, lambda total: Steps(total, _silent())).perplexity


def _silent() -> Console:
    return Console(file=io.StringIO())


def table(results: Results, *, choose: bool) -> str:
    head = [f"{model} {100 * ratio:.0f} %" for model in MODELS for ratio in RATIOS]
    lines = ["| recipe | " + " | ".join(head) + " |", "|---|" + "---:|" * len(head)]
    rows = {name: [results[Job(m, choose, ratio, name).key] for m in MODELS for ratio in RATIOS] for name in RECIPES}
    best = [min(values) for values in zip(*rows.values(), strict=True)]
    for name, values in rows.items():
        cells = [f"**{v:.2f}**" if v == b else f"{v:.2f}" for v, b in zip(values, best, strict=True)]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    dense = ", ".join(f"{model} {results[Job(model, choose).key]:.2f}" for model in MODELS)
    return "\n".join([*lines, "", f"Uncompressed: {dense}."])


def scopes(results: Results) -> str:
    lines = ["| model, ratio | off | token | batch |", "|---|---:|---:|---:|"]
    for model in MODELS:
        for ratio in RATIOS:
            values = [results[Job(model, False, ratio, DEFAULT, scope).key] for scope in (None, "token", "batch")]
            lines.append(f"| {model} {100 * ratio:.0f} % | " + " | ".join(f"{v:.2f}" for v in values) + " |")
    return "\n".join(lines)


def main() -> None:
    if not SHARED.is_dir():
        raise SystemExit("make quality needs the models and texts of ../shared")
    FOLDER.mkdir(parents=True, exist_ok=True)
    results = measure_all(code_hash())
    page = PAGE.read_text(encoding="utf-8")
    tables = {
        "hold-out": table(results, choose=True),
        "unseen": table(results, choose=False),
        "scopes": scopes(results),
    }
    for name, content in tables.items():
        start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        before, after = page.split(start)[0], page.split(end)[1]
        page = f"{before}{start}{content}\n{end}{after}"
    PAGE.write_text(page, encoding="utf-8")
    print(f"tables written to {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
