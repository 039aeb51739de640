"""Bytes and seconds as people read them."""

from __future__ import annotations

FLOAT32, FLOAT64 = 4, 8
"""Bytes of a number."""


def size(count: float) -> str:
    """Bytes with a decimal unit, as disks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
