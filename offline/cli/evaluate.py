"""`d2moe eval`: parse, call, print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from offline.cli.options import Json, ScopeOption, SeqLen
from offline.cli.tables import show


def evaluate(
    checkpoint: Annotated[str, typer.Argument(metavar="CKPT", help="Dense or compressed model folder, or a Hub id.")],
    text: Annotated[Path, typer.Option(help="Text to measure on: UTF-8, or JSONL with `text`.")],
    seq_len: SeqLen = None,
    scope: ScopeOption = None,
    as_json: Json = False,
) -> None:
    """Token perplexity over non-overlapping windows, layer by layer, for dense and compressed models alike."""
    from offline.io.progress import Steps
    from offline.run.evaluate import evaluate as run

    result = run(checkpoint, text, seq_len, scope, Steps)
    show(result.to_json(), as_json, eval_table)


def eval_table(console: Console, result: dict[str, Any]) -> None:
    scope = f", scope {result['scope']}" if result["scope"] else ""
    console.print(
        f"perplexity {result['perplexity']:.4f} ({result['tokens']:,} tokens, {result['windows']} windows of "
        f"{result['seq_len']}{scope})",
        highlight=False,
    )
