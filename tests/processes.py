"""Which processes are running, and runs of `d2moe compress` in process groups of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from compression import ROOT, script

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
    """`d2moe compress SOURCE OUT ...`, to be killed, stopped or watched; its working folder lies beside OUT."""

    def __init__(self, source: Path, out: Path, *arguments: object) -> None:
        command = [script("d2moe"), "compress", *map(str, (source, out, *arguments))]
        self.out, self.work = out, out.with_name(out.name + ".d2moe-work")
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, **THREADS},
            cwd=ROOT,
        )

    def wait_for_work(self) -> bool:
        """Until it has locked its working folder, before which it writes nothing; False if it ended before that."""
        return self.wait_for(self._has_lock)

    def wait_for(self, happens: Callable[[], object]) -> bool:
        deadline = time.monotonic() + PATIENCE
        while not happens():
            assert time.monotonic() < deadline
            if self.process.poll() is not None:
                return False
            time.sleep(0.003)
        return True

    def _has_lock(self) -> bool:
        marker, folder = str(self.work / ".d2moe-work"), Path(f"/proc/{self.process.pid}/fd")
        try:
            return any(os.readlink(link) == marker for link in folder.iterdir())
        except OSError:  # a file that was closed meanwhile, or the process has ended
            return False

    def send(self, number: signal.Signals) -> None:
        os.killpg(self.process.pid, number)

    def kill(self) -> bool:
        """SIGKILL to the whole group; False if it had ended by itself."""
        if self.process.poll() is not None:
            return False
        self.send(signal.SIGKILL)
        return self.end().returncode == -signal.SIGKILL

    def end(self) -> subprocess.CompletedProcess[str]:
        out, err = self.process.communicate(timeout=PATIENCE)
        return subprocess.CompletedProcess(self.process.args, self.process.returncode, out, err)
