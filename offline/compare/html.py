"""The table of `d2moe compare` as one HTML page, which needs nothing else: no network, no script."""

from __future__ import annotations

import os
from html import escape
from pathlib import Path
from typing import Any

from offline.compare.table import FIRST_TEXT, cells, footnotes, has_figures, heads, remark
from offline.errors import InputError
from offline.io.naming import readable
from offline.io.shards import write_file

GENERATOR = '<meta name="generator" content="d2moe compare">'
"""By this a page of ours is known, which may be replaced."""
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
{generator}
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name}: compared</title>
<style>
:root {{ color-scheme: light dark; --line: light-dark(#ccc, #444); --best: light-dark(#e3f2e1, #1d3a22);
  --dim: light-dark(#555, #aaa); }}
body {{ font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
caption {{ text-align: left; color: var(--dim); padding-bottom: .5rem; }}
th, td {{ padding: .3rem .8rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }}
th[scope=row], td.not {{ text-align: left; }}
thead th {{ border-bottom-width: 2px; }}
tbody + tbody {{ border-top: 2px solid var(--line); }}
td.best {{ background: var(--best); font-weight: 600; }}
td.not, p {{ color: var(--dim); }}
td.not {{ white-space: normal; }}
</style>
</head>
<body>
<h1>{name}</h1>
<div class="wide">
<table>
<caption>Compressed by several methods on one calibration; per ratio and text the lowest perplexity is marked.</caption>
<thead><tr>{head}</tr></thead>
{bodies}
</table>
</div>
<p>Perplexity over windows of {seq_len} tokens. Calibration: {windows} windows of {seq_len} tokens, SHA-256 {digest}.
Bytes are those of the weight files; time and peak memory are those of the compression, on {threads} CPU threads
({device}). d2moe-vllm {tool}.</p>
{notes}</body>
</html>
"""


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
    ratios = list(dict.fromkeys(row["ratio"] for row in content["rows"]))
    bodies = (_body([row for row in content["rows"] if row["ratio"] == ratio], content) for ratio in ratios)
    machine = content["machine"]
    return PAGE.format(
        generator=GENERATOR,
        name=escape(content["source"]["name"]),
        head="".join(f'<th scope="col">{escape(head)}</th>' for head in heads(content)),
        bodies="\n".join(bodies),
        notes="".join(f"<p>{escape(line)}</p>\n" for line in footnotes(content)),
        seq_len=content["seq_len"],
        windows=content["calibration"]["windows"],
        digest=content["calibration"]["tokens_sha256"],
        threads=machine["threads"],
        device=escape(machine["device"]),
        tool=escape(content["tool"]),
    )


def _body(rows: list[dict[str, Any]], content: dict[str, Any]) -> str:
    """The rows of one ratio."""
    best = {}
    for text in (text["name"] for text in content["texts"]):
        figures = [(row["perplexity"] or {}).get(text) for row in rows if row["kind"] != "source"]
        best[text] = min((value for value in figures if value is not None), default=None)
    return "<tbody>\n" + "\n".join(_line(row, content, best) for row in rows) + "\n</tbody>"


def _line(row: dict[str, Any], content: dict[str, Any], best: dict[str, float | None]) -> str:
    """A row, and one below it where it has figures and yet something to say."""
    name, asked, *figures = cells(row, content)
    head = f'<th scope="row">{escape(name)}</th><td>{escape(asked)}</td>'
    note = f'<td class="not" colspan="{len(figures)}">{escape(remark(row))}</td>'
    if not has_figures(row):
        return f"<tr>{head}{note}</tr>"
    marks = [""] * len(figures)
    for place, (text, least) in enumerate(best.items(), start=FIRST_TEXT - 1):
        if least is not None and (row["perplexity"] or {}).get(text) == least and row["kind"] != "source":
            marks[place] = ' class="best"'
    line = f"<tr>{head}{''.join(f'<td{m}>{escape(c)}</td>' for m, c in zip(marks, figures, strict=True))}</tr>"
    return f"{line}\n<tr>{head}{note}</tr>" if row["failed"] else line
