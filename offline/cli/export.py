"""`d2moe export`: parse, call, print."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from offline.cli.options import Ckpt, Json
from offline.cli.tables import show
from offline.io.units import size


def export(
    checkpoint: Ckpt,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; must not exist yet.")],
    as_json: Json = False,
) -> None:
    """Write the dense checkpoint that CKPT stands for: loads anywhere without d2moe, as large as the original."""
    from offline.checkpoint.export import export as run
    from offline.io.progress import Steps

    result = run(checkpoint, out, Steps)
    show(result, as_json, export_table)


def export_table(console: Console, result: dict[str, Any]) -> None:
    console.print(
        f"{result['path']}: {result['parameters']:,} parameters, {size(result['bytes'])} in {result['files']} files "
        f"(compressed: {size(result['compressed_bytes'])})",
        highlight=False,
        soft_wrap=True,
    )
    console.print(f"serve it:  {shlex.join(['vllm', 'serve', result['path']])}", highlight=False, soft_wrap=True)
