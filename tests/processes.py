"""Which processes are running, and runs of `d2moe compress` in process groups of their own."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from offline.cli import main

THREADS = {"OMP_NUM_THREADS": "1"}
"""The order of sums, and so the last bits, depend on it."""
PATIENCE = 300.0


def processes(fragment: str) -> list[str]:
    """Command lines of running processes that mention `fragment`, ours and pytest's own excluded."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            environment = (folder / "environ").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if fragment in command + environment and folder.name != str(os.getpid()):
            found.append(f"{folder.name}: {command}")
    return found


class Compression:
    """`d2moe compress SOURCE OUT ...`, to be killed, stopped or watched; its working folder lies beside OUT.

    A process and a process group of its own, forked from one that has imported torch already: starting Python and torch
    anew takes longer than the tests' compressions.
    """

    def __init__(self, source: Path, out: Path, *arguments: object) -> None:
        self.out, self.work = out, out.with_name(out.name + ".d2moe-work")
        self._said = Path(tempfile.mkstemp(suffix=".stderr")[1])
        os.environ |= THREADS  # as the forking process is started with the first run, and keeps them
        self.process = CONTEXT.Process(
            target=_compress, args=(["compress", *map(str, (source, out, *arguments))], self._said)
        )
        self.process.start()

    def wait_for_work(self) -> bool:
        """Until it has locked its working folder, before which it writes nothing; False if it ended before that."""
        return self.wait_for(self._has_lock)

    def wait_for(self, happens: Callable[[], object]) -> bool:
        deadline = time.monotonic() + PATIENCE
        while not happens():
            assert time.monotonic() < deadline
            if self.process.exitcode is not None:
                return False
            time.sleep(0.003)
        return True

    def _has_lock(self) -> bool:
        """Held, not only opened: it is stopped right afterwards in some tests."""
        try:
            inode = (self.work / ".d2moe-work").stat().st_ino
        except OSError:
            return False
        locks = (line.split() for line in Path("/proc/locks").read_text().splitlines())
        return any(
            lock[1] == "FLOCK" and lock[4] == str(self.process.pid) and lock[5].endswith(f":{inode}") for lock in locks
        )

    def send(self, number: signal.Signals) -> None:
        """To the whole group, which there is once the work has begun."""
        os.killpg(self.process.pid, number)

    def kill(self) -> bool:
        """SIGKILL; False if it had ended by itself."""
        if self.process.exitcode is not None:
            return False
        self.send(signal.SIGKILL)
        return self.end().returncode == -signal.SIGKILL

    def end(self) -> subprocess.CompletedProcess[str]:
        self.process.join(timeout=PATIENCE)
        code, said = self.process.exitcode, self._said.read_text()
        assert code is not None, said
        return subprocess.CompletedProcess([], code, "", said)


CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["offline.cli", "offline.run.compress"])


def _compress(arguments: list[str], said: Path) -> None:
    os.setsid()
    with (
        said.open("w", buffering=1) as error,
        Path(os.devnull).open("w") as out,
        contextlib.redirect_stderr(error),
        contextlib.redirect_stdout(out),
    ):
        main(arguments)
