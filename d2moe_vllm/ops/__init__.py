"""Backends of the MoE layer: one signature, `reference.fused_experts`, that every backend has.

A backend is a row in BACKENDS. A torch custom op knows no structures: experts.py builds its schema from INPUTS,
PARAMETERS and OPTIONS, and `fused_experts` puts the flat list together again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from d2moe_vllm.ops import cpu, reference, triton

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
    "function": "str",
    "batch_invariant": "bool",
    "backend": "str",
}
"""Keyword arguments that are constants of a layer, with their schema types; static_shapes follows x's device."""

PACK_OPTIONS = ("ranks", "base_ranks", "used", "scope")
"""Those that a backend's `pack` is told."""


class Backend(NamedTuple):
    """fused_experts: see `reference.fused_experts`. devices: torch's device types it runs on, None for all.

    pack: (w13, w2, **PACK_OPTIONS) -> the halves in the backend's own layout, called once after loading; None where it
    takes them as they are. missing: why it cannot be used on this machine, in one line; None if it can.
    check: hold it against the reference when a model is loaded (selfcheck.py), as it has never run on such devices.
    lacks: kinds of deltas (checkpoint.Delta) that it cannot compute with.
    """

    fused_experts: Callable[..., Tensor]
    devices: tuple[str, ...] | None = None
    pack: Callable[..., tuple[reference.Weights, reference.Weights]] | None = None
    missing: Callable[[], str | None] = lambda: None
    check: bool = False
    lacks: frozenset[str] = frozenset()


BACKENDS: dict[str, Backend] = {
    "cpu": Backend(cpu.fused_experts, ("cpu",), cpu.pack, cpu.missing),
    # ROCm's devices are "cuda" to torch, too.
    "triton": Backend(triton.fused_experts, ("cuda",), missing=triton.missing, check=True),
    "reference": Backend(reference.fused_experts),
}
"""By preference."""


def choose_backend(
    device: str, asked: str | None = None, deltas: Collection[str] = ("factors",)
) -> tuple[str, str | None]:
    """The backend for a device type, and why it is not a better one. Raises ValueError, in one line, where the one
    that is asked for cannot be used. deltas: what kinds of them a layer has."""
    able = [name for name, backend in BACKENDS.items() if backend.devices is None or device in backend.devices]
    if asked is not None and asked not in able:
        raise ValueError(f"backend {asked!r} is none of those for this device: {', '.join(able)}")
    reasons: list[str] = []
    for name in able if asked is None else [asked]:
        reason = None
        if lacking := sorted(BACKENDS[name].lacks & set(deltas)):
            reason = f"it has no kernel for deltas of kind {' and '.join(map(repr, lacking))} yet"
        if (reason := reason or BACKENDS[name].missing()) is None:
            return name, "; ".join(reasons) or None
        reasons.append(f"backend {name!r} cannot be used: {reason}")
    raise ValueError(reasons[0])


def halves(parameters: Sequence[Tensor | None]) -> tuple[reference.Weights, reference.Weights]:
    """Tensors in the order of PARAMETERS as gate's and up's and down's."""
    half = len(PARAMETERS) // 2
    return reference.Weights._make(parameters[:half]), reference.Weights._make(parameters[half:])


def flat(w13: reference.Weights, w2: reference.Weights) -> list[Any]:
    """The reverse of `halves`."""
    return [*w13, *w2]


def fused_experts(
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *parameters: Tensor | None,
    padding_mask: Tensor | None = None,
    backend: str,
    **options: Any,
) -> Tensor:
    """`reference.fused_experts` by the named backend, parameters in the order of PARAMETERS.

    Shapes are static wherever a graph may be captured. Raises ValueError for weights it has no kernel for.
    """
    w13, w2 = halves(parameters)
    for kind in BACKENDS[backend].lacks:
        if getattr(w13, kind) is not None or getattr(w2, kind) is not None:
            raise ValueError(f"backend {backend!r} has no kernel for {kind!r}; use 'reference'")
    return BACKENDS[backend].fused_experts(
        x, topk_weights, topk_ids, w13, w2, padding_mask, **options, static_shapes=x.device.type != "cpu"
    )
