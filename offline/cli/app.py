"""The `d2moe` command: its commands together, and how each ends."""

from __future__ import annotations

import codecs
import errno
import io
import os
import sys
from typing import Annotated, NoReturn

import typer

import d2moe_vllm
from d2moe_vllm.format.config import CheckpointError
from offline.cli.compare import compare, spread
from offline.cli.compress import compress
from offline.cli.evaluate import evaluate
from offline.cli.export import export
from offline.cli.inspect import inspect
from offline.cli.plan import plan
from offline.cli.report import report
from offline.cli.tune import tune
from offline.cli.verify import verify
from offline.errors import InputError, PeerError
from offline.work.distributed import speaks

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


for command in (plan, compress, inspect, verify, export, evaluate, compare, report, tune):
    app.command("eval" if command is evaluate else None)(command)


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
        sys.stdout.flush()
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
            _fail(
                f"{error.strerror}: {error.filename or 'the output'}; free some space or permit writing, run it again",
                2,
            )
        raise
    if code == 130:  # typer's own answer to Ctrl-C
        _fail("interrupted; run the same command again to continue", 1)
    raise SystemExit(code if isinstance(code, int) else 0)


_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR)
"""The machine's state or a path the user gave, not a bug."""


_PRINTABLE = "d2moe.printable"


def _printable(error: UnicodeError) -> tuple[bytes, int]:
    """A path's bytes that are no UTF-8 as they are, other characters that an encoding has not as escapes."""
    assert isinstance(error, UnicodeEncodeError)
    return b"".join(
        bytes([ord(one) - 0xDC00]) if "\udc80" <= one <= "\udcff" else one.encode("ascii", "backslashreplace")
        for one in error.object[error.start : error.end]
    ), error.end


def _prepare_environment() -> None:
    """Before torch is imported."""
    # Threads that wait must sleep: spinning ones make a run many times slower on a machine that is shared.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # No warnings of our libraries between the user and the one line that matters.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # What cannot be printed is no error after all the work: there may be nowhere to print to, or no such characters.
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 - to the end of the process
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    codecs.register_error(_PRINTABLE, _printable)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors=_PRINTABLE)


if __name__ == "__main__":
    main()
