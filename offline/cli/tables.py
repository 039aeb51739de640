"""What several commands print for people, and the choice between that and JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

from d2moe_vllm.format.kinds import ROLES
from offline.io.console import hush, plain_console


def show(content: dict[str, Any], as_json: bool, table: Callable[[Console, dict[str, Any]], None]) -> None:
    """The same content on stdout for programs, or as `table` prints it for people."""
    if as_json:
        try:
            sys.stdout.write(json.dumps(content, indent=2) + "\n")
            sys.stdout.flush()
        except BrokenPipeError:
            hush(sys.stdout)
    else:
        table(plain_console(), content)


def sizes(console: Console, source: dict[str, Any], result: dict[str, Any]) -> None:
    table = Table("", "before", "after", "removed", box=None, pad_edge=False)
    gone = 1 - result["parameters"] / source["parameters"]
    table.add_row("parameters", f"{source['parameters']:,}", f"{result['parameters']:,}", f"{100 * gone:.2f} %")
    ratio = 1 - result["bytes"] / source["bytes"]
    table.add_row("bytes on disk", f"{source['bytes']:,}", f"{result['bytes']:,}", f"{100 * ratio:.2f} %")
    console.print(table)


def projections(console: Console, title: str, rows: dict[str, dict[str, Any]]) -> None:
    table = Table(
        title, *(f"{role} rank" for role in ROLES), "gate/up columns", "down columns", box=None, pad_edge=False
    )
    for name, layer in rows.items():
        table.add_row(
            name, *(str(layer[role]["rank"]) for role in ROLES), _base(layer, "gate", "up"), _base(layer, "down")
        )
    console.print(table)


def _base(layer: dict[str, Any], *roles: str) -> str:
    """Of projections that share a selection of columns; the ranks of low-rank bases may differ."""
    first = layer[roles[0]]
    if first["kept_columns"]:
        return f"{first['kept_columns']} ({first['used_columns']} used)"
    ranks = [layer[role]["base_rank"] for role in roles]
    return f"rank {'/'.join(map(str, ranks))}" if any(ranks) else "none"
