"""`d2moe eval`: parse, call, print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from offline.cli.options import (
    FamilyFile,
    Json,
    Memory,
    ScopeOption,
    SeqLen,
    TokenizerOption,
    TrustRemoteCode,
    parse_size,
)
from offline.cli.tables import show
from offline.io.console import plain_console
from offline.io.memory import peak_memory
from offline.io.units import size


def evaluate(
    checkpoint: Annotated[str, typer.Argument(metavar="CKPT", help="Dense or compressed model folder, or a Hub id.")],
    text: Annotated[
        list[Path],
        typer.Option(help="Text to measure on: UTF-8, or JSON Lines or an array with `text`; several are read as one."),
    ],
    seq_len: SeqLen = None,
    windows: Annotated[int | None, typer.Option(min=1, help="Measure on this many windows (default: all).")] = None,
    seed: Annotated[int, typer.Option(help="With --windows: which windows of the text are drawn.")] = 0,
    scope: ScopeOption = None,
    tokenizer: TokenizerOption = None,
    trust_remote_code: TrustRemoteCode = False,
    memory: Memory = None,
    family_file: FamilyFile = None,
    as_json: Json = False,
) -> None:
    """Token perplexity over non-overlapping windows, layer by layer, for dense and compressed models alike."""
    from offline.io.progress import Steps
    from offline.run.evaluate import Measure
    from offline.run.evaluate import evaluate as run
    from offline.source.text import Text
    from offline.source.tokens import TokenizerChoice

    reads = TokenizerChoice(tokenizer, trust_remote_code)
    measure = Measure(Text(tuple(text)), seq_len, windows, seed, reads, parse_size(memory))
    console = plain_console(stderr=True)

    def say(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True, markup=False)

    result = run(checkpoint, measure, scope, Steps, say=say).to_json()
    show({**result, "peak_memory_bytes": peak_memory()}, as_json, eval_table)


def eval_table(console: Console, result: dict[str, Any]) -> None:
    scope = f", scope {result['scope']}" if result["scope"] else ""
    bits = f", {result['bits_per_byte']:.4f} bits per byte" if result["bits_per_byte"] is not None else ""
    console.print(
        f"perplexity {result['perplexity']:.4f}{bits} ({result['tokens']:,} tokens, {result['windows']} windows of "
        f"{result['seq_len']}{scope})",
        highlight=False,
    )
    predicted = size(result["predicted"]["peak_memory_bytes"])
    console.print(f"peak memory {size(result['peak_memory_bytes'])}, {predicted} predicted", highlight=False)
