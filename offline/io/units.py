"""Bytes and seconds as people read them."""

from __future__ import annotations

import math

FLOAT32, FLOAT64 = 4, 8
"""Bytes of a number."""


def size(count: float) -> str:
    """Bytes with a decimal unit, as disks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def size_above(count: int) -> str:
    """As an option takes it, three digits of it, and never less than `count` bytes: "5.29GB"."""
    unit, name = next((unit, name) for unit, name in ((10**9, "GB"), (10**6, "MB"), (1, "B")) if count >= unit)
    places = max(2 - int(math.log10(count / unit)), 0) if unit > 1 else 0
    return f"{math.ceil(count / unit * 10**places) / 10**places:.{places}f}{name}"


def durations(least: float, most: float) -> str:
    """One, or from the one to the other."""
    words = [duration(seconds) for seconds in (least, most)]
    return words[1] if words[0] == words[1] else " to ".join(words)


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
