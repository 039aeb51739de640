"""Backends of the MoE layer: one signature, `reference.fused_experts`, that every backend has.

A backend is a row in BACKENDS. A torch custom op knows no structures: experts.py builds its schema from INPUTS,
PARAMETERS and OPTIONS, and `fused_experts` puts the flat list together again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from d2moe_vllm.ops import reference

INPUTS = ("x", "topk_weights", "topk_ids")
PARAMETERS = tuple(f"{half}_{field}" for half in ("w13", "w2") for field in reference.Weights._fields)
"""The layer's own tensors, by their names in a vLLM layer; each may be None."""

OPTIONS = {
    "num_experts": "int",
    "intermediate_size": "int",
    "ranks": "int[]",
    "base_ranks": "int[]",
    "groups": "int[]",
    "used": "int[]",
    "activation": "str",
    "scope": "str",
    "batch_invariant": "bool",
}
"""Keyword arguments that are constants of a layer, with their schema types; static_shapes follows x's device."""

Backend = Callable[..., Tensor]

BACKENDS: dict[str, Backend] = {
    "reference": reference.fused_experts,
}
DEFAULT_BACKEND = "reference"


def fused_experts(
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *parameters: Tensor | None,
    padding_mask: Tensor | None = None,
    backend: str = DEFAULT_BACKEND,
    **options: Any,
) -> Tensor:
    """`reference.fused_experts` by the named backend, parameters in the order of PARAMETERS.

    Shapes are static wherever a graph may be captured.
    """
    half = len(PARAMETERS) // 2
    w13, w2 = (reference.Weights._make(tensors) for tensors in (parameters[:half], parameters[half:]))
    return BACKENDS[backend](
        x, topk_weights, topk_ids, w13, w2, padding_mask, **options, static_shapes=x.device.type != "cpu"
    )
