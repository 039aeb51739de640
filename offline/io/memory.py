"""How much memory this process has held, as the system counted it, and giving back what it does not hold any more."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import resource
import sys
from collections.abc import Callable
from pathlib import Path

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_memory() -> int:
    """Bytes this process held resident at its worst moment, since its start or `forget_peak`."""
    if STATUS.exists():
        # Not getrusage: across fork and exec that carries over what the parent process held.
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def give_back() -> None:
    """What was freed goes back to the system. glibc keeps it for later allocations, which need it elsewhere: a layer's
    backward pass leaves a gigabyte so, on top of which the next step puts its own."""
    if trim := _malloc_trim():
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    """None where the C library is another one."""
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # no such function; no C library to be had so
        return None
    return trim


def forget_peak() -> None:
    """Lowers the peak to what is held now, so that steps of one process can be told apart. Only Linux can: elsewhere
    the peak stays that of the whole process so far."""
    gc.collect()
    with contextlib.suppress(OSError):
        CLEAR.write_text("5")  # proc(5): reset the peak resident set size
