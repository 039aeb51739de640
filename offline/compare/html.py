"""The table of `d2moe compare` as one HTML page, which needs nothing else: no network, no script."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from markupsafe import Markup

from offline.compare.frontier import verdicts
from offline.compare.picture import panels
from offline.compare.table import FIRST_TEXT, cells, footnotes, has_figures, heads, remark
from offline.errors import InputError
from offline.io.naming import readable
from offline.io.shards import write_file
from offline.report.plots import svg
from offline.report.template import render

GENERATOR = '<meta name="generator" content="d2moe compare">'
"""By this a page of ours is known, which may be replaced."""


def check_page(path: Path) -> None:
    """Raises InputError where a page cannot be written, or would replace a file that is none of ours."""
    parent = path.absolute().parent
    if (path.exists() and not path.is_file()) or not parent.is_dir():
        raise InputError(f"--html {path} is no file in an existing folder; choose another")
    if not os.access(parent, os.W_OK):
        raise InputError(f"--html {path}: {parent} is not writable; choose another folder")
    if path.exists() and GENERATOR not in path.read_text(encoding="utf-8", errors="replace")[:500]:
        raise InputError(f"--html {path} exists already and was not written by d2moe compare; choose another")


def write_page(path: Path, content: dict[str, Any]) -> None:
    """content: as `d2moe compare --json` prints it."""
    # Why a row failed may name a path that is no UTF-8.
    write_file(path, readable(page(content)))


def page(content: dict[str, Any]) -> str:
    ratios = dict.fromkeys(row["ratio"] for row in content["rows"])
    return render(
        Path(__file__).with_name("page.html"),
        command="compare",
        title=f"{content['source']['name']}: compared",
        content=content,
        heads=heads(content),
        bodies=[_body([row for row in content["rows"] if row["ratio"] == ratio], content) for ratio in ratios],
        notes=footnotes(content),
        pictures=[(panel, Markup(svg(panel)), beyond) for panel, beyond in panels(content)],
        verdicts=verdicts(content),
    )


def _body(rows: list[dict[str, Any]], content: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of one ratio: figures with whether they are the lowest perplexity, none where there are none, and what
    is to be said of them."""
    texts = [text["name"] for text in content["texts"]]
    compressed = [row["perplexity"] or {} for row in rows if row["kind"] != "source"]
    best = {name: min((one[name] for one in compressed if one.get(name)), default=None) for name in texts}
    found = []
    for row in rows:
        name, asked, *figures = cells(row, content)
        marks = [False] * len(figures)
        if row["kind"] != "source" and row["perplexity"]:
            lowest = [row["perplexity"].get(text) == least is not None for text, least in best.items()]
            marks[FIRST_TEXT - 1 : FIRST_TEXT - 1 + len(texts)] = lowest
        shown = list(zip(figures, marks, strict=True)) if has_figures(row) else []
        found.append({"name": name, "asked": asked, "figures": shown, "remark": remark(row)})
    return found
