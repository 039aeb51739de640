"""What a vLLM worker keeps of a model, as torch sees it; runs in the worker."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

SIDES = ("input", "output")


def live_storage(model: nn.Module) -> dict[str, int]:
    """Bytes by kind, every storage once.

    experts: of our layers, with whatever else hangs on them or on their methods; others: parameters and buffers of all
    other modules; linear: weights that vLLM has put into a oneDNN object, where torch does not see them any more.
    """
    found, seen = {"experts": 0, "others": 0, "linear": 0}, set[int]()
    for name, module in model.named_modules():
        kind = "experts" if ".experts" in name else "others"
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if kind == "experts":
            tensors += [*_tensors(vars(module)), *_tensors(getattr(module, "quant_method", None))]
        for storage in (tensor.untyped_storage() for tensor in tensors):
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                found[kind] += storage.nbytes()
        weight = getattr(module, "weight", None)
        if hasattr(module, "cpu_linear") and weight is not None and weight.numel() == 0:
            # Of replicated ones there is no part.
            sizes = (getattr(module, f"{side}_size_per_partition", getattr(module, f"{side}_size")) for side in SIDES)
            found["linear"] += math.prod(sizes) * weight.element_size()
    return found


def _tensors(value: Any, depth: int = 3) -> Iterator[Tensor]:
    """Tensors in attributes, lists, tuples and dicts, and in objects of our own package."""
    if isinstance(value, Tensor):
        yield value
    elif depth:
        ours = type(value).__module__.startswith("d2moe_vllm")
        value = vars(value) if ours and hasattr(value, "__dict__") else value
        members = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
        for member in members:
            yield from _tensors(member, depth - 1)
