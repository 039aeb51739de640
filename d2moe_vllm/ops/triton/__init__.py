"""GPU backend: the layer in Triton kernels, over weights as they are loaded (docs/adr/0012-triton-backend.md).

triton is imported by the first call, not by this module.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Sequence

from torch import Tensor

from d2moe_vllm.ops.reference import Weights

__all__ = ["fused_experts", "missing"]


def missing() -> str | None:
    """Why kernels cannot be compiled on this machine, in one line; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install triton"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "triton finds no C compiler; install gcc or clang, or name one by CC"
    return None


def fused_experts(
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    w13: Weights,
    w2: Weights,
    padding_mask: Tensor | None,
    *,
    num_experts: int,
    intermediate_size: int,
    ranks: Sequence[int],
    base_ranks: Sequence[int],
    groups: Sequence[int],
    used: Sequence[int],
    activation: str,
    scope: str,
    function: str = "",
    batch_invariant: bool = False,
    static_shapes: bool = False,
) -> Tensor:
    """`reference.fused_experts` for x in float32, float16 or bfloat16; a half's weights are tensors, not sequences.

    The same bits on every call. batch_invariant: with scope "off" or "token" each bit of a row depends on that row
    alone; one tile for all numbers of rows, which costs speed. static_shapes: they always are, so a CUDA graph may be
    captured. Raises ValueError for an unknown dtype, activation or scope.
    """
    from d2moe_vllm.ops.triton import layer

    return layer.fused_experts(
        x,
        topk_weights,
        topk_ids,
        w13,
        w2,
        padding_mask,
        num_experts=num_experts,
        intermediate_size=intermediate_size,
        ranks=ranks,
        base_ranks=base_ranks,
        groups=groups,
        used=used,
        activation=activation,
        scope=scope,
        batch_invariant=batch_invariant,
    )
