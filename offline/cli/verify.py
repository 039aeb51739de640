"""`d2moe verify`: parse, call, print."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from d2moe_vllm.format.config import CheckpointError
from d2moe_vllm.format.kinds import roles_of
from offline.cli.options import Ckpt, Json, Original
from offline.cli.tables import show
from offline.io.units import size

PROBLEMS_SHOWN = 20


def verify(checkpoint: Ckpt, source: Original = None, as_json: Json = False) -> None:
    """Is a compressed checkpoint whole, unchanged and finite, and how close is it to its source? Exit 0 if sound."""
    from offline.checkpoint.verify import verify as run
    from offline.io.progress import Steps

    result = run(checkpoint, source, Steps)
    show(result, as_json, verify_table)
    if problems := result["problems"]:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise CheckpointError(f"{checkpoint} is not sound: {problems[0]}{more}")


def verify_table(console: Console, result: dict[str, Any]) -> None:
    for kind in ("problems", "notes"):
        for line in result[kind][:PROBLEMS_SHOWN]:
            console.print(f"{kind[:-1]}: {line}", highlight=False, soft_wrap=True)
        if (more := len(result[kind]) - PROBLEMS_SHOWN) > 0:
            console.print(f"... and {more} more {kind}; --json lists all")
    if result["layers"]:
        _errors(console, result["layers"])
    if result["sound"]:
        beside = f", compared with {result['source']}" if result["source"] else ""
        console.print(f"sound: {result['files']} weight files, {size(result['bytes'])}{beside}", highlight=False)


def _errors(console: Console, layers: dict[str, dict[str, dict[str, float]]]) -> None:
    roles = roles_of(next(iter(layers.values())))
    heads = (head for role in roles for head in (f"{role} mean", "worst"))
    table = Table("layer", *heads, box=None, pad_edge=False)
    for number, layer in layers.items():
        cells = (
            cell
            for role in roles
            for cell in (f"{layer[role]['mean']:.4f}", f"{layer[role]['worst']:.4f} ({layer[role]['worst_expert']})")
        )
        table.add_row(number, *cells)
    console.print(table)
    console.print(
        "errors: ||W - W'|| / ||W|| against the source, not weighted by inputs; of the worst expert, and its number",
        style="dim",
    )
