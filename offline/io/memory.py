"""How much memory this process has held, as the system counted it."""

from __future__ import annotations

import contextlib
import gc
import resource
import sys
from pathlib import Path

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_memory() -> int:
    """Bytes this process held resident at its worst moment, since its start or `forget_peak`."""
    if STATUS.exists():
        # Not getrusage: across fork and exec that carries over what the parent process held.
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def forget_peak() -> None:
    """Lowers the peak to what is held now, so that steps of one process can be told apart. Only Linux can: elsewhere
    the peak stays that of the whole process so far."""
    gc.collect()
    with contextlib.suppress(OSError):
        CLEAR.write_text("5")  # proc(5): reset the peak resident set size
