"""New folders and files that are there whole or not at all: put together next to their place, renamed at the end."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from offline.errors import InputError
from offline.io.locks import hold


def check_new_folder(out: Path, what: str = "folder") -> None:
    """Raises InputError where `out` would replace something or cannot be made. what: a folder, or a file."""
    if os.path.lexists(out):
        raise InputError(f"{out} exists already; choose another {what} or remove it")
    if not out.parent.is_dir():
        raise InputError(f"{out.parent} is no folder; create it first")
    if not os.access(out.parent, os.W_OK):
        raise InputError(f"{out.parent} is not writable; choose another folder")


def check_space(parent: Path, needed: int) -> None:
    """Raises InputError where a folder's disk has less than `needed` bytes free."""
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise InputError(f"No space left for {needed:,} bytes under {parent}: {free:,} are free; free some space")


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """An empty folder to fill, renamed to `out` when the block ends well and removed when it does not.

    What a killed run left is replaced. Raises InputError where another process writes the same folder just now, or
    `out` has come into being meanwhile.
    """
    partial, beside = (out.with_name(f".{out.name}.{end}") for end in ("partial", "lock"))
    lock = hold(beside, f"another run is writing {out}; wait for it, or choose another folder")
    try:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir()
        try:
            yield partial
            sync_folder(partial)
            if os.path.lexists(out):
                raise InputError(f"{out} has appeared meanwhile; choose another folder or remove it")
            partial.rename(out)
            try:
                sync_folder(out.parent)
            except BaseException:
                # A name that a power failure may take away again is no result, and the caller would delete what
                # it was made from.
                out.rename(partial)
                raise
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    finally:
        beside.unlink(missing_ok=True)
        lock.release()


def new_file(out: Path, content: str) -> None:
    """A text file that is whole under its name, on disk, and replaces nothing.

    Raises InputError where `out` has come into being since it was checked.
    """
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if os.path.lexists(out):
            raise InputError(f"{out} has appeared meanwhile; choose another file or remove it")
        partial.rename(out)
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(out.parent)


def sync_folder(folder: Path) -> None:
    """Makes names in a folder survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
