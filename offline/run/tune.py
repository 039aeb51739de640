"""What `d2moe tune` tunes for, and whether it can."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from d2moe_vllm.format.config import CheckpointConfig, Scope
from d2moe_vllm.format.files import read_config
from offline.errors import InputError
from offline.source.families import find_family

DEFAULT_RATIO = 0.4


def tune(
    checkpoint: Path | None,
    shape: str | None,
    ratio: float | None,
    scope: Scope | None,
    output: Path | None,
    steps: Callable[[float], Any],
) -> dict[str, Any]:
    """See d2moe_vllm.tuning.tune.tune. Raises InputError."""
    import torch

    from d2moe_vllm.ops.triton import missing, tiles
    from d2moe_vllm.tuning import tune as tuner

    config, top_k = what(checkpoint, shape, ratio, scope)
    if not torch.cuda.is_available():
        raise InputError("tune times kernels on a GPU, and torch finds none here; run it on the machine that serves")
    if (reason := missing()) is not None:
        raise InputError(f"Triton's kernels cannot be compiled: {reason}")
    return tuner.tune(config, top_k, output or tiles.user_folder(), steps)


def what(
    checkpoint: Path | None, shape: str | None, ratio: float | None, scope: Scope | None
) -> tuple[CheckpointConfig, int]:
    """The layers to tune for, and to how many experts a token goes. Raises InputError and CheckpointError."""
    from d2moe_vllm.ops.shapes import SHAPES
    from d2moe_vllm.tuning.workload import uniform_config

    if (checkpoint is None) == (shape is None):
        raise InputError("tune for what? name a compressed checkpoint's folder, or a model: --shape Mixtral-8x7B")
    if checkpoint is not None:
        if ratio is not None:
            raise InputError("a checkpoint has its ratio already; leave --ratio out")
        config = read_config(checkpoint)
        pruning = config.pruning.model_copy(update={"scope": scope or config.pruning.scope})
        return config.model_copy(update={"pruning": pruning}), _experts_per_token(checkpoint)
    if shape not in SHAPES:
        raise InputError(f"no shape {shape!r}; there are {', '.join(SHAPES)}, or name a checkpoint's folder")
    if not 0 < (ratio := DEFAULT_RATIO if ratio is None else ratio) < 1:
        raise InputError(f"--ratio {ratio} is not between 0 and 1")
    return uniform_config(SHAPES[shape], ratio, scope or "off"), SHAPES[shape].top_k


def _experts_per_token(checkpoint: Path) -> int:
    found = json.loads((checkpoint / "config.json").read_text())
    family = find_family(found)
    key = family.experts_per_token_key
    if not isinstance(top_k := family.settings(found).get(key), int) or top_k < 1:
        raise InputError(f"{checkpoint}: config.json has no {key}; restore the original one")
    return top_k
