"""Code in a checkpoint's folder: what `trust_remote_code` would run, and whether it is what d2moe wrote."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from d2moe_vllm.families import MODELING_FILE, auto_map, checkpoint_modeling_source
from d2moe_vllm.format.config import MANIFEST_FILE, CheckpointConfig, Manifest
from offline.source.families import FAMILIES


def modeling_sha256() -> str:
    """SHA-256 of the modeling file that this release writes into checkpoints, as hex digits."""
    return hashlib.sha256(checkpoint_modeling_source().encode()).hexdigest()


def check_code(folder: Path, config: CheckpointConfig | None, manifest: Manifest | None) -> tuple[list[str], list[str]]:
    """Problems and notes, one line each: the modeling file, who else is named to be run, other Python files.

    Names are looked for where transformers looks for them: in config.json and tokenizer_config.json, and in the folder
    `custom_generate`, which it runs without being told.
    """
    problems, notes = [], []
    modeling = folder / MODELING_FILE
    if not modeling.is_file():
        problems.append(f"{folder}: {MODELING_FILE} is missing, plain transformers needs it; copy it again")
    else:
        found = hashlib.sha256(modeling.read_bytes()).hexdigest()
        written = manifest.modeling_sha256 if manifest else None
        if written and found != written:
            problems.append(
                f"{modeling}: its SHA-256 is not that of {MANIFEST_FILE}, and trust_remote_code would run it; "
                "copy the file again"
            )
        elif found != modeling_sha256():
            notes.append(
                f"{modeling} is not this d2moe-vllm's: another release wrote it, or somebody changed it; "
                "trust_remote_code would run it"
            )
    if config and (ours := _written(config)):
        named = _auto_map(folder / "config.json")
        if named is not None and named != ours:
            problems.append(
                f"{folder / 'config.json'}: auto_map is not d2moe's, and trust_remote_code would run what it names; "
                "restore the original config.json"
            )
    if _auto_map(folder / "tokenizer_config.json"):
        notes.append(f"{folder / 'tokenizer_config.json'} names code by auto_map; trust_remote_code would run it")
    if (folder / "custom_generate").exists():
        problems.append(
            f"{folder / 'custom_generate'}: d2moe writes no such folder, and trust_remote_code would run what is in "
            "it; delete it"
        )
    code = (path.relative_to(folder) for path in folder.rglob("*.py"))
    if others := sorted(str(path) for path in code if path != Path(MODELING_FILE)):
        notes.append(f"{folder}: {', '.join(others)}: code that d2moe did not write; trust_remote_code may run it")
    return problems, notes


def _written(config: CheckpointConfig) -> dict[str, str] | None:
    """auto_map as d2moe writes it; None for a family that this release, or this transformers, does not know."""
    if not config.family_row and config.family not in FAMILIES:
        return None
    try:
        return auto_map(config.family)
    except KeyError:
        return None


def _auto_map(path: Path) -> Any:
    """None where there is none, or the file cannot be read, which others report."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content.get("auto_map") if isinstance(content, dict) else None
