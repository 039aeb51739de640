"""Python code in fresh processes that share the time an import takes: they are forked from one that has done it."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

TORCH = ("torch",)
TRANSFORMERS = ("torch", "transformers.models.auto.modeling_auto", "transformers.modeling_utils")
VLLM = ("vllm.v1.engine.llm_engine", "vllm.v1.worker.cpu_worker", "vllm.entrypoints.llm")
"""Nothing of ours: whether our modules are imported, and when, is what such code is about."""


class ForkServer:
    def __init__(self, imports: tuple[str, ...], env: Mapping[str, str]) -> None:
        self.broken = False
        command = [sys.executable, str(Path(__file__).with_name("fork_server.py")), *imports]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env={**os.environ, **env})
        atexit.register(self.close)

    def run(self, job: Mapping[str, object]) -> int:
        """Exit code; nothing that the code has started outlives this. Whatever ends it early, a test's time limit for
        one, ends this server too: its answers would be taken for those of jobs to come."""
        try:
            print(json.dumps(job), file=self._process.stdin, flush=True)
            group = int(self._process.stdout.readline())
            try:
                return int(self._process.stdout.readline())
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(group, signal.SIGKILL)
        except BaseException:
            self.broken = True
            self._process.kill()
            raise

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


_SERVERS: dict[tuple[str, ...], ForkServer] = {}


def server(imports: tuple[str, ...]) -> ForkServer:
    """One for each set of imports, made when it is first asked for, and anew where it broke."""
    os.environ.pop("TRANSFORMERS_VERBOSITY", None)  # our own command, if it has run here, asks for silence
    if imports not in _SERVERS or _SERVERS[imports].broken:
        _SERVERS[imports] = ForkServer(imports, {"HF_HUB_OFFLINE": "1"})
    return _SERVERS[imports]


def python(
    code: str,
    *arguments: object,
    imports: tuple[str, ...],
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    log: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """What `python -c` would give, with `imports` done. log: where all that it prints goes, and is said to be stderr.

    env: not for what one of the imports reads.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, err = (log, log) if log else (Path(folder) / "out", Path(folder) / "err")
        job = {"code": code, "arguments": [*map(str, arguments)], "env": dict(env or {}), "cwd": str(cwd or Path.cwd())}
        returncode = server(imports).run({**job, "stdout": str(out), "stderr": str(err)})
        return subprocess.CompletedProcess([code], returncode, "" if log else out.read_text(), err.read_text())
