"""The recipe in a checkpoint, which a stranger may have written: it is shown, and never obeyed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from d2moe_vllm.format.config import RECIPE_FILE, CheckpointError
from d2moe_vllm.format.files import refuse_special

MAX_RECIPE = 1 << 20
"""Bytes; ours have two thousand."""


class NoAliases(yaml.SafeLoader):
    """A few lines of aliases of aliases are gigabytes once they are written as JSON; no file of ours has any."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not read here")
        return super().compose_node(parent, index)


def read_recipe(folder: Path) -> dict[str, Any]:
    """What JSON and UTF-8 can say, all keys strings. Raises CheckpointError, in one line, for anything else."""
    path = folder / RECIPE_FILE
    try:
        refuse_special(path, MAX_RECIPE)
        content = yaml.load(path.read_text(encoding="utf-8"), NoAliases)
        plain = json.dumps(content, allow_nan=False, ensure_ascii=False).encode("utf-8")
    except Exception as error:  # YAML's tags make its reader raise nearly everything there is
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{path} cannot be read ({reason}); copy it again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a recipe; copy it again")
    return json.loads(plain)
