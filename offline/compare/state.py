"""What `d2moe compare` remembers in its working folder: a file per row, trusted only by what made it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from offline.errors import InputError
from offline.io.locks import hold
from offline.io.shards import write_file

MARKER_FILE = ".d2moe-compare"
"""Lock, and sign that a folder is ours."""


class RowState:
    """What is remembered of one row in the file `path`; nothing where something else than `made_from` made it."""

    def __init__(self, path: Path, made_from: Mapping[str, Any]) -> None:
        self.path, self._made_from = path, made_from
        self.row: dict[str, Any] = {}
        self.perplexities: dict[str, float] = {}
        self.served: dict[str, dict[str, Any]] = {}
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["made_from"] == made_from:
                self.row, self.perplexities = dict(found["row"]), dict(found["perplexity"])
                self.served = dict(found.get("served", {}))

    def forget(self) -> None:
        """Before the checkpoint that the row is about is made anew: a kill must not leave one with another's row."""
        self.path.unlink(missing_ok=True)
        self.row, self.perplexities, self.served = {}, {}, {}

    def save(self) -> None:
        content = {
            "made_from": self._made_from, "row": self.row, "perplexity": self.perplexities, "served": self.served,
        }  # fmt: skip
        self.path.parent.mkdir(exist_ok=True)
        write_file(self.path, json.dumps(content, indent=1) + "\n")


@contextlib.contextmanager
def own_folder(path: Path) -> Iterator[None]:
    """The working folder, made and locked. Raises InputError where it is not ours, or another run uses it."""
    try:
        if path.is_dir() and not (path / MARKER_FILE).exists() and any(path.iterdir()):
            raise InputError(f"working folder {path} is not empty and not of d2moe compare; choose another --workdir")
        path.mkdir(parents=True, exist_ok=True)
        lock = hold(path / MARKER_FILE, f"another run is using {path}; wait for it, or choose another --workdir")
    except OSError as error:
        raise InputError(f"working folder {path} cannot be used ({error.strerror}); choose another") from None
    try:
        yield
    finally:
        lock.release()
