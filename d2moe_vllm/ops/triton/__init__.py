"""GPU backend: the layer in Triton kernels, over weights as they are loaded (docs/adr/0012-triton-backend.md), or laid
anew once where they are of few bits or of unequal widths (docs/adr/0023-few-bits-on-a-gpu.md).

triton is imported by the first call, not by this module.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from typing import Any

from torch import Tensor

from d2moe_vllm.ops.triton.layout import pack

__all__ = ["fused_experts", "missing", "pack"]


def missing() -> str | None:
    """Why kernels cannot be compiled on this machine, in one line; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install triton"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "triton finds no C compiler; install gcc or clang, or name one by CC"
    return None


def fused_experts(*arguments: Any) -> Tensor:
    """`layer.fused_experts`, imported when first called."""
    from d2moe_vllm.ops.triton import layer

    return layer.fused_experts(*arguments)
