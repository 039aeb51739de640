"""`make compare-tables`: all methods and baselines on the three models, as tables in docs/comparison.md.

Needs the models and texts of ../shared, which a clone does not have. One process with one thread, so that seconds and
memory of one row can be compared with another's. Finished rows and what was written stay in build/compare, so an
interrupted run continues; remove that folder after a change of what is computed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

from places import ROOT, SHARED
from rich.console import Console

from d2moe_vllm.format.kinds import ROLES
from offline.checkpoint.inspect import inspect
from offline.compare.baselines import BASELINES
from offline.compare.comparison import compare
from offline.compare.settings import Settings
from offline.compare.table import cells, footnotes, has_figures, heads, remark
from offline.io.shards import write_file
from offline.methods import METHODS
from offline.source.text import as_text

sys.path.insert(0, str(ROOT / "examples"))
import language_reference

PAGE = ROOT / "docs" / "comparison.md"
FOLDER = ROOT / "build" / "compare"
MODELS = ("tiny-mixtral", "tiny-mixtral-scratch", "small-mixtral")
RATIOS = (0.2, 0.4, 0.6)
CHARACTERS = 400_000
"""Of the text that nothing was trained on: 0.5 % of its perplexity lie between this part and the whole."""
CLOSER = 0.4
"""The ratio whose checkpoints are looked into."""


def write_texts(folder: Path) -> list[Path]:
    """Encyclopedia, Python's documentation (the held-out topics), and Python source code: argparse of the standard
    library. The last two differ between Python versions."""
    folder.mkdir(parents=True, exist_ok=True)
    contents = {
        "wikitext2-valid.txt": (SHARED / "data" / "wikitext2-valid.txt").read_text(encoding="utf-8")[:CHARACTERS],
        "held-out.txt": language_reference.split()[1],
        "argparse.py": Path(argparse.__file__).read_text(encoding="utf-8"),
    }
    for name, content in contents.items():
        (folder / name).write_text(content, encoding="utf-8")
    return [folder / name for name in contents]


def measure(model: str, texts: list[Path]) -> dict[str, Any]:
    """What `d2moe compare --keep --json` gives; rows that are known are not computed again."""
    settings = Settings(
        source=str(SHARED / "models" / model),
        methods=list(METHODS),
        baselines=BASELINES,
        ratios=RATIOS,
        texts=texts,
        calibration=as_text(SHARED / "data" / "calib.txt"),
        workdir=FOLDER / model,
        windows=128,
        seq_len=256,
        keep=True,
    )
    found = compare(settings, Console(stderr=True))
    write_file(FOLDER / f"{model}.json", json.dumps(found, indent=1) + "\n")
    return found


def rows_table(content: dict[str, Any]) -> str:
    """The table of `compare`, the processor's seconds for the clock's; the lowest perplexity of each ratio in bold."""
    titles = heads(content)
    shown = ["CPU time" if title == "time" else title for title in titles]
    lines = [f"| {' | '.join(shown)} |", "|---|" + "---:|" * (len(titles) - 1)]
    texts = [text["name"] for text in content["texts"]]
    for row in content["rows"]:
        found = dict(zip(titles, cells(row, content), strict=True))
        found["time"] = "" if row["cpu_seconds"] is None else f"{row['cpu_seconds']:.0f} s"
        beside = [one for one in content["rows"] if one["ratio"] == row["ratio"] and one["perplexity"]]
        for text in texts if row["perplexity"] and row["kind"] != "source" else ():
            if row["perplexity"][text] == min(one["perplexity"][text] for one in beside):
                found[text] = f"**{found[text]}**"
        if not has_figures(row):
            found["removed"] = remark(row)
        found[""] = f"`{row['name']}`"
        lines.append(f"| {' | '.join(found.values())} |")
    return "\n".join([*lines, "", *(f"\\{line}" for line in footnotes(content))])


def fits_table(contents: dict[str, dict[str, Any]]) -> str:
    """MoBE's fits: relative error of the start, the whitened decomposition of the same bytes, and at the end."""
    layers = max(len(_fits(row)) for content in contents.values() for row in _mobe(content))
    lines = [
        f"| model, ratio, projection | {' | '.join(f'layer {number}' for number in range(layers))} |",
        "|---|" + "---:|" * layers,
    ]
    worse: list[str] = []
    for model, content in contents.items():
        for row in _mobe(content):
            fits = _fits(row)
            for role in ("gate", "up"):
                where = f"{model} {100 * row['ratio']:.0f} % {role}"
                pairs = [(fit[role]["start_error"], fit[role]["error"]) for fit in fits.values()]
                beside = zip(fits, pairs, strict=True)
                worse += [f"{where}, layer {number}" for number, (start, end) in beside if end >= start]
                found = [f"{start:.4f} → {end:.4f}" for start, end in pairs] + [""] * (layers - len(pairs))
                lines.append(f"| {where} | {' | '.join(found)} |")
    verdict = f"Not below its start: {'; '.join(worse)}." if worse else "Every fit ends below its start."
    return "\n".join([*lines, "", verdict])


def _mobe(content: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in content["rows"] if row["name"] == "mobe" and has_figures(row)]


def _fits(row: dict[str, Any]) -> dict[str, Any]:
    layers = json.loads((Path(row["path"]) / "d2moe_stats.json").read_text(encoding="utf-8"))["layers"]
    return {number: layer["fit"] for number, layer in layers.items()}


def inside_table(contents: dict[str, dict[str, Any]]) -> str:
    """What the methods keep at CLOSER: layers with a base, ranks, and the relative error of the experts' weights in the
    metric of their inputs, mean over layers and experts."""
    lines = [
        "| model | method | compressed layers | layers with a base (gate and up / down) | ranks gate, up, down | "
        "error gate | up | down |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for model, content in contents.items():
        for row in content["rows"]:
            if row["ratio"] != CLOSER or not row["path"] or row["name"] not in (*METHODS, "svd"):
                continue
            found = inspect(Path(row["path"]))
            layers, reports = found["layers"], found["statistics"]["layers"]
            bases = (sum(_has_base(layer[role]) for layer in layers.values()) for role in ("gate", "down"))
            ranks = ", ".join(_span([layer[role]["rank"] for layer in layers.values()]) for role in ROLES)
            errors = " | ".join(_mean_error(reports, role) for role in ROLES)
            lines.append(
                f"| {model} | `{row['name']}` | {len(layers)} | {' / '.join(map(str, bases))} | {ranks} | {errors} |"
            )
    return "\n".join(lines)


def _has_base(projection: dict[str, Any]) -> bool:
    return bool(projection["kept_columns"] or projection["base_rank"])


def _span(numbers: list[int]) -> str:
    return str(numbers[0]) if len(set(numbers)) == 1 else f"{min(numbers)}-{max(numbers)}"


def _mean_error(reports: dict[str, Any], role: str) -> str:
    errors = [error for report in reports.values() for error in report["relative_error"][role]]
    return f"{sum(errors) / len(errors):.3f}"


def channels_table(contents: dict[str, dict[str, Any]]) -> str:
    """Which share of its channels each layer keeps, with its poorest and its richest expert."""
    layers = max(len(_kept(row)) for content in contents.values() for row in _channels(content))
    lines = [
        f"| model, ratio | {' | '.join(f'layer {number}' for number in range(layers))} |",
        "|---|" + "---:|" * layers,
    ]
    for model, content in contents.items():
        size = json.loads((SHARED / "models" / model / "config.json").read_text(encoding="utf-8"))["intermediate_size"]
        for row in _channels(content):
            found = []
            for kept in _kept(row):
                mean, least, most = (100 * one / size for one in (sum(kept) / len(kept), min(kept), max(kept)))
                found.append(f"{mean:.0f} % ({least:.0f}-{most:.0f})")
            lines.append(f"| {model} {100 * row['ratio']:.0f} % | {' | '.join(found + [''] * (layers - len(found)))} |")
    return "\n".join(lines)


def _channels(content: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in content["rows"] if row["name"] == "channels" and has_figures(row)]


def _kept(row: dict[str, Any]) -> list[list[int]]:
    return list(json.loads((Path(row["path"]) / "d2moe_baseline.json").read_text(encoding="utf-8"))["layers"].values())


def main() -> None:
    if not SHARED.is_dir():
        raise SystemExit("make compare-tables needs the models and texts of ../shared")
    texts = write_texts(FOLDER / "texts")
    contents = {model: measure(model, texts) for model in MODELS}
    tables = {model: rows_table(content) for model, content in contents.items()}
    tables |= {"fits": fits_table(contents), "inside": inside_table(contents), "channels": channels_table(contents)}
    page = PAGE.read_text(encoding="utf-8")
    for name, content in tables.items():
        start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        before, after = page.split(start)[0], page.split(end)[1]
        page = f"{before}{start}{content}\n{end}{after}"
    write_file(PAGE, page)
    print(f"tables written to {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
