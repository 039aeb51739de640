"""`make compare-tables`: all methods and baselines on the three models, as tables and pictures in docs/comparison.md.

Needs the models and texts of ../shared, which a clone does not have. One process with one thread, so that seconds and
memory of one row can be compared with another's. Finished rows and what was written stay in build/compare, so an
interrupted run continues; remove that folder after a change of what is computed. With --models only their sections are
written anew; with --ratios or --baselines what is measured is printed, and docs/comparison.md stays as it is.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

from measuring import put_tables
from places import ROOT, SHARED
from rich.console import Console

from d2moe_vllm.format.files import read_config
from d2moe_vllm.format.kinds import ROLES, width
from d2moe_vllm.format.words import describe
from offline.checkpoint.inspect import inspect
from offline.compare.baselines import BASELINES
from offline.compare.comparison import compare
from offline.compare.frontier import DEFAULT, verdicts
from offline.compare.html import write_page
from offline.compare.picture import panels
from offline.compare.settings import Settings
from offline.compare.table import cells, footnotes, has_figures, heads, remark
from offline.io.shards import write_file
from offline.methods import METHODS
from offline.report.plots import SCREENS, WIDE, svg_file
from offline.source.text import as_text

sys.path.insert(0, str(ROOT / "examples"))
import language_reference

PAGE = ROOT / "docs" / "comparison.md"
FOLDER = ROOT / "build" / "compare"
TINY = (0.2, 0.4, 0.55, 0.6, 0.655, 0.665)
RATIOS: Mapping[str, Sequence[float]] = {
    "tiny-mixtral": TINY,
    "tiny-mixtral-scratch": TINY,
    "small-mixtral": (0.2, 0.4, 0.6, 0.73, 0.795),
}
"""Model -> ratios, at which 50 to 7 % of the experts' bytes are left: experts are 71 % of the tiny models' bytes, and
85 % of small-mixtral's. 8 bits, of which the default has no more, leave 52 %."""
CHARACTERS = 400_000
"""Of the text that nothing was trained on: 0.5 % of its perplexity lie between this part and the whole."""
CLOSER = 0.4
"""The ratio whose checkpoints are looked into."""
WHERE = (0.2, 0.4, 0.6)
"""Ratios at which it is told which channels are left."""


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


def measure(model: str, texts: list[Path], ratios: Sequence[float], baselines: Sequence[str]) -> dict[str, Any]:
    """What `d2moe compare --keep --json` gives, with its page beside it; rows that are known are not computed again."""
    settings = Settings(
        source=str(SHARED / "models" / model),
        methods=list(METHODS),
        baselines=baselines,
        ratios=ratios,
        texts=texts,
        calibration=as_text(SHARED / "data" / "calib.txt"),
        workdir=FOLDER / model,
        windows=128,
        seq_len=256,
        keep=True,
    )
    found = compare(settings, Console(stderr=True))
    write_file(FOLDER / f"{model}.json", json.dumps(found, indent=1) + "\n")
    write_page(FOLDER / f"{model}.html", found)
    return found


def frontier_block(model: str, content: dict[str, Any], folder: Path) -> str:
    """The picture of the first text, which it writes into `folder` for light and dark screens, and how the other rows
    stand to the default's curve."""
    panel, beneath = panels(content)[0]
    for screen in SCREENS:
        write_file(folder / f"frontier-{model}-{screen}.svg", svg_file(panel, screen))
    tag = [
        "<picture>",
        f'  <source media="(prefers-color-scheme: dark)" srcset="frontier-{model}-dark.svg">',
        f'  <img alt="Perplexity over the experts\' bytes that are left, as in the table below" '
        f'src="frontier-{model}-light.svg" width="{WIDE}">',
        "</picture>",
    ]
    return "\n".join([*tag, "", *beneath, *(f"\n{line}" for line in verdicts(content))])


def rows_table(content: dict[str, Any]) -> str:
    """The table of `compare`, the processor's seconds for the clock's, the lowest perplexity of each ratio in bold.
    What cannot be reached is beneath it."""
    titles = heads(content)
    shown = ["CPU time" if title == "time" else title for title in titles]
    lines = [f"| {' | '.join(shown)} |", "|---|" + "---:|" * (len(titles) - 1)]
    texts = [text["name"] for text in content["texts"]]
    beyond: dict[str, str] = {}
    for row in content["rows"]:
        if not has_figures(row) and row["reachable"] is not None:
            beyond.setdefault(row["name"], f"`{row['name']}` {remark(row).split(': ')[1]}")
            continue
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
    notes = [f"\\{line}" for line in footnotes(content)]
    notes += [f"Not reachable by all: {'; '.join(beyond.values())}."] if beyond else []
    return "\n".join([*lines, "", "\n\n".join(notes)])


def fits_table(content: dict[str, Any]) -> str:
    """MoBE's fits: relative error of the start, the whitened decomposition of the same bytes, and at the end."""
    layers = max((len(_fits(row)) for row in _mobe(content)), default=0)
    lines = [
        f"| ratio, projection | {' | '.join(f'layer {number}' for number in range(layers))} |",
        "|---|" + "---:|" * layers,
    ]
    worse: list[str] = []
    for row in _mobe(content):
        fits = _fits(row)
        for role in ("gate", "up"):
            where = f"{100 * row['ratio']:.0f} % {role}"
            pairs = [(fit[role]["start_error"], fit[role]["error"]) for fit in fits.values()]
            beside = zip(fits, pairs, strict=True)
            worse += [f"{where}, layer {number}" for number, (start, end) in beside if end >= start]
            lines.append(f"| {where} | {' | '.join(f'{start:.4f} → {end:.4f}' for start, end in pairs)} |")
    verdict = f"Not below its start: {'; '.join(worse)}." if worse else "Every fit ends below its start."
    return "\n".join([*lines, "", verdict])


def _mobe(content: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in content["rows"] if row["name"] == "mobe" and has_figures(row)]


def _fits(row: dict[str, Any]) -> dict[str, Any]:
    layers = json.loads((Path(row["path"]) / "d2moe_stats.json").read_text(encoding="utf-8"))["layers"]
    return {number: layer["fit"] for number, layer in layers.items()}


def inside_table(content: dict[str, Any]) -> str:
    """What low-rank methods keep at CLOSER: layers with a base, ranks, and the relative error of the experts' weights
    in the metric of their inputs, mean over layers and experts."""
    lines = [
        "| method | compressed layers | layers with a base (gate and up / down) | ranks gate, up, down | "
        "error gate | up | down |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in _kept_rows(content, "low-rank", "moe-svd", "mobe", "svd"):
        if row["ratio"] != CLOSER:
            continue
        found = inspect(Path(row["path"]))
        layers, reports = found["layers"], found["statistics"]["layers"]
        bases = (sum(_has_base(layer[role]) for layer in layers.values()) for role in ("gate", "down"))
        ranks = ", ".join(_span([layer[role]["rank"] for layer in layers.values()]) for role in ROLES)
        errors = " | ".join(_mean_error(reports, role) for role in ROLES)
        lines.append(f"| `{row['name']}` | {len(layers)} | {' / '.join(map(str, bases))} | {ranks} | {errors} |")
    return "\n".join(lines)


def stores_table(content: dict[str, Any]) -> str:
    """What the default stores at every ratio."""
    lines = ["| ratio | experts' bytes | stored |", "|---|---:|---|"]
    for row in _kept_rows(content, DEFAULT):
        said = describe(read_config(Path(row["path"])))
        lines.append(f"| {100 * row['ratio']:g} % | {100 * row['expert_share']:.1f} % | {said} |")
    return "\n".join(lines)


def _kept_rows(content: dict[str, Any], *names: str) -> list[dict[str, Any]]:
    """Those whose checkpoints can be looked into."""
    return [row for row in content["rows"] if row["name"] in names and has_figures(row) and row["path"]]


def _has_base(projection: dict[str, Any]) -> bool:
    return bool(projection["kept_columns"] or projection["base_rank"])


def _span(numbers: list[int]) -> str:
    return str(numbers[0]) if len(set(numbers)) == 1 else f"{min(numbers)}-{max(numbers)}"


def _mean_error(reports: dict[str, Any], role: str) -> str:
    errors = [error for report in reports.values() for error in report["relative_error"][role]]
    return f"{sum(errors) / len(errors):.3f}"


def channels_table(content: dict[str, Any]) -> str:
    """Which share of its channels each layer keeps, with its poorest and its richest expert."""
    found = {
        f"{100 * row['ratio']:g} %": _widths(Path(row["path"]))
        for row in _kept_rows(content, "channels")
        if row["ratio"] in WHERE
    }
    layers = max(map(len, found.values()), default=0)
    lines = [
        f"| ratio | {' | '.join(f'layer {number}' for number in range(layers))} |",
        "|---|" + "---:|" * layers,
    ]
    for name, widths in found.items():
        cells = [f"{sum(kept) / len(kept):.0f} % ({min(kept):.0f}-{max(kept):.0f})" for kept in widths]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _widths(folder: Path) -> list[list[float]]:
    """Layer by layer, which share of its channels each expert keeps, in percent."""
    config = read_config(folder)
    every, experts = config.intermediate_size, range(config.num_experts)
    return [[100 * width(layer, expert, every) / every for expert in experts] for layer in config.layers.values()]


def tables_of(model: str, content: dict[str, Any], folder: Path) -> dict[str, str]:
    """A model's section of the page by the names of its places; pictures go into `folder`."""
    return {
        f"frontier-{model}": frontier_block(model, content, folder),
        model: rows_table(content),
        f"stores-{model}": stores_table(content),
        f"inside-{model}": inside_table(content),
        f"channels-{model}": channels_table(content),
        f"fits-{model}": fits_table(content),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(RATIOS), choices=list(RATIOS))
    parser.add_argument("--ratios", nargs="+", type=float, help="instead of each model's own")
    parser.add_argument("--baselines", nargs="+", default=list(BASELINES), choices=BASELINES)
    options = parser.parse_args()
    if not SHARED.is_dir():
        raise SystemExit("make compare-tables needs the models and texts of ../shared")
    texts = write_texts(FOLDER / "texts")
    partly = options.ratios is not None or options.baselines != list(BASELINES)
    for model in options.models:
        content = measure(model, texts, options.ratios or RATIOS[model], options.baselines)
        tables = tables_of(model, content, FOLDER if partly else PAGE.parent)
        if partly:
            print("\n\n".join(tables.values()))
        else:
            put_tables(PAGE, tables)
            print(f"{model}: tables written to {PAGE.relative_to(ROOT)}, pictures beside it")


if __name__ == "__main__":
    main()
