"""Backends of the MoE layer: one signature, `reference.fused_experts`, that every backend has.

A backend is a row in BACKENDS. Tensors come first and in this order, so that the same signature serves as
a torch custom op, whose schema experts.py builds from TENSORS and OPTIONS; what is fixed per layer follows by
keyword.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from d2moe_vllm.ops import reference

TENSORS = (
    "x",
    "topk_weights",
    "topk_ids",
    "w13_delta_u",
    "w13_delta_v",
    "w13_base",
    "w13_base_columns",
    "w13_base_norms",
    "w2_delta_u",
    "w2_delta_v",
    "w2_base",
    "w2_base_columns",
    "w2_base_norms",
    "padding_mask",
)
PARAMETERS = TENSORS[3:-1]
"""The layer's own tensors, as parameters of a vLLM layer are called; each may be None."""

OPTIONS = {
    "num_experts": "int",
    "gate_rank": "int",
    "activation": "str",
    "scope": "str",
    "w13_groups": "int",
    "w13_used": "int",
    "w2_groups": "int",
    "w2_used": "int",
}
"""Keyword arguments that are constants of a layer, with their schema types; static_shapes follows x's device."""

Backend = Callable[..., Tensor]

BACKENDS: dict[str, Backend] = {
    "reference": reference.fused_experts,
}


def fused_experts(*tensors: Tensor | None, backend: str = "reference", **options: Any) -> Tensor:
    """`reference.fused_experts` by the named backend. Shapes are static wherever a graph may be captured."""
    x = tensors[0]
    assert x is not None
    return BACKENDS[backend](*tensors, **options, static_shapes=x.device.type != "cpu")
