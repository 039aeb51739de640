"""Which processes are running."""

from __future__ import annotations

import os
from pathlib import Path


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
