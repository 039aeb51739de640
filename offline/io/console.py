"""The terminal as the commands write to it."""

from __future__ import annotations

import os
from typing import IO

from rich.console import Console


class _Console(Console):
    """Goes on where whoever reads has had enough, as `head` has: what was to be done is done."""

    def on_broken_pipe(self) -> None:
        hush(self.file)


def hush(stream: IO[str]) -> None:
    """From now on what is printed to a stream, and to no other, goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def plain_console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """Takes every string as it is, in lines and in cells of tables: names and paths are the user's or a stranger's, and
    one with `[red]` or `:x:` in it is no markup."""
    return _Console(stderr=stderr, quiet=quiet, markup=False, emoji=False)
