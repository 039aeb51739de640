"""What several commands print for people, and the choice between that and JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

from d2moe_vllm.format.config import Layer
from d2moe_vllm.format.kinds import Role
from d2moe_vllm.format.words import channels_of, describe_layer
from offline.io.console import hush, plain_console
from offline.io.units import size


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


def arithmetic(console: Console, fit: dict[str, Any]) -> None:
    """What one device holds, line by line."""
    table = Table("", "bytes", "", box=None, pad_edge=False)
    table.columns[1].justify = "right"
    for line in fit["lines"]:
        table.add_row(line["what"], f"{line['bytes']:,}", line["how"])
    console.print(table)
    if fit["spare_bytes"] < 0:
        console.print(
            f"these weights are {size(-fit['spare_bytes'])} more than planned, which the KV cache will lack",
            highlight=False,
            soft_wrap=True,
        )
    console.print(f"--ratio {fit['ratio']:g} makes it fit", highlight=False)
    console.print()


def neighbours(console: Console, fit: dict[str, Any]) -> None:
    """What other wishes would take."""
    table = Table("instead", "ratio", "files", "", box=None, pad_edge=False)
    for one in fit["around"]:
        ratio, files = ("-", "-") if one["files"] is None else (f"{one['ratio']:.3f}", size(one["files"]))
        table.add_row(one["what"], ratio, files, one["verdict"])
    console.print()
    console.print(table)
    console.print("of these ratio and files are scaled from the plan above: about right", style="dim")
    console.print(f"serve it with {' '.join(fit['serve'])}", highlight=False, soft_wrap=True)


def less_than_asked(console: Console, summary: dict[str, Any]) -> None:
    """Says where a result is smaller than asked for, and where nothing of ours is needed."""
    result, ratio = summary["result"], summary["recipe"]["ratio"]
    if not result["saves_nothing"]:
        return
    console.print(
        "this is smaller than asked for: more bytes would save nothing that can be measured "
        f"({100 * ratio:g} % were to go)",
        highlight=False,
        soft_wrap=True,
    )
    if result["stores"] == "no base, 8-bit experts":
        console.print(
            "at this size plain 8-bit experts lose nothing; vLLM's own 8-bit weights (W8A16) are an alternative",
            highlight=False,
            soft_wrap=True,
        )


def projections(console: Console, title: str, rows: dict[str, dict[str, Any]], channels: int) -> None:
    """What layers store; channels: of an expert of the original."""
    layers = {name: Layer.model_validate(layer) for name, layer in rows.items()}
    if any(layer.up.delta == "dense" or (layer.up.full_base and not layer.up.rank) for layer in layers.values()):
        table = Table(title, "stored", "channels of an expert", box=None, pad_edge=False)
        for name, layer in layers.items():
            table.add_row(name, describe_layer(layer), channels_of(layer, channels))
        console.print(table)
        return
    roles = next(iter(layers.values())).roles
    columns = f"{'/'.join(roles[:-1])} columns", "down columns"
    table = Table(title, *(f"{role} rank" for role in roles), *columns, box=None, pad_edge=False)
    for name, layer in layers.items():
        ranks = (str(layer[role].rank) for role in roles)
        table.add_row(name, *ranks, _base(layer, *roles[:-1]), _base(layer, "down"))
    console.print(table)


def _base(layer: Layer, *roles: Role) -> str:
    """Of projections that share a selection of columns; the ranks of low-rank bases may differ."""
    first = layer[roles[0]]
    if first.kept_columns:
        return f"{first.kept_columns} ({first.used_columns} used)"
    ranks = [layer[role].base_rank for role in roles]
    return f"rank {'/'.join(map(str, ranks))}" if any(ranks) else "all" if first.full_base else "none"
