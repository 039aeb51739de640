"""Files that one process at a time may hold."""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock, Timeout

from offline.errors import InputError


def hold(path: Path, taken: str) -> FileLock:
    """The lock on a file, which is made; it is given back by `release` and by the end of the process, however it ends.

    Raises InputError, saying `taken`, where another process holds it, OSError where the file cannot be made.
    """
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise InputError(taken) from None
    return lock
