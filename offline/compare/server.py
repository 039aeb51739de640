"""A `vllm serve` process as a context manager: started, waited for, and stopped with all its children."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

PR_SET_PDEATHSIG = 1


class ServerError(RuntimeError):
    """The server did not come up; the message ends with the last lines of its log."""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


# Opened here and not after the fork: other threads may hold the loader's lock then.
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def _die_with_parent() -> None:
    # Whatever happens to us, SIGKILL included, the server gets a SIGTERM. Linux only; elsewhere
    # the context manager alone has to do.
    if _LIBC is not None:
        _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


class Server:
    """Serves `model` on a free port of 127.0.0.1 while the `with` block runs.

    arguments: further options of `vllm serve`; log: file for its output; timeout: seconds to come up; trust: code that
    came with the model may run.
    Raises ServerError where it exits or does not answer in time.
    """

    def __init__(
        self,
        model: Path,
        arguments: Sequence[str] = (),
        *,
        log: Path,
        env: Mapping[str, str] | None = None,
        timeout: float = 600,
        waiting: Callable[[], None] = lambda: None,
        trust: bool = True,
    ) -> None:
        self.port = free_port()
        self.log = log
        self._timeout, self._waiting = timeout, waiting
        vllm = Path(sys.executable).with_name("vllm")
        self.command = [
            str(vllm), "serve", str(model), *(["--trust-remote-code"] if trust else []),
            "--host", "127.0.0.1", "--port", str(self.port), *arguments,
        ]  # fmt: skip
        self._env = {**os.environ, **(env or {})}

    @property
    def base_url(self) -> str:
        """For OpenAI clients."""
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> Server:
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._env,
                start_new_session=True,  # a process group of its own, so that none of its children is missed
                preexec_fn=_die_with_parent,  # noqa: PLW1509 - one system call, no lock
            )
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    def _wait(self) -> None:
        deadline = time.monotonic() + self._timeout
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise ServerError(f"the server exited with {self.process.returncode}; {self._tail()}")
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                self._waiting()
                time.sleep(0.5)
        raise ServerError(f"the server did not answer within {self._timeout:.0f} s; {self._tail()}")

    def _tail(self, lines: int = 15) -> str:
        text = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]
        return f"its log ({self.log}) ends with:\n" + "\n".join(text)

    def stop(self) -> None:
        """Terminate the server; then kill what is left of its process group."""
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
