"""`d2moe compare` on the command line."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from offline.cli.options import (
    CalibrationText,
    FamilyFile,
    Json,
    Memory,
    Revision,
    Seed,
    SeqLen,
    Src,
    TokenizerOption,
    TrustRemoteCode,
    WindowsOption,
    need_libraries,
    parse_size,
)
from offline.cli.tables import show
from offline.errors import InputError
from offline.io.console import plain_console

MANY = {"compare": ("--ratio", "--method", "--baseline", "--text"), "report": ("--text",)}
"""Command -> its options that take several values."""


def spread(arguments: Sequence[str]) -> list[str]:
    """`compare ... --ratio 0.2 0.4` as `compare ... --ratio 0.2 --ratio 0.4`, which the parser understands; commands
    without such options as they are."""
    if not arguments or arguments[0] not in MANY:
        return list(arguments)
    result: list[str] = []
    option, values = "", 0
    for argument in arguments:
        if argument.startswith("-"):
            option, values = argument, 0
        elif option in MANY[arguments[0]]:
            values += 1
            if values > 1:
                result.append(option)
        result.append(argument)
    return result


def compare(
    source: Src,
    ratio: Annotated[list[float], typer.Option(help="Shares of the source's bytes to remove: --ratio 0.2 0.4 0.6.")],
    text: Annotated[list[Path], typer.Option(help="Texts to measure perplexity on: UTF-8, or JSONL with `text`.")],
    method: Annotated[
        list[str] | None, typer.Option(help="Methods, each by its default recipe (default: all of docs/methods.md).")
    ] = None,
    baseline: Annotated[
        list[str] | None,
        typer.Option(
            help="Simpler ways to compare with: frequency, output-norm, merge, low-rank, svd, channels; rtn-8, "
            "rtn-4, rtn-3, rtn-2, gptq-8, gptq-4, gptq-3, gptq-2."
        ),
    ] = None,
    calibration: CalibrationText = None,
    windows: WindowsOption = None,
    seq_len: SeqLen = None,
    seed: Seed = None,
    revision: Revision = None,
    family_file: FamilyFile = None,
    workdir: Annotated[
        Path | None,
        typer.Option(help="For finished rows (default: HTML.d2moe-compare, or without --html in the user's cache)."),
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave what was compressed in the working folder.")] = False,
    tokenizer: TokenizerOption = None,
    trust_remote_code: TrustRemoteCode = False,
    memory: Memory = None,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where to compute.")] = "auto",
    serve: Annotated[
        bool,
        typer.Option(
            "--serve",
            help="Also measure the speed of each row: a `vllm serve` of its own, loaded by `vllm bench serve` with 16 "
            "requests of 32 + 64 tokens, 8 at once, three rounds after a warm-up. A minute or two for each row.",
        ),
    ] = False,
    vllm_args: Annotated[
        str | None, typer.Option(help="With --serve: further arguments of `vllm serve`, as one word in quotes.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Also write the table as one HTML page.")] = None,
    as_json: Json = False,
) -> None:
    """Compress SRC by several methods at several ratios, on one calibration, and compare what comes out."""
    from offline.compare.comparison import compare as run
    from offline.compare.settings import Settings
    from offline.compare.table import compare_table
    from offline.methods import METHODS
    from offline.source.text import Text
    from offline.source.tokens import TokenizerChoice

    if not calibration:
        raise InputError("no calibration text; add --calibration FILE (a UTF-8 text or JSONL of the model's domain)")
    if vllm_args is not None and not serve:
        raise InputError("--vllm-args says how to serve; add --serve, or leave it out")
    if html is not None:
        need_libraries("compare --html", "matplotlib", "jinja2")
        from offline.compare.html import check_page

        check_page(html)
    # One that is asked for nothing but baselines gets nothing but baselines.
    methods = list(method or ()) if method or baseline else list(METHODS)
    settings = Settings(
        source=source,
        methods=methods,
        baselines=list(baseline or ()),
        ratios=ratio,
        texts=text,
        calibration=Text(tuple(calibration)),
        tokenizer=TokenizerChoice(tokenizer, trust_remote_code),
        workdir=workdir or (html and html.with_name(f"{html.name}.d2moe-compare")),
        windows=windows,
        seq_len=seq_len,
        seed=seed,
        revision=revision,
        memory=parse_size(memory),
        device=device,
        keep=keep,
        serve=_arguments(vllm_args) if serve else None,
    )
    result = run(settings, plain_console(stderr=True))
    show(result, as_json, compare_table)
    # Last: a page that cannot be written must not take the table with it.
    if html is not None:
        from offline.compare.html import write_page

        write_page(html, result)
    if failed := sum(1 for row in result["rows"] if row["failed"]):
        sys.stderr.write(f"d2moe: {failed} of {len(result['rows'])} rows failed; the same command tries them again\n")
        raise typer.Exit(1)


def _arguments(text: str | None) -> list[str]:
    try:
        return shlex.split(text or "")
    except ValueError as error:
        raise InputError(f"--vllm-args {text}: {error}; close what is quoted") from None
