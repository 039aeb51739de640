"""The `d2moe` command. Thin: parse, call, print; tables are in offline/cli/tables.py."""

from __future__ import annotations

import errno
import io
import json
import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer

import d2moe_vllm
from d2moe_vllm.format.config import CheckpointError
from offline.cli.compare import compare, spread
from offline.cli.options import (
    Accounting,
    AllowLarger,
    Ckpt,
    Json,
    Memory,
    Method,
    Original,
    Ratio,
    RecipeFile,
    Revision,
    ScopeOption,
    Seed,
    SeqLen,
    Src,
    WindowsOption,
    parse_size,
)
from offline.cli.report import report
from offline.errors import InputError, PeerError
from offline.io.console import plain_console
from offline.io.memory import peak_memory
from offline.work.distributed import is_first, speaks

app = typer.Typer(
    help="Compress Mixture-of-Experts models with D2-MoE; serve the result with `vllm serve`.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"d2moe-vllm {d2moe_vllm.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    pass


def _print_json(content: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(content, indent=2) + "\n")


def _recipe(given: str | None, **overrides: Any) -> Any:
    from offline.plan.recipe import load_recipe
    from offline.plan.recipes import find_recipe

    path = find_recipe(given) if given else None
    return load_recipe(path, {name.replace("__", "."): value for name, value in overrides.items()})


@app.command()
def plan(
    source: Src,
    ratio: Ratio = None,
    recipe: RecipeFile = None,
    method: Method = None,
    accounting: Accounting = None,
    windows: WindowsOption = None,
    seq_len: SeqLen = None,
    memory: Memory = None,
    allow_larger: AllowLarger = False,
    processes: Annotated[int, typer.Option(min=1, help="Processes on one machine, as torchrun would start.")] = 1,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Ranks, sizes, memory, disk and time, before any work."""
    from offline.plan.make import make_plan
    from offline.plan.make import summary as summarize
    from offline.plan.resources import estimate_seconds
    from offline.source.dense import open_dense

    chosen = _recipe(
        recipe,
        ratio=ratio,
        method=method,
        accounting=accounting,
        calibration__windows=windows,
        calibration__seq_len=seq_len,
    )
    options: dict[str, Any] = {"processes": processes, "allow_larger": allow_larger}
    planned = make_plan(open_dense(source, revision), chosen, memory=parse_size(memory), **options)
    summary = summarize(planned, estimate_seconds(planned))
    if as_json:
        _print_json(summary)
    else:
        from offline.cli.tables import plan_table

        plan_table(plain_console(), summary)


@app.command()
def compress(
    source: Src,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; must not exist yet.")],
    ratio: Ratio = None,
    calibration: Annotated[Path | None, typer.Option(help="Calibration text: UTF-8, or JSONL with `text`.")] = None,
    recipe: RecipeFile = None,
    method: Method = None,
    accounting: Accounting = None,
    scope: ScopeOption = None,
    windows: WindowsOption = None,
    seq_len: SeqLen = None,
    seed: Seed = None,
    revision: Revision = None,
    workdir: Annotated[Path | None, typer.Option(help="For intermediate files (default OUT.d2moe-work).")] = None,
    memory: Memory = None,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where to compute.")] = "auto",
    allow_larger: AllowLarger = False,
    restart: Annotated[bool, typer.Option("--restart", help="Start over what was begun on another machine.")] = False,
    as_json: Json = False,
) -> None:
    """Compress SRC into OUT, layer by layer; a run that was interrupted is continued."""
    from offline.run.compress import compress as run

    started = time.monotonic()
    chosen = _recipe(
        recipe,
        ratio=ratio,
        method=method,
        accounting=accounting,
        scope=scope,
        calibration__windows=windows,
        calibration__seq_len=seq_len,
        calibration__seed=seed,
    )
    if calibration is None:
        raise InputError("no calibration text; add --calibration FILE (a UTF-8 text or JSONL of the model's domain)")
    options: dict[str, Any] = {"revision": revision, "workdir": workdir, "restart": restart, "device": device}
    options["allow_larger"] = allow_larger
    console = plain_console(stderr=True, quiet=not is_first())
    result = run(source, out, chosen, calibration, **options, memory=parse_size(memory), console=console)
    result["seconds"] = round(time.monotonic() - started, 1)
    result["peak_memory_bytes"] = peak_memory()
    if not is_first():
        return  # one of several processes speaks for all
    if as_json:
        _print_json(result)
    else:
        from offline.cli.tables import compress_table

        compress_table(plain_console(), result)


@app.command()
def inspect(
    checkpoint: Ckpt,
    analyses: Annotated[
        bool, typer.Option("--analyses", help="Also CKA between experts, energy retention, layer sensitivity (slow).")
    ] = False,
    source: Original = None,
    as_json: Json = False,
) -> None:
    """What is in a compressed checkpoint: parameters and bytes stored, ranks and errors per layer."""
    from offline.checkpoint.inspect import analyse
    from offline.checkpoint.inspect import inspect as look

    if source and not analyses:
        raise InputError("inspect uses --source for its analyses only; add --analyses, or use `d2moe verify`")
    content = look(checkpoint)
    if analyses:
        from offline.io.progress import Steps

        content["analyses"] = analyse(checkpoint, source, Steps)
    if as_json:
        _print_json(content)
    else:
        from offline.cli.tables import analyses_table, inspect_table

        inspect_table(plain_console(), content)
        if analyses:
            analyses_table(plain_console(), content["analyses"])


@app.command()
def verify(checkpoint: Ckpt, source: Original = None, as_json: Json = False) -> None:
    """Is a compressed checkpoint whole, unchanged and finite, and how close is it to its source? Exit 0 if sound."""
    from offline.checkpoint.verify import verify as run
    from offline.io.progress import Steps

    result = run(checkpoint, source, Steps)
    if as_json:
        _print_json(result)
    else:
        from offline.cli.tables import verify_table

        verify_table(plain_console(), result)
    if problems := result["problems"]:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise CheckpointError(f"{checkpoint} is not sound: {problems[0]}{more}")


@app.command()
def export(
    checkpoint: Ckpt,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; must not exist yet.")],
    as_json: Json = False,
) -> None:
    """Write the dense checkpoint that CKPT stands for: loads anywhere without d2moe, as large as the original."""
    from offline.checkpoint.export import export as run
    from offline.io.progress import Steps

    result = run(checkpoint, out, Steps)
    if as_json:
        _print_json(result)
    else:
        from offline.cli.tables import export_table

        export_table(plain_console(), result)


@app.command(name="eval")
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
    if as_json:
        _print_json(result.to_json())
    else:
        from offline.cli.tables import eval_table

        eval_table(plain_console(), result.to_json())


app.command()(compare)
app.command()(report)


@app.command()
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
    if as_json:
        _print_json(result)
    else:
        from offline.cli.tables import tune_table

        tune_table(plain_console(), result)


def _fail(message: str, code: int) -> NoReturn:
    if speaks():
        sys.stderr.write(f"d2moe: {' '.join(message.split())}\n")
    raise SystemExit(code)


def main(arguments: list[str] | None = None) -> None:
    """Exit codes: 0 done, 2 the user's input is at fault (one line), 1 anything else."""
    _prepare_environment()
    try:
        code = app(
            args=spread(sys.argv[1:] if arguments is None else arguments) or ["--help"],
            prog_name="d2moe",
            standalone_mode=False,
        )
    except (InputError, CheckpointError) as error:
        _fail(str(error), 2)
    except PeerError as error:
        _fail(f"{error}; run the same command again to continue", 1)
    except (typer.Abort, KeyboardInterrupt):
        _fail("interrupted; run the same command again to continue", 1)
    except typer.TyperException as error:  # an unknown option, a missing argument, a value of the wrong type
        message = error.format_message() if hasattr(error, "format_message") else str(error)
        _fail(f"{message} See `d2moe --help`.", 2)
    except OSError as error:
        if error.errno in _DISK_ERRORS:
            _fail(f"{error.strerror}: {error.filename or 'a file'}; free some space or permit writing, run it again", 2)
        raise
    if code == 130:  # typer's own answer to Ctrl-C
        _fail("interrupted; run the same command again to continue", 1)
    raise SystemExit(code if isinstance(code, int) else 0)


_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR)
"""The machine's state or a path the user gave, not a bug."""


def _prepare_environment() -> None:
    """Before torch is imported."""
    # Threads that wait must sleep: spinning ones make a run many times slower on a machine that is shared.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # No warnings of our libraries between the user and the one line that matters.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # A path whose bytes are no UTF-8 is printed as those bytes, and is no error after all the work.
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="surrogateescape")


if __name__ == "__main__":
    main()
