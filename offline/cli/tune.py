"""`d2moe tune`: parse, call, print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from offline.cli.options import Json, ScopeOption
from offline.cli.tables import show


def tune(
    checkpoint: Annotated[Path | None, typer.Argument(metavar="CKPT", help="Tune for this checkpoint.")] = None,
    shape: Annotated[str | None, typer.Option(help="Instead of CKPT: a model by name, as Mixtral-8x7B.")] = None,
    ratio: Annotated[float | None, typer.Option(help="With --shape: share of the bytes removed (default 0.4).")] = None,
    scope: ScopeOption = None,
    output: Annotated[Path | None, typer.Option(help="Folder for the table (default: where serving looks).")] = None,
    as_json: Json = False,
) -> None:
    """Find the fastest tiles of the Triton kernels on this machine's GPU, and write them where serving finds them."""
    from offline.io.progress import Steps
    from offline.run.tune import tune as run

    result = run(checkpoint, shape, ratio, scope, output, Steps)
    show(result, as_json, tune_table)


def tune_table(console: Console, result: dict[str, Any]) -> None:
    table = Table("tokens", "before, ms", "now, ms", "faster", box=None, pad_edge=False)
    for row in result["layer"]:
        gain = row["before_ms"] / row["after_ms"]
        table.add_row(str(row["tokens"]), f"{row['before_ms']:.3f}", f"{row['after_ms']:.3f}", f"{gain:.2f}")
    console.print(table)
    use = "servers use it from their next start" if result["in_force"] else "no server looks there by itself"
    console.print(f"{result['device']}: {result['path']}; {use}", highlight=False, soft_wrap=True)
