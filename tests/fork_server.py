"""Imports the modules that it is given, and then runs Python code, each piece in a process forked from this one.

A piece is a line of JSON on standard input: see forks.py. Two lines of standard output answer it: the process group it
runs in, and, once it has ended, its exit code.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import sys
import tempfile
import traceback
from typing import Any


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what imports print is no answer
    for name in sys.argv[1:]:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a collection of garbage in a forked process need not look at what was imported
    for line in sys.stdin:
        if (child := os.fork()) == 0:
            code = run(json.loads(line))
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        print(child, file=answers)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers)


def run(job: dict[str, Any]) -> int:
    """As `python -c` does in a folder, process group and environment of its own."""
    os.setsid()
    for descriptor, path in ((0, os.devnull), (1, job["stdout"]), (2, job["stderr"])):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND), descriptor)
    os.environ |= job["env"]
    tempfile.tempdir = None  # chosen anew, as TMPDIR may be another
    os.chdir(job["cwd"])
    sys.argv = ["-c", *job["arguments"]]
    sys.path[0] = ""
    code = 0
    try:
        exec(compile(job["code"], "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    return code


if __name__ == "__main__":
    main()
