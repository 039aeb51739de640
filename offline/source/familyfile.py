"""A --family-file: the row of a family that d2moe has none of, in YAML."""

from __future__ import annotations

import difflib
import json
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from d2moe_vllm.format.config import first_error
from d2moe_vllm.format.familyrow import FamilyRow, ReleasedRow
from d2moe_vllm.format.files import refuse_special
from d2moe_vllm.format.recipefile import NoAliases
from offline.errors import InputError
from offline.source.families import FAMILIES, UNSUPPORTED, from_row
from offline.source.family import Family

LARGEST = 100_000
"""Bytes of such a file."""


class _KeysOnce(NoAliases):
    """YAML itself takes the last of two."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := next((key for n, key in enumerate(keys) if key in keys[:n]), None):
            raise yaml.YAMLError(f"it says {twice} twice; leave one of them")
        return super().construct_mapping(node, deep)


def read_family_file(path: Path) -> Family:
    """The family that a file describes. Raises InputError, one line that names the key and the mend."""
    try:
        refuse_special(path, LARGEST)
        content = yaml.load(path.read_text(encoding="utf-8"), _KeysOnce)
        text = json.dumps(content)
    except Exception as error:  # YAML's tags make its reader raise nearly everything there is
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"--family-file {path} cannot be read: {reason}") from None
    if not isinstance(content, dict):
        raise InputError(f"--family-file {path}: expected `key: value` lines, found {type(content).__name__}")
    try:
        # As JSON, where strictness tells a number from a string but takes a list.
        row = FamilyRow.model_validate_json(text, strict=True)
        family = from_row(row)
    except ValidationError as error:
        raise InputError(f"--family-file {path}: {_explain(error)}") from None
    except InputError as error:
        raise InputError(f"--family-file {path}: {error}") from None
    if row.model_type in FAMILIES:
        raise InputError(f"--family-file {path}: d2moe has a row of {row.model_type!r} itself; leave the option out")
    if row.model_type in UNSUPPORTED:
        why = UNSUPPORTED[row.model_type]
        raise InputError(f"--family-file {path}: no row can describe {row.model_type!r}: {why}")
    return family


def _explain(error: ValidationError) -> str:
    # A misspelt key comes first: it is often why another one is missing.
    finding = min(error.errors(include_url=False), key=lambda one: one["type"] != "extra_forbidden")
    *section, key = [str(part) for part in finding["loc"]] or [""]
    if finding["type"] == "extra_forbidden":
        valid = list((ReleasedRow if section else FamilyRow).model_fields)
        near = difflib.get_close_matches(key, valid, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"valid keys: {', '.join(valid)}"
        return f"unknown key {'.'.join([*section, key])!r}; {hint}"
    if finding["type"] == "missing":
        return f"{'.'.join([*section, key])} is missing; add it (docs/methods.md, A family without a row)"
    return f"{first_error(error)}; mend it (docs/methods.md, A family without a row)"


def written(row: FamilyRow, notes: Iterable[str]) -> str:
    """A row as such a file, with notes as comments; what is left at its default is a comment too."""
    content = row.model_dump(mode="json", exclude_none=True)
    usual = {key: field.default for key, field in FamilyRow.model_fields.items() if not field.is_required()}
    lines = [f"# {note}" for note in notes]
    left = []
    for key in FamilyRow.model_fields:
        if key in usual and getattr(row, key) == usual[key]:
            left.append(f"{key}: {json.dumps(usual[key])}")
        else:
            lines += yaml.safe_dump({key: content[key]}, sort_keys=False, width=1000).splitlines()
    lines += [f"# {line}  (the default)" for line in left]
    return "\n".join(lines) + "\n"
