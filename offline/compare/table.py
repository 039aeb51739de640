"""The rows of `d2moe compare` as cells, and the table that the terminal gets."""

from __future__ import annotations

import math
from typing import Any

from rich.console import Console
from rich.table import Table

from offline.compare.baselines import ROUNDED
from offline.compare.frontier import verdicts
from offline.io.units import duration, size

ROUNDED_NOTE = (
    "* counted as codes with a 16-bit scale for every 64 inputs; on disk, and served, the rounded numbers lie in the "
    "source's dtype. Their size does not follow the ratio that is asked for."
)
WIDE = 1000
"""More columns than any table has."""
FIRST_TEXT = 5
"""Cells before the first perplexity, the name not counted."""


def heads(content: dict[str, Any]) -> list[str]:
    """Of the columns. content: as `d2moe compare --json` prints it."""
    served = ["tokens/s", "ms/token"] if content["serving"] else []
    texts = [text["name"] for text in content["texts"]]
    return ["", "asked", "removed", "bytes", "experts' bytes", "parameters", *texts, "time", "peak memory", *served]


def cells(row: dict[str, Any], content: dict[str, Any]) -> list[str]:
    """What a row of the comparison says, a cell for each of `heads`; empty where it has no figure."""
    asked = "" if row["kind"] == "source" or row["name"] in ROUNDED else f"{100 * row['ratio']:g} %"
    return [
        row["name"],
        asked,
        *_stored(row),
        *(_perplexity(row, text["name"]) for text in content["texts"]),
        *_cost(row),
        *(_served(row) if content["serving"] else []),
    ]


def remark(row: dict[str, Any]) -> str:
    """Why a row has no figures, or not all."""
    if row["reachable"] is not None:
        # Rounded down: what is said has to be reachable.
        return f"not reachable: at most {math.floor(1000 * row['reachable']) / 10:.1f} %"
    return f"failed: {row['failed']}" if row["failed"] else ""


def has_figures(row: dict[str, Any]) -> bool:
    return row["bytes"] is not None


def footnotes(content: dict[str, Any]) -> list[str]:
    """What has to be known to read the table."""
    found = [ROUNDED_NOTE] if any(row["counted"] for row in content["rows"]) else []
    if load := content["serving"]:
        found.append(
            f"tokens/s of output and ms per output token: median and (least-most) of {load['rounds']} rounds of "
            f"{load['requests']} requests of {load['input_tokens']} + {load['output_tokens']} tokens, "
            f"{load['at_once']} at once, by `vllm bench serve` (vLLM {load['vllm']}); a server for each row, one after "
            "another: differences within the spread say nothing."
        )
    return found


def _stored(row: dict[str, Any]) -> list[str]:
    """Removed, bytes, what is left of the experts' bytes, and parameters."""
    if not has_figures(row):
        return ["", "", "", ""]
    experts = f"{100 * row['expert_share']:.1f} %"
    if counted := row["counted"]:
        removed = f"{100 * counted['ratio']:.2f} %"
        return [f"{one}*" for one in (removed, f"{counted['bytes']:,}", experts, f"{counted['parameters']:,}")]
    removed = "" if row["kind"] == "source" else f"{100 * row['stored_ratio']:.2f} %"
    return [removed, f"{row['bytes']:,}", experts, f"{row['parameters']:,}"]


def _perplexity(row: dict[str, Any], text: str) -> str:
    value = (row["perplexity"] or {}).get(text)
    return "" if value is None else f"{value:.2f}"


def _cost(row: dict[str, Any]) -> list[str]:
    if row["seconds"] is None:
        return ["", ""]
    more = "≥ " if row["resumed"] else ""
    return [more + duration(row["seconds"]), more + size(row["peak_memory_bytes"])]


def _served(row: dict[str, Any]) -> list[str]:
    found = row["served"]
    if not found:
        return ["", ""]
    figures = (("output_tokens_per_s", 0), ("ms_per_output_token", 1))
    return [
        f"{found[name]:.{digits}f} ({found[f'{name}_min_max'][0]:.{digits}f}-{found[f'{name}_min_max'][1]:.{digits}f})"
        for name, digits in figures
    ]


def compare_table(console: Console, content: dict[str, Any]) -> None:
    """One row per method and ratio, the source first; below it why rows have no figures."""
    table = Table(box=None, pad_edge=False)
    for head in heads(content):
        table.add_column(head, no_wrap=True)
    for row in content["rows"]:
        name, asked, *figures = cells(row, content)
        if not has_figures(row):
            what, _, why = remark(row).partition(": ")
            figures[:2] = [f"{what}:", why if row["reachable"] is not None else "see below"]
        table.add_row(name, asked, *figures)
    # A narrow terminal may wrap it; cells that are cut say nothing.
    console.width = max(console.width, console.measure(table, options=console.options.update(width=WIDE)).maximum)
    console.print(table)
    for row in content["rows"]:
        if row["failed"]:
            line = f"{row['name']} {cells(row, content)[1]}".strip()
            console.print(f"{line} {remark(row)}", highlight=False, soft_wrap=True)
    calibration = content["calibration"]
    console.print(
        f"perplexity over windows of {content['seq_len']} tokens; calibrated on {calibration['windows']} windows of "
        f"{calibration['seq_len']} (SHA-256 {calibration['tokens_sha256'][:12]}); time and memory are compression's",
        style="dim",
        soft_wrap=True,
    )
    for line in verdicts(content):
        console.print(line, highlight=False, soft_wrap=True)
    for line in footnotes(content):
        console.print(line, style="dim", highlight=False, soft_wrap=True)
