"""CPU backend: the layer in C++, over weights packed once after loading (csrc/layer.h, csrc/kernels.h).

Equals ops.reference.fused_experts within rounding. A row's result does not depend on the other rows, nor on the number
of threads, to the last bit, in scopes "off" and "token".
"""

from __future__ import annotations

import ctypes
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from d2moe_vllm.ops.cpu.compiler import CompilerError
from d2moe_vllm.ops.cpu.library import I64, Call, Half, Matrices, load
from d2moe_vllm.ops.cpu.pack import DTYPES, by_columns, in_bytes, pack, refuse_unknown, selects
from d2moe_vllm.ops.packing import Packing
from d2moe_vllm.ops.weights import HalfSpec, LayerSpec, Weights

__all__ = ["CompilerError", "fused_experts", "fused_experts_int8", "load", "missing", "pack", "pack_int8"]

SCOPES = ("off", "token", "batch")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu2")
FUNCTIONS = ("silu", "tanh")
"""By their numbers in api.cpp and layer.h."""


@cache
def missing() -> str | None:
    """Why the library cannot be had on this machine, in one line; None if it is there. Compiles it the first time,
    and tries no second time: every layer asks."""
    try:
        load()
    except CompilerError as error:
        return str(error)
    return None


def fused_experts(
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    w13: Weights,
    w2: Weights,
    padding_mask: Tensor | None,
    spec: LayerSpec,
    *,
    int8: bool = False,
) -> Tensor:
    """`reference.fused_experts` for halves that `pack` returned, x on the CPU in float32, float16 or bfloat16.

    int8: what a matrix of fewer than 8 bits is multiplied with is rounded to 8 bits: the inputs of each of the matrix's
    groups to 127 steps of the largest among them. The backend is always batch-invariant, and static_shapes has no
    meaning here. Raises ValueError for an unknown scope or activation, for a clamped SwiGLU of another than silu or
    without a gate, and for weights that no checkpoint has.
    """
    refuse_unknown(w13, w2, spec)
    if spec.swiglu and spec.activation != "silu":
        raise ValueError(f"a clamped SwiGLU has silu in it, not {spec.activation!r}")
    x = x.contiguous()
    gates, ids = topk_weights.float().contiguous(), topk_ids.int().contiguous()
    mask = None if padding_mask is None else padding_mask.contiguous()
    y = torch.empty_like(x)
    # Kept until the call returns, as all that it is given pointers of.
    widths = _widths(spec.widths, spec.skipped, spec.without) if spec.widths else None
    call = Call(
        w13=_half(w13, spec.w13, spec, x.shape[1], x.shape[1], widths, int8),
        w2=_half(
            w2, spec.w2, spec, spec.intermediate_size, max(spec.widths, default=spec.intermediate_size), widths, int8
        ),
        x=x.data_ptr(),
        gates=gates.data_ptr(),
        ids=ids.data_ptr(),
        padding=None if mask is None else mask.data_ptr(),
        y=y.data_ptr(),
        widths=None if widths is None else widths.channels.data_ptr(),
        skipped=None if widths is None else widths.skipped.data_ptr(),
        channels=_pointer(w2.channels) if spec.widths and spec.intermediate_size else None,
        tokens=x.shape[0],
        top_k=ids.shape[1],
        experts=spec.num_experts,
        hidden=x.shape[1],
        intermediate=spec.intermediate_size,
        dtype=DTYPES.index(x.dtype),
        scope=SCOPES.index(spec.scope),
        activation=ACTIVATIONS.index(spec.activation),
        parts=len(spec.w13.ranks),
        swiglu=(ctypes.c_float * 3)(*spec.swiglu),
    )
    if x.shape[0]:
        load().d2moe_fused_experts(ctypes.byref(call))
    return y


pack_int8, fused_experts_int8 = partial(pack, int8=True), partial(fused_experts, int8=True)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class _Widths(NamedTuple):
    """int32 [E] of experts that keep some channels only: how many are here, how many are elsewhere before them, and
    each one's place among those that have deltas, -1 for none."""

    channels: Tensor
    skipped: Tensor
    places: Tensor


@cache
def _widths(widths: tuple[int, ...], skipped: tuple[int, ...], without: tuple[int, ...]) -> _Widths:
    own = {expert: place for place, expert in enumerate(e for e in range(len(widths)) if e not in without)}
    places = [own.get(expert, -1) for expert in range(len(widths))]
    return _Widths(*(torch.tensor(values, dtype=torch.int32, device="cpu") for values in (widths, skipped, places)))


def _matrices(
    values: Tensor | None, scales: Tensor | None, how: Packing | None, first: int = 0, *, int8: bool
) -> Matrices:
    if how is None:
        return Matrices(_pointer(values), None, 0, 1, 0, 0)
    return Matrices(_pointer(values), _pointer(scales), how.bits, how.group_size, first, in_bytes(how, int8))


def _half(
    weights: Weights, half: HalfSpec, spec: LayerSpec, inputs: int, whole: int, widths: _Widths | None, int8: bool
) -> Half:
    """inputs: of a base without columns of its own; where experts keep some channels, all that any of them has. whole:
    of a matrix that is an expert's whole delta, at most."""
    kept = inputs if weights.base_columns is None else weights.base_columns.numel()
    u, u_scales = next(
        (
            (values, scales)
            for values, scales in (
                (weights.delta_u, weights.delta_u_scales),
                (weights.a, weights.a_scales),
                (weights.dense, weights.dense_scales),
            )
            if isinstance(values, Tensor) and values.numel()
        ),
        (None, None),
    )
    v, v_scales = weights.delta_v, weights.delta_v_scales
    if weights.shared_v is not None:
        v, v_scales = weights.shared_v, weights.shared_v_scales
    # Ranks share out the inputs of a U only where these are a delta's columns.
    cut = weights.dense is not None or weights.delta_columns is not None
    return Half(
        u=_matrices(u, u_scales, half.delta, half.delta_first if cut else 0, int8=int8),
        v=_matrices(v, v_scales, half.delta, half.delta_first, int8=int8),
        base=_matrices(weights.base, weights.base_scales, half.base, half.base_first, int8=int8),
        base_u=_matrices(weights.base_u, weights.base_u_scales, half.base, int8=int8),
        base_v=_matrices(weights.base_v, weights.base_v_scales, half.base, half.base_first, int8=int8),
        bases=_matrices(weights.bases, weights.bases_scales, half.delta, int8=False),
        alpha=_pointer(weights.alpha),
        columns=_pointer(weights.delta_columns),
        u_index=_pointer(weights.u_index if widths is None else widths.places),
        v_index=_pointer(weights.v_index if widths is None else widths.places),
        base_columns=_pointer(weights.base_columns),
        base_norms=_pointer(weights.base_norms),
        bias=_pointer(weights.bias),
        bias_step=weights.bias.shape[1] if isinstance(weights.bias, Tensor) else 0,
        u_bytes=0 if u is None else u.nbytes,
        kept=kept,
        used=half.used,
        groups=half.groups,
        shared_v=weights.shared_v is not None,
        by_columns=by_columns(weights, half, spec.scope),
        selects=selects(weights, half, spec.scope),
        whole=weights.dense is not None,
        mixed=weights.alpha.shape[1] // 2 if isinstance(weights.alpha, Tensor) else 0,
        function=0 if weights.bases is None else FUNCTIONS.index(spec.function),
        # A dense matrix is a U whose V is the identity.
        rank=(I64 * 2)(*(half.ranks if weights.dense is None else (whole,) * len(half.ranks))),
        base_rank=(I64 * 2)(*half.base_ranks),
    )
