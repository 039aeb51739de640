"""What is in a compressed checkpoint: parameters and bytes stored, ranks, columns and errors per layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from d2moe_vllm.checkfiles import check_checkpoint
from d2moe_vllm.checkpoint import ROLES, STATS_FILE, CheckpointError
from offline.shards import Reader


def inspect(folder: Path) -> dict[str, Any]:
    """Everything `d2moe inspect --json` prints, counted from the files themselves.

    Raises CheckpointError for a checkpoint that is not whole.
    """
    config = check_checkpoint(folder)
    reader = Reader(folder)
    experts = config.expert_tensors()
    stored = sum(reader.specs[name].numel for name in experts)
    stored_bytes = sum(reader.specs[name].nbytes for name in experts)
    dense = config.num_experts * 3 * config.hidden_size * config.intermediate_size * len(config.layers)
    return {
        "path": str(folder),
        "method": config.method,
        "format_version": config.format_version,
        "family": config.family,
        "source": config.source.model_dump(),
        "scope": config.pruning.scope,
        "parameters": reader.parameters,
        "bytes": reader.nbytes,
        "stored_ratio": 1 - reader.nbytes / config.source.bytes,
        "experts": {
            "parameters": stored,
            "bytes": stored_bytes,
            "dense_parameters": dense,
            "ratio": 1 - stored / dense,
        },
        "layers": {
            str(number): {role: layer[role].model_dump() for role in ROLES} for number, layer in config.layers.items()
        },
        "statistics": _statistics(folder),
    }


def _statistics(folder: Path) -> dict[str, Any]:
    path = folder / STATS_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); copy it again") from None
    try:
        for report in content["layers"].values():
            if not all(report["relative_error"][role] for role in ROLES) or not report["tokens"]:
                raise ValueError
    except (KeyError, TypeError, AttributeError, ValueError):
        raise CheckpointError(f"{path}: not the statistics of every layer; copy it again") from None
    return content
