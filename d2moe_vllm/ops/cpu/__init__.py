"""CPU backend: the layer in C++, over weights packed once after loading (csrc/layer.h, csrc/kernels.h).

Equals ops.reference.fused_experts within rounding. A row's result does not depend on the other rows, nor on the number
of threads, to the last bit, in scopes "off" and "token".
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from d2moe_vllm.ops.cpu.compiler import CompilerError
from d2moe_vllm.ops.cpu.library import I64, Call, Half, load
from d2moe_vllm.ops.weights import HalfSpec, LayerSpec, Weights

__all__ = ["CompilerError", "fused_experts", "load", "missing", "pack"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SCOPES = ("off", "token", "batch")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
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


def pack(w13: Weights, w2: Weights, spec: LayerSpec) -> tuple[Weights, Weights]:
    """The two halves of a layer in this backend's layout; what is packed is flat, all else the same tensor.

    `fused_experts` has to be given the same spec. What is packed takes the storage of the original where both have one
    size: packing then needs the room of one tensor more for a moment, and none afterwards.
    Raises ValueError for weights that no checkpoint has.
    """
    _refuse_unknown(w13, w2)
    return _pack(w13, spec.w13, spec.scope), _pack(w2, spec.w2, spec.scope)


def _refuse_unknown(w13: Weights, w2: Weights) -> None:
    """Raises ValueError for what a validated checkpoint does not have and the kernels would leave out."""
    if w2.bases is not None or w13.dense is not None:
        raise ValueError("bases are for gate and up alone, dense matrices for down alone")
    if any((kind is None) != (w13.bases is None) for kind in (w13.alpha, w13.a)):
        raise ValueError("bases need a and alpha, and the other way round")


def _pack(weights: Weights, half: HalfSpec, scope: str) -> Weights:
    packed = {}
    if weights.delta_u is not None and len(weights.delta_u):
        packed["delta_u"] = _pack_factors(weights.delta_u, half.ranks)
    if weights.dense is not None:
        packed["dense"] = _pack_factors(weights.dense)
    if weights.bases is not None and weights.a is not None:
        packed["a"] = _pack_factors(weights.a, half.ranks)
        packed["bases"] = _pack_mixed(weights.bases, half.ranks)
    if isinstance(weights.delta_v, Tensor):
        packed["delta_v"] = _pack_factors(weights.delta_v)
    if weights.shared_v is not None:
        packed["shared_v"] = _pack_factors(weights.shared_v.unsqueeze(0))
    if weights.base is not None:
        # Where some columns will be left out, a layout of its own lets them be skipped.
        if _by_columns(half, len(weights.base), scope):
            packed["base"] = _pack_bases(weights.base, len(half.ranks))
        else:
            by_outputs = _pack_factors(weights.base.t().unflatten(0, (len(half.ranks), -1)))
            packed["base"] = _in_place(weights.base, by_outputs)
    if weights.base_u is not None and weights.base_v is not None:
        packed["base_u"] = _pack_factors(weights.base_u.unsqueeze(0), half.base_ranks)
        packed["base_v"] = _pack_factors(weights.base_v.unsqueeze(0))
    return weights._replace(**packed)


def _by_columns(half: HalfSpec, kept: int, scope: str) -> bool:
    return scope != "off" and half.used < kept


def _pack_factors(w: Tensor, ranks: Sequence[int] | None = None) -> Tensor:
    """w [D, out, k]: flat, factor by factor. ranks: w's columns are several factors, packed one after another."""
    library, dtype = load(), DTYPES.index(w.dtype)
    parts = w.split(list(ranks), dim=2) if ranks else [w]
    sizes = [len(p) * library.d2moe_packed_size(dtype, p.shape[1], p.shape[2]) for p in parts]
    packed = torch.empty(sum(sizes), dtype=w.dtype)
    for part, to in zip(parts, packed.split(sizes), strict=True):
        strides = (I64 * 3)(*part.stride())
        library.d2moe_pack_factors(dtype, part.data_ptr(), strides, *part.shape, to.data_ptr())
    return _in_place(w, packed)


def _pack_mixed(w: Tensor, ranks: Sequence[int]) -> Tensor:
    """w [m, k, in], of which V's are mixed: flat, gate's rows before up's."""
    library, dtype = load(), DTYPES.index(w.dtype)
    parts = w.split(list(ranks), dim=1)
    sizes = [len(p) * library.d2moe_packed_size(dtype, p.shape[1], p.shape[2]) for p in parts]
    packed = torch.empty(sum(sizes), dtype=w.dtype)
    for part, to in zip(parts, packed.split(sizes), strict=True):
        library.d2moe_pack_mixed(dtype, part.data_ptr(), (I64 * 3)(*part.stride()), *part.shape, to.data_ptr())
    return _in_place(w, packed)


def _pack_bases(w: Tensor, parts: int) -> Tensor:
    """w [kept, parts * out]: flat, packed part by part."""
    library, dtype = load(), DTYPES.index(w.dtype)
    w = w.contiguous()
    kept, out = w.shape[0], w.shape[1] // parts
    packed = torch.empty(parts * library.d2moe_packed_base_size(dtype, out, kept), dtype=w.dtype)
    library.d2moe_pack_bases(dtype, w.data_ptr(), w.stride(0), parts, out, kept, packed.data_ptr())
    return _in_place(w, packed)


def _in_place(w: Tensor, packed: Tensor) -> Tensor:
    kept = w.reshape(-1).copy_(packed) if w.is_contiguous() and w.numel() == packed.numel() else packed
    load().d2moe_huge_pages(kept.data_ptr(), kept.nbytes)
    return kept


def fused_experts(
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    w13: Weights,
    w2: Weights,
    padding_mask: Tensor | None,
    spec: LayerSpec,
) -> Tensor:
    """`reference.fused_experts` for halves that `pack` returned, x on the CPU in float32, float16 or bfloat16.

    It is always batch-invariant, and static_shapes has no meaning here. Raises ValueError for an unknown scope or
    activation, and for weights that no checkpoint has.
    """
    _refuse_unknown(w13, w2)
    x = x.contiguous()
    gates, ids = topk_weights.float().contiguous(), topk_ids.int().contiguous()
    mask = None if padding_mask is None else padding_mask.contiguous()
    y = torch.empty_like(x)
    call = Call(
        w13=_half(w13, spec.w13, spec),
        w2=_half(w2, spec.w2, spec),
        x=x.data_ptr(),
        gates=gates.data_ptr(),
        ids=ids.data_ptr(),
        padding=None if mask is None else mask.data_ptr(),
        y=y.data_ptr(),
        tokens=x.shape[0],
        top_k=ids.shape[1],
        experts=spec.num_experts,
        hidden=x.shape[1],
        intermediate=spec.intermediate_size,
        dtype=DTYPES.index(x.dtype),
        scope=SCOPES.index(spec.scope),
        activation=ACTIVATIONS.index(spec.activation),
    )
    if x.shape[0]:
        load().d2moe_fused_experts(ctypes.byref(call))
    return y


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _half(weights: Weights, half: HalfSpec, spec: LayerSpec) -> Half:
    kept = 0 if weights.base_columns is None else weights.base_columns.numel()
    us = (weights.delta_u, weights.a, weights.dense)
    u = next((u for u in us if isinstance(u, Tensor) and u.numel()), None)
    return Half(
        u=_pointer(u),
        v=_pointer(weights.delta_v if weights.shared_v is None else weights.shared_v),
        base=_pointer(weights.base),
        base_u=_pointer(weights.base_u),
        base_v=_pointer(weights.base_v),
        bases=_pointer(weights.bases),
        alpha=_pointer(weights.alpha),
        columns=_pointer(weights.delta_columns),
        u_index=_pointer(weights.u_index),
        v_index=_pointer(weights.v_index),
        base_columns=_pointer(weights.base_columns),
        base_norms=_pointer(weights.base_norms),
        u_size=0 if u is None else u.numel(),
        kept=kept,
        used=half.used,
        groups=half.groups,
        shared_v=weights.shared_v is not None,
        by_columns=_by_columns(half, kept, spec.scope),
        whole=weights.dense is not None,
        mixed=weights.alpha.shape[1] // 2 if isinstance(weights.alpha, Tensor) else 0,
        function=0 if weights.bases is None else FUNCTIONS.index(spec.function),
        # A dense matrix is a U whose V is the identity.
        rank=(I64 * 2)(*(half.ranks if weights.dense is None else (spec.intermediate_size,))),
        base_rank=(I64 * 2)(*half.base_ranks),
    )
