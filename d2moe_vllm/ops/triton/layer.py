"""The layer as a sequence of launches (see docs/adr/0012-triton-backend.md); importing it imports triton."""

from __future__ import annotations

import torch
from torch import Tensor

from d2moe_vllm.ops.reference import FUNCTIONS
from d2moe_vllm.ops.triton.launch import Batch
from d2moe_vllm.ops.weights import UNGATED_BASES, UNGATED_SWIGLU, HalfSpec, LayerSpec, Weights

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu2")
SCOPES = ("off", "token", "batch")


def fused_experts(
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    w13: Weights,
    w2: Weights,
    padding_mask: Tensor | None,
    spec: LayerSpec,
) -> Tensor:
    """`reference.fused_experts` for x in float32, float16 or bfloat16; a half's weights are tensors, not sequences.

    The same bits on every call. batch_invariant means one tile for all numbers of rows, which costs speed. Shapes are
    always static, so a CUDA graph may be captured. Raises ValueError for an unknown dtype, activation, scope or
    function.
    """
    for name, value, known in (("x's dtype", x.dtype, DTYPES), ("activation", spec.activation, ACTIVATIONS)):
        if value not in known:
            raise ValueError(f"{name} is {value!r}, not one of {', '.join(map(str, known))}")
    if spec.scope not in SCOPES:
        raise ValueError(f"scope is {spec.scope!r}, not batch, token or off")
    if spec.swiglu and spec.activation != "silu":
        raise ValueError(f"a clamped SwiGLU has silu in it, not {spec.activation!r}")
    if spec.swiglu and not spec.gate:
        raise ValueError(UNGATED_SWIGLU)
    if w13.bases is not None and not spec.gate:
        raise ValueError(UNGATED_BASES)
    if w13.bases is not None and spec.function not in FUNCTIONS:
        raise ValueError(f"function is {spec.function!r}, not one of {', '.join(FUNCTIONS)}")
    if not len(x):
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    x = x.contiguous()
    padding = None if padding_mask is None else padding_mask.contiguous().view(torch.uint8)
    gates, ids = topk_weights.float().contiguous(), topk_ids.int().contiguous()
    batch = Batch(gates, ids, spec.num_experts, x.dtype, spec.batch_invariant)

    z = _base_gate_up(batch, x, w13, spec.w13, padding, spec.scope)
    shrunk = u = None
    if w13.bases is not None:
        parts = batch.mixed_product(x, w13.bases, w13.alpha, gate_rank=spec.w13.ranks[0], function=spec.function)
        u, shrunk = w13.a, batch.added(parts)
    elif _has_deltas(w13):
        u, shrunk = w13.delta_u, _shrink(batch, x, w13)
    h = batch.expand_and_activate(
        shrunk,
        u,
        z,
        width=spec.intermediate_size,
        ranks=spec.w13.ranks,
        places=w13.u_index,
        columns=w13.delta_columns,
        column_places=w13.v_index,
        bias=w13.bias,
        activation=str(spec.activation),
        swiglu=spec.swiglu,
    )
    base = _base_down(batch, h, w2, spec.w2, padding, spec.scope)
    deltas = None
    if w2.dense is not None:
        deltas = batch.factor_product("expand_down", h, w2.dense, grouped=True, exact=True)
    elif _has_deltas(w2):
        deltas = batch.factor_product(
            "expand_down" if w2.delta_columns is None else "expand_columns",
            _shrink(batch, h, w2),
            w2.delta_u,
            grouped=True,
            places=w2.u_index,
            columns=w2.delta_columns,
            column_places=w2.v_index,
            exact=True,
        )
    return batch.combine(base, deltas, w2.bias, x.shape[1])


def _has_deltas(weights: Weights) -> bool:
    """Whether any expert that is here has a delta: a rank may have trimmed experts only, and so nothing stored."""
    vs = (weights.delta_v, weights.delta_columns, weights.shared_v)
    return weights.delta_u is not None and len(weights.delta_u) > 0 and any(v is not None and len(v) for v in vs)


def _shrink(batch: Batch, x: Tensor, weights: Weights) -> Tensor:
    """s [rows, k] = V x, rows being pairs, or x's own rows for a V that all experts share.

    Where V only names columns it is x itself, and the expanding kernel looks them up.
    """
    if weights.delta_columns is not None:
        return x
    if weights.shared_v is not None:
        # Once per token, however many experts it goes to.
        return batch.added(batch.factor_product("shrink", x, weights.shared_v, grouped=False))
    parts = batch.factor_product("shrink", x, weights.delta_v, grouped=True, places=weights.v_index)
    return batch.added(parts)


def _base_gate_up(
    batch: Batch, x: Tensor, weights: Weights, half: HalfSpec, padding: Tensor | None, scope: str
) -> Tensor | None:
    """z [parts, tokens, 2 I], or [parts, tokens, I] of experts without a gate; None without a base."""
    if weights.base_u is not None and weights.base_v is not None:
        shrunk = batch.added(batch.factor_product("shrink", x, weights.base_v, grouped=False))
        width, first = weights.base_u.shape[0], 0
        z = batch.empty(1, batch.tokens, len(half.base_ranks) * width, dtype=x.dtype)
        for part, rank in enumerate(half.base_ranks):
            ranks, outputs = slice(first, first + rank), slice(part * width, (part + 1) * width)
            b = weights.base_u[:, ranks]
            batch.factor_product("expand_down", shrunk[:, ranks], b, grouped=False, out=z[..., outputs])
            first += rank
        return z
    if weights.base is None or weights.base_columns is None or weights.base_norms is None:
        return None
    # As many ascending columns as there are inputs are all of them.
    inputs = None if len(weights.base_columns) == x.shape[1] else weights.base_columns
    packed, chosen = batch.used_inputs(x, inputs, weights.base_norms, padding, half, scope)
    return batch.base_product(packed, weights.base, chosen)


def _base_down(
    batch: Batch, h: Tensor, weights: Weights, half: HalfSpec, padding: Tensor | None, scope: str
) -> Tensor | None:
    """float32 [parts, tokens, H], None without a base."""
    if weights.base_u is not None and weights.base_v is not None:
        mix = batch.mix(h, None, h.dtype)
        shrunk = batch.added(batch.factor_product("shrink", mix, weights.base_v, grouped=False))
        return batch.factor_product("expand_down", shrunk, weights.base_u, grouped=False, exact=True)
    if weights.base is None or weights.base_columns is None or weights.base_norms is None:
        return None
    inputs = None if len(weights.base_columns) == h.shape[1] else weights.base_columns
    # A selection sees the mix unrounded, as the reference's does: it must not depend on the type.
    selects = scope != "off" and half.used < len(weights.base_norms)
    mix = batch.mix(h, inputs, torch.float32 if selects else h.dtype)
    packed, chosen = batch.used_inputs(mix, None, weights.base_norms, padding, half, scope)
    return batch.base_product(packed, weights.base, chosen, exact=True)
