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
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from compression import ROOT, SHARED
from rich.console import Console
from run_all import code_hash

from offline.evaluation import evaluate
from offline.jobs import compress
from offline.progress import Steps
from offline.recipe import Recipe

PAGE = ROOT / "docs" / "quality.md"
RESULTS = ROOT / "build" / "quality" / "results.json"
MODELS = ("tiny-mixtral", "tiny-mixtral-scratch")
RATIOS = (0.2, 0.4, 0.6)
CALIBRATION = {"windows": 128, "seq_len": 256}
RECIPES: dict[str, dict[str, Any]] = {
    "**default**": {},
    "mean base": {"base": {"merge": "mean"}},
    "plain SVD": {"delta": {"method": "svd"}},
    "no base pruning": {"base": {"sparsity": 0.0}},
    "unweighted Gram": {"delta": {"gate_weighted": False}},
    "no shrinkage": {"delta": {"shrinkage": 0.0}},
    "mean base + plain SVD": {"base": {"merge": "mean"}, "delta": {"method": "svd"}},
    "no base: whitened SVD of each expert": {"base": {"merge": "none"}},
}


class Quality:
    """Measures each thing once."""

    def __init__(self) -> None:
        self._code = code_hash()
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        stored = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        self._known: dict[str, float] = stored.get(self._code, {})
        text = (SHARED / "data" / "calib.txt").read_text(encoding="utf-8")
        cut = int(len(text) * 0.85)
        self.fit, self.hold_out = RESULTS.parent / "fit.txt", RESULTS.parent / "hold-out.txt"
        self.fit.write_text(text[:cut], encoding="utf-8")
        self.hold_out.write_text(text[cut:], encoding="utf-8")
        self.all, self.unseen = SHARED / "data" / "calib.txt", SHARED / "data" / "wikitext2-valid.txt"

    def dense(self, model: str, text: Path) -> float:
        return self._once(f"{model} dense {text.name}", lambda: self._evaluate(SHARED / "models" / model, text, None))

    def compressed(self, model: str, ratio: float, recipe: dict[str, Any], scope: Any = None, *, choose: bool) -> float:
        """choose: calibrated on 85 % of the calibration text, measured on the rest; else on the unseen text."""
        calibration, text = (self.fit, self.hold_out) if choose else (self.all, self.unseen)
        key = f"{model} {ratio} {json.dumps(recipe)} {scope} {text.name}"

        def measure() -> float:
            with tempfile.TemporaryDirectory(dir=RESULTS.parent) as folder:
                out = Path(folder) / "model"
                settings = Recipe.model_validate({"ratio": ratio, "calibration": CALIBRATION, **recipe})
                compress(str(SHARED / "models" / model), out, settings, calibration, console=_silent())
                return self._evaluate(out, text, scope)

        return self._once(key, measure)

    def _evaluate(self, folder: Path, text: Path, scope: Any) -> float:
        return evaluate(str(folder), text, 256, scope, lambda total: Steps(total, _silent())).perplexity

    def _once(self, key: str, measure: Any) -> float:
        if key not in self._known:
            self._known[key] = measure()
            RESULTS.write_text(json.dumps({self._code: self._known}, indent=1))
            print(f"{key}: {self._known[key]:.3f}", file=sys.stderr, flush=True)
        return self._known[key]


def _silent() -> Console:
    return Console(file=io.StringIO())


def table(quality: Quality, *, choose: bool) -> str:
    text = quality.hold_out if choose else quality.unseen
    head = [f"{model} {100 * ratio:.0f} %" for model in MODELS for ratio in RATIOS]
    lines = ["| recipe | " + " | ".join(head) + " |", "|---|" + "---:|" * len(head)]
    rows = {
        name: [quality.compressed(m, ratio, recipe, choose=choose) for m in MODELS for ratio in RATIOS]
        for name, recipe in RECIPES.items()
    }
    best = [min(values) for values in zip(*rows.values(), strict=True)]
    for name, values in rows.items():
        cells = [f"**{v:.2f}**" if v == b else f"{v:.2f}" for v, b in zip(values, best, strict=True)]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    dense = ", ".join(f"{model} {quality.dense(model, text):.2f}" for model in MODELS)
    return "\n".join([*lines, "", f"Uncompressed: {dense}."])


def scopes(quality: Quality) -> str:
    lines = ["| model, ratio | off | token | batch |", "|---|---:|---:|---:|"]
    for model in MODELS:
        for ratio in RATIOS:
            values = [quality.compressed(model, ratio, {}, s, choose=False) for s in (None, "token", "batch")]
            lines.append(f"| {model} {100 * ratio:.0f} % | " + " | ".join(f"{v:.2f}" for v in values) + " |")
    return "\n".join(lines)


def main() -> None:
    if not SHARED.is_dir():
        raise SystemExit("make quality needs the models and texts of ../shared")
    quality = Quality()
    page = PAGE.read_text(encoding="utf-8")
    for name, content in [
        ("hold-out", lambda: table(quality, choose=True)),
        ("unseen", lambda: table(quality, choose=False)),
        ("scopes", lambda: scopes(quality)),
    ]:
        start, end = f"<!-- {name} -->\n", f"\n<!-- /{name} -->"
        before, after = page.split(start)[0], page.split(end)[1]
        page = before + start + content() + end + after
    PAGE.write_text(page, encoding="utf-8")
    print(f"tables written to {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
