"""The recipes that come with d2moe-vllm: reviewed files for all model families, for any ratio."""

from __future__ import annotations

import difflib
from pathlib import Path

from offline.errors import InputError
from offline.source.families import FAMILIES

_FILES = {path.stem: path for path in sorted(Path(__file__).parent.glob("*.yaml"))}
SHIPPED = {name: _FILES[family.recipe or name] for name, family in sorted(FAMILIES.items())}
"""By family; families with experts of the same kind share a file."""


def find_recipe(given: str) -> Path:
    """The file of --recipe: a path, or the name of a shipped recipe ("mixtral"), which a model's folder may share.

    Raises InputError, with the nearest names, where it is neither.
    """
    path = Path(given).expanduser()
    if path.exists() and not path.is_dir():
        return path
    if given in SHIPPED:
        return SHIPPED[given]
    near = difflib.get_close_matches(path.stem, SHIPPED, n=3, cutoff=0.4) or list(SHIPPED)
    raise InputError(f"recipe {given} cannot be read: no such file, and no shipped recipe; nearest: {', '.join(near)}")
