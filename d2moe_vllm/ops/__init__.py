"""Backends of the MoE layer: one signature, `reference.fused_experts`, that every backend has.

A backend is a row in BACKENDS. A torch custom op knows no structures: it is given the layer's tensors one by one, by
PARAMETERS (`flat`, `halves`), and its LayerSpec as a text (`encoded`, `decoded`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

from torch import Tensor

from d2moe_vllm.ops import cpu, reference, triton
from d2moe_vllm.ops.packing import Packing
from d2moe_vllm.ops.weights import HalfSpec, LayerSpec, Weights

PARAMETERS = tuple(f"{half}_{field}" for half in ("w13", "w2") for field in Weights._fields)
"""The layer's own tensors, by their names in a vLLM layer; each may be None."""
FusedExperts = Callable[[Tensor, Tensor, Tensor, Weights, Weights, Tensor | None, LayerSpec], Tensor]
"""The signature of `reference.fused_experts`."""
Pack = Callable[[Weights, Weights, LayerSpec], tuple[Weights, Weights]]


class Backend(NamedTuple):
    """fused_experts: see `reference.fused_experts`. devices: torch's device types it runs on, None for all.

    pack: the halves in the backend's own layout, called once after loading; None where it takes them as they are.
    by_scope: whether what was packed serves the spec's scope alone.
    opted: used where it is asked for, and never chosen.
    missing: why it cannot be used on this machine, in one line; None if it can.
    check: hold it against the reference when a model is loaded (selfcheck.py), as it has never run on such devices.
    """

    fused_experts: FusedExperts
    devices: tuple[str, ...] | None = None
    pack: Pack | None = None
    missing: Callable[[], str | None] = lambda: None
    check: bool = False
    by_scope: bool = False
    opted: bool = False


BACKENDS: dict[str, Backend] = {
    "cpu": Backend(cpu.fused_experts, ("cpu",), cpu.pack, cpu.missing, by_scope=True),
    # Computes something else: only where it is asked for.
    "cpu-int8": Backend(cpu.fused_experts_int8, ("cpu",), cpu.pack_int8, cpu.missing, by_scope=True, opted=True),
    # ROCm's devices are "cuda" to torch, too.
    "triton": Backend(triton.fused_experts, ("cuda",), triton.pack, triton.missing, check=True),
    "reference": Backend(reference.fused_experts),
}
"""By preference."""


def choose_backend(device: str, asked: str | None = None) -> tuple[str, str | None]:
    """The backend for a device type, and why it is not a better one. Raises ValueError, in one line, where the one
    that is asked for cannot be used."""
    able = [name for name, backend in BACKENDS.items() if backend.devices is None or device in backend.devices]
    if asked is not None and asked not in able:
        raise ValueError(f"backend {asked!r} is none of those for this device: {', '.join(able)}")
    reasons: list[str] = []
    for name in [name for name in able if not BACKENDS[name].opted] if asked is None else [asked]:
        if (reason := BACKENDS[name].missing()) is None:
            return name, "; ".join(reasons) or None
        reasons.append(f"backend {name!r} cannot be used: {reason}")
    raise ValueError(reasons[0])


def halves(parameters: Sequence[Tensor | None]) -> tuple[Weights, Weights]:
    """Tensors in the order of PARAMETERS as gate's and up's and down's."""
    half = len(PARAMETERS) // 2
    return Weights._make(parameters[:half]), Weights._make(parameters[half:])


def flat(w13: Weights, w2: Weights) -> list[Any]:
    """The reverse of `halves`."""
    return [*w13, *w2]


def encoded(spec: LayerSpec) -> str:
    """A spec whose activation is a name, as JSON: by the names of all its fields, in their order."""

    def plain(value: Any) -> Any:
        return {k: plain(v) for k, v in value._asdict().items()} if hasattr(value, "_asdict") else value

    return json.dumps(plain(spec), separators=(",", ":"))


@cache
def decoded(text: str) -> LayerSpec:
    """The reverse of `encoded`, parsed once. Raises KeyError for a text whose fields are not those of today."""
    kinds: dict[frozenset[str], Any] = {frozenset(kind._fields): kind for kind in (LayerSpec, HalfSpec, Packing)}

    def structure(fields: dict[str, Any]) -> Any:
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
        return kinds[frozenset(fields)](**values)

    return json.loads(text, object_hook=structure)


def fused_experts(
    backend: str,
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    w13: Weights,
    w2: Weights,
    padding_mask: Tensor | None,
    spec: LayerSpec,
) -> Tensor:
    """`reference.fused_experts` by the named backend."""
    return BACKENDS[backend].fused_experts(x, topk_weights, topk_ids, w13, w2, padding_mask, spec)
