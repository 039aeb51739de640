"""The files that carry numbers from workers to the front-end: prometheus_client's multiprocess format.

One file per process and type of metric. Their names begin as that format wants it, and go on so that nobody
else's are taken for ours.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from prometheus_client import Metric as Family
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.multiprocess import MultiProcessCollector

from d2moe_vllm.observability.metrics import Metric

MARK = "_d2moe-"
PREFIXES = {"counter": "counter", "summary": "summary", "gauge": "gauge_max"}
"""Gauges of the same labels agree, or name their rank: any of them will do where several processes write one."""


SIZE = 1 << 20
"""Bytes of a file from its beginning: room for 2048 series (tested) and some more: none grows."""


class Sample(NamedTuple):
    metric: Metric
    suffix: str
    labels: tuple[str, ...]
    value: float


class Writer:
    """This process's files in `folder`; those of an earlier process of the same id are replaced."""

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, MmapedDict] = {}
        self._paths = {kind: folder / f"{prefix}{MARK}{os.getpid()}.db" for kind, prefix in PREFIXES.items()}
        for path in self._paths.values():
            path.unlink(missing_ok=True)

    def write(self, samples: Iterable[Sample]) -> None:
        new: set[str] = set()
        for metric, suffix, labels, value in samples:
            if (kind := metric.type) not in self._files:
                new.add(kind)
                self._files[kind] = _open(self._hidden(kind))
            key = mmap_key(metric.name, metric.name + suffix, list(metric.labels), list(labels), metric.help)
            self._files[kind].write_value(key, value, 0.0)
        for name in sorted(new):
            # Readers look for *.db: they never see a file that is being made.
            self._hidden(name).rename(self._paths[name])

    def _hidden(self, kind: str) -> Path:
        return self._paths[kind].with_suffix(".new")


def _open(path: Path) -> MmapedDict:
    """A new file whose blocks exist: writing to a mapped file on a full disk would end the process by a signal.

    Raises OSError where there is no room.
    """
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, SIZE)
    return MmapedDict(str(path))


def collect(folder: str) -> Iterable[Family]:
    """The merged metrics of all processes that wrote to `folder`. Raises OSError or RuntimeError."""
    return MultiProcessCollector.merge([str(path) for path in _ours(folder)])


def remove_dead(folder: str) -> None:
    """Removes the files of processes that are no more, which matters only in a folder that outlives the server."""
    for path in _ours(folder):
        with contextlib.suppress(ValueError, PermissionError):
            try:
                os.kill(int(path.stem.partition(MARK)[2]), 0)
            except ProcessLookupError:
                path.unlink(missing_ok=True)


def _ours(folder: str) -> list[Path]:
    return sorted(Path(folder).glob(f"*{MARK}*.db"))
