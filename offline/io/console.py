"""The terminal as the commands write to it."""

from __future__ import annotations

from rich.console import Console


def plain_console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """Takes every string as it is, in lines and in cells of tables: names and paths are the user's or a stranger's, and
    one with `[red]` or `:x:` in it is no markup."""
    return Console(stderr=stderr, quiet=quiet, markup=False, emoji=False)
