"""How the tests compress the bundled model, and run the command."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from pathlib import Path

from offline.cli import main

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "examples" / "tiny-mixtral"
COMPRESS = ["--ratio", "0.4", "--bits", "16", "--windows", "32", "--seq-len", "128"]


def script(name: str) -> str:
    """A console script of the environment the tests run in."""
    return str(Path(sys.executable).with_name(name))


def d2moe(*arguments: object, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """Run the installed command as a user would."""
    command = [script("d2moe"), *(str(argument) for argument in arguments)]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=timeout, cwd=ROOT)


def d2moe_here(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The same in this process, which spares the start of Python and torch; an exception is the test's."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
    return subprocess.CompletedProcess(list(map(str, arguments)), code, out.getvalue(), err.getvalue())
