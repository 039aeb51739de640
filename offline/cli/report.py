"""`d2moe report` on the command line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from offline.cli.options import (
    Ckpt,
    Json,
    Original,
    SeqLen,
    TokenizerOption,
    TrustRemoteCode,
    need_libraries,
    parse_size,
)
from offline.cli.tables import show
from offline.errors import InputError
from offline.io.console import plain_console
from offline.io.folders import check_new_folder, new_file, new_folder


def report(
    checkpoint: Ckpt,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="HTML file to write; must not exist yet.")],
    source: Original = None,
    text: Annotated[
        list[Path] | None, typer.Option(help="Texts to measure perplexity on: UTF-8, or JSONL with `text`.")
    ] = None,
    seq_len: SeqLen = None,
    trimming: Annotated[
        bool, typer.Option("--trimming", help="Measure on the first text what trimming experts would cost (slow).")
    ] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Without CKA and energy retention, which read every weight.")
    ] = False,
    figures: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Also write the figures as PNG into this new folder.")
    ] = None,
    card: Annotated[
        bool, typer.Option("--card", help="Also write the measured perplexities into the checkpoint's README.md.")
    ] = False,
    memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="What the comparison of experts (CKA) may hold at once (default 4GB)."),
    ] = None,
    tokenizer: TokenizerOption = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """What a compressed checkpoint is and what it lost, as one HTML page that needs nothing else."""
    need_libraries("report", "matplotlib", "jinja2")
    from offline.checkpoint.card import check_card, record
    from offline.io.progress import Steps
    from offline.report.content import Request, collect
    from offline.report.figures import make_report
    from offline.source.tokens import TokenizerChoice

    reads = TokenizerChoice(tokenizer, trust_remote_code)
    request = Request(checkpoint, source, tuple(text or ()), seq_len, quick, trimming, parse_size(memory), reads)
    _check_places(out, figures)
    if card:
        if not request.texts:
            raise InputError("--card records what was measured; add --text FILE")
        check_card(checkpoint)
    console = plain_console(stderr=True)
    content = collect(request, Steps, lambda text: console.print(text, highlight=False, soft_wrap=True))
    made = make_report(content)
    written = _write(out, figures, content, made)
    if card:
        record(checkpoint, content["perplexity"])
    result = {
        "page": str(out),
        "pictures": written,
        "figures": [figure.to_json() for figure in made.figures],
        "left_out": [missing.to_json() for missing in made.missing],
        "content": content,
    }
    show(result, as_json, report_table)


def _check_places(out: Path, figures: Path | None) -> None:
    """Before any work. Raises InputError where something exists already or cannot be written."""
    check_new_folder(out, "file")
    if figures is not None:
        check_new_folder(figures.absolute())
        if figures.absolute() == out.absolute():
            raise InputError(f"OUT and --figures are both {out}; choose two names")


def _write(out: Path, figures: Path | None, content: dict[str, Any], made: Any) -> list[str]:
    """The page last: where it is, all is. Both are there whole or not at all."""
    from offline.report.page import page, write_figures

    text = page(content, made)
    names: list[str] = []
    if figures is not None:
        with new_folder(figures.absolute()) as folder:
            names = write_figures(folder, made)
    new_file(out, text)
    return [os.fspath(figures / name) for name in names] if figures is not None else []


def report_table(console: Console, result: dict[str, Any]) -> None:
    for one in result["left_out"]:
        console.print(f"left out: {one['title']}. {one['why']}", highlight=False, soft_wrap=True)
    pictures = f", {len(result['pictures'])} pictures" if result["pictures"] else ""
    console.print(f"{result['page']}: {len(result['figures'])} figures{pictures}", highlight=False, soft_wrap=True)
