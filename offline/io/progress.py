"""Progress on stderr: a live bar on a terminal, one plain line per step in a log file."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from offline.io.console import plain_console

LOG_INTERVAL = 10.0
"""Seconds between lines where there is no terminal."""


class Steps:
    """Counts work done; shows what is being done, time elapsed and time remaining."""

    def __init__(self, total: float, console: Console | None = None) -> None:
        self._console = console or plain_console(stderr=True)
        self._total, self._done, self._resumed = total, 0.0, 0.0
        self._start = self._last = time.monotonic()
        self._label = ""
        self._progress: Progress | None = None
        if self._console.is_terminal:
            columns = (
                TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(),
                TimeElapsedColumn(), TextColumn("elapsed,"), TimeRemainingColumn(), TextColumn("left"),
            )  # fmt: skip
            self._progress = Progress(*columns, console=self._console)
            self._task = self._progress.add_task("", total=total)

    def __enter__(self) -> Steps:
        if self._progress:
            self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._progress:
            self._progress.stop()

    def skip(self, work: float, note: str = "") -> None:
        """Work that an earlier run did already."""
        self._resumed += work
        self.advance(work)
        if note:
            self._console.print(note, style="dim", highlight=False)

    def reach(self, work: float) -> None:
        """So much of the total is behind us, whatever was spared on the way."""
        if work > self._done:
            self.skip(work - self._done)

    def label(self, text: str) -> None:
        self._label = text
        if self._progress:
            self._progress.update(self._task, description=text)
        else:
            self._line()

    def advance(self, work: float) -> None:
        # Where windows do not divide evenly, the first process's part of the work is more than its share.
        self._done = min(self._done + work, self._total)
        if self._progress:
            self._progress.advance(self._task, work)
        elif time.monotonic() - self._last >= LOG_INTERVAL:
            self._line()

    def _line(self) -> None:
        self._last = time.monotonic()
        elapsed = self._last - self._start
        fresh = self._done - self._resumed
        left = f", about {elapsed / fresh * (self._total - self._done):.0f} s left" if fresh > 0 else ""
        share = 100 * self._done / self._total
        self._console.print(f"{self._label}: {share:.0f} %, {elapsed:.0f} s elapsed{left}", highlight=False)
