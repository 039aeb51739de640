"""The Triton backend in Triton's interpreter, on CPU tensors, whatever mode this process otherwise uses Triton in."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Before the mode is changed: what triton itself has of functions stays compiled.
from triton.runtime import interpreter

from d2moe_vllm.ops import triton as package
from d2moe_vllm.ops.weights import LayerSpec, Weights

MODULES = ("layer", "launch", "layout", "tiles", "routing", "selection", "products", "stored", "sums")
DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
    ),
]


def modules(device: str) -> SimpleNamespace:
    """The package's modules by name: for "cpu" a second copy of them, whose kernels are interpreted.

    triton.jit decides when it decorates, so these are imported anew, and the others put back in their place.
    """
    if device != "cpu":
        return SimpleNamespace(**{name: importlib.import_module(f"{package.__name__}.{name}") for name in MODULES})
    prefix = f"{package.__name__}."
    compiled = {name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith(prefix)}
    # `from package import module` takes the package's attribute, where there is one.
    attributes = {name: value for name, value in vars(package).items() if f"{prefix}{name}" in compiled}
    for name in attributes:
        delattr(package, name)
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        found = SimpleNamespace(**{name: importlib.import_module(prefix + name) for name in MODULES})
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before
        for name in [name for name in sys.modules if name.startswith(prefix)]:
            del sys.modules[name]
            vars(package).pop(name[len(prefix) :], None)
        sys.modules.update(compiled)
        vars(package).update(attributes)
    return found


def call(self: Any, *args: Any, **kwargs: Any) -> Any:
    """A function that a kernel calls, interpreted. The interpreter itself puts its own into `triton.language` anew
    before every such call, which takes longer than all that the function does; it has done so when the kernel began."""
    if any(value is interpreter.tl.core for value in self.fn.__globals__.values()):
        interpreter._patch_lang(self.fn)
    return self.rewrite()(*args, **kwargs)


interpreter.InterpretedFunction.__call__ = call


@contextmanager
def products_by_rows() -> Iterator[None]:
    """The interpreter's dot product with the same bits for a row wherever in its block it stands, as in a GPU's; the
    matrix product of numpy that it is otherwise depends on that."""
    builder = interpreter.InterpreterBuilder
    before = builder.create_dot

    def by_rows(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.stack([row @ b for row in a] if a.ndim == 2 else [by_rows(*pair) for pair in zip(a, b, strict=True)])

    def create_dot(self: Any, a: Any, b: Any, d: Any, *precision: Any) -> Any:
        product = by_rows(a.data.astype(np.float32), b.data.astype(np.float32))
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    builder.create_dot = create_dot
    try:
        yield
    finally:
        builder.create_dot = before


class Backend:
    """fused_experts on a device, with and for tensors on the CPU."""

    def __init__(self, device: str) -> None:
        self.device, self.modules = device, modules(device)
        self.dtypes = [torch.float32, torch.float16] + [torch.bfloat16] * (device != "cpu")
        """The interpreter's dot product is wrong in bfloat16."""

    def to(self, arguments: list[Any]) -> list[Any]:
        def move(value: Any) -> Any:
            if isinstance(value, Weights):
                return Weights(*map(move, value))
            return value.to(self.device) if isinstance(value, torch.Tensor) else value

        return list(map(move, arguments))

    def run(self, arguments: list[Any], spec: LayerSpec) -> torch.Tensor:
        return self.modules.layer.fused_experts(*self.to(arguments), spec).cpu()


REFUSED = ("_local_scalar_dense", "nonzero", "item", "is_nonzero", "masked_select", "unique", "equal", "bincount")


class Shapes(TorchDispatchMode):
    """Records torch's operators with their outputs' shapes; refuses those that make the host wait for a value."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        assert not name.startswith(REFUSED), name
        out = func(*args, **(kwargs or {}))
        self.seen.append((name, tuple(out.shape) if isinstance(out, torch.Tensor) else None))
        return out


def shapes_seen(backend: Backend, arguments: list[Any], spec: LayerSpec, other: list[list[int]]) -> list[list[Any]]:
    """What Shapes records of a layer with three tokens, all routed alike; and with `other` routing, all zeros."""
    seen = []
    for ids, scale in (([[0, 1]] * 3, 1.0), (other, 0.0)):
        with Shapes() as shapes:
            new_ids = torch.tensor(ids, dtype=torch.int32, device=backend.device)
            backend.modules.layer.fused_experts(arguments[0] * scale, arguments[1], new_ids, *arguments[3:], spec)
        seen.append(shapes.seen)
    return seen
