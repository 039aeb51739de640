"""The front-end's side of the metrics: where workers write to, and how vLLM's `/metrics` shows it.

With one API server `/metrics` is prometheus_client's registry, where a collector of ours reads the workers' files.
With several, or with PROMETHEUS_MULTIPROC_DIR set, vLLM merges the files in that folder itself.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from filelock import FileLock
from prometheus_client import REGISTRY, Metric
from prometheus_client.registry import Collector

from d2moe_vllm import compat
from d2moe_vllm.observability import files

logger = compat.init_logger(__name__)

PREFIX = "d2moe-metrics-"
LOCK = "lock"

_folder: str | None = None
_held: FileLock | None = None
"""The lock of _folder."""


def prepare() -> str | None:
    """The folder that workers are to write to: vLLM's own, or a private one of this process, gone at its end.

    None where there is no such folder, with a warning: metrics never stop serving.
    """
    global _folder
    try:
        shared = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
        if not shared and _folder is None:
            _remove_abandoned()
            _folder = tempfile.mkdtemp(prefix=PREFIX)
            _lock(Path(_folder))
            atexit.register(_remove, _folder, os.getpid())
            REGISTRY.register(_WorkersCollector(_folder))
        folder = shared or _folder
        files.remove_dead(str(folder))
        return folder
    except Exception as error:
        logger.warning("d2moe: no metrics, serving goes on (%s: %s)", type(error).__name__, error)
        return None


def _lock(folder: Path) -> None:
    """Marks a folder as in use for as long as this process lives."""
    global _held
    _held = FileLock(folder / "lock.new")
    _held.acquire()
    # Only now under its name: whoever finds a lock can tell whether it is held.
    (folder / "lock.new").rename(folder / LOCK)


def _remove_abandoned() -> None:
    """What servers left behind that were killed before they could tidy up."""
    for lock in Path(tempfile.gettempdir()).glob(f"{PREFIX}*/{LOCK}"):
        with contextlib.suppress(OSError):  # another user's, or still in use
            with FileLock(lock, blocking=False):
                pass
            shutil.rmtree(lock.parent, ignore_errors=True)


def _remove(folder: str, owner: int) -> None:
    # A forked child runs its parent's exit handlers.
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)


class _WorkersCollector(Collector):
    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._warned = False

    def describe(self) -> Iterable[Metric]:
        """Nothing yet: without this the registry would collect once to learn the names."""
        return []

    def collect(self) -> Iterable[Metric]:
        try:
            return files.collect(self._folder)
        except Exception as error:
            if not self._warned:
                logger.warning("d2moe: metrics cannot be read (%s: %s)", type(error).__name__, error)
                self._warned = True
            return []
