"""What files are called in tables, pages and cards."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from pathlib import Path


def readable(name: str) -> str:
    """A name as text that can be written anywhere: bytes of it that are no UTF-8 become U+FFFD."""
    return os.fsencode(name).decode(errors="replace")


def labels(texts: Sequence[Path]) -> list[str]:
    """Texts by their names, by their paths where two have one name, numbered where that tells them apart no better."""
    names = [readable(path.name) for path in texts]
    chosen = [name if names.count(name) == 1 else readable(str(path)) for name, path in zip(names, texts, strict=True)]
    found: list[str] = []
    for label in chosen:
        numbered = (f"{label} ({number})" for number in itertools.count(2))
        found.append(label if label not in found else next(one for one in numbered if one not in (*chosen, *found)))
    return found
