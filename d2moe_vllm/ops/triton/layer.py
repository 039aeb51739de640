"""The layer as a sequence of launches (see docs/adr/0012-triton-backend.md); importing it imports triton."""

from __future__ import annotations

import torch
from torch import Tensor

from d2moe_vllm.ops.reference import FUNCTIONS
from d2moe_vllm.ops.triton import layout
from d2moe_vllm.ops.triton.launch import Batch, Matrices
from d2moe_vllm.ops.triton.layout import Ragged
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
    """`reference.fused_experts` for x in float32, float16 or bfloat16 and for halves that `layout.pack` returned; their
    weights are tensors, not sequences.

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
    if spec.w13.delta_first or spec.w13.base_first:
        raise ValueError("inputs of gate and up are shared out among ranks, which no checkpoint's are")
    if not len(x):
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    x = x.contiguous()
    padding = None if padding_mask is None else padding_mask.contiguous().view(torch.uint8)
    gates, ids = topk_weights.float().contiguous(), topk_ids.int().contiguous()
    batch = Batch(gates, ids, spec.num_experts, x.dtype, spec.batch_invariant)

    half2, hidden = spec.w2, x.shape[1]
    wide: int = spec.intermediate_size
    own: Ragged | None = None
    if spec.widths:
        own = layout.ragged(spec.widths, spec.skipped, spec.without, half2.delta, x.device)
        wide = max((*layout.padded_widths(spec), layout.UNIT))
    h = _gate_up(batch, x, w13, w2.channels, padding, spec, wide, own)
    # Of unequal widths the base's inputs are other channels with every expert: no tile of it is one of theirs.
    added = None if spec.widths else _added(batch, w2, half2, spec.scope, hidden, wide)
    base = None if added is not None else _base_down(batch, h, w2, half2, padding, spec, hidden)
    deltas, places = None, w2.u_index if own is None else own.place
    if _stored(w2.dense):
        dense = Matrices(w2.dense, hidden, wide, w2.dense_scales, half2.delta, half2.delta_first)
        deltas = batch.factor_product(
            "expand_down", h, dense, grouped=True, places=places, ragged=own, base=added, exact=True
        )
    elif _has_deltas(w2):
        cut = 0 if w2.delta_columns is None else half2.delta_first
        deltas = batch.factor_product(
            "expand_down" if w2.delta_columns is None else "expand_columns",
            _shrink(batch, h, w2, half2, wide, w2.v_index, own),
            Matrices(w2.delta_u, hidden, half2.ranks[0], w2.delta_u_scales, half2.delta, cut),
            grouped=True,
            places=places,
            columns=w2.delta_columns,
            column_places=w2.v_index,
            exact=True,
        )
    return batch.combine(base, deltas, w2.bias, hidden)


def _gate_up(
    batch: Batch,
    x: Tensor,
    weights: Weights,
    channels: Tensor | None,
    padding: Tensor | None,
    spec: LayerSpec,
    wide: int,
    own: Ragged | None,
) -> Tensor:
    """h [pairs, wide]. channels: down's; own: what kernels are told where experts keep some channels only."""
    half, hidden = spec.w13, x.shape[1]
    added = _added(batch, weights, half, spec.scope, len(half.ranks) * spec.intermediate_size, hidden)
    z = None if added is not None else _base_gate_up(batch, x, weights, half, padding, spec)
    shrunk = u = None
    whole, rank = False, sum(half.ranks)
    if weights.bases is not None:
        bases = Matrices(weights.bases, rank, hidden, weights.bases_scales, half.delta)
        parts = batch.mixed_product(x, bases, weights.alpha, gate_rank=half.ranks[0], function=spec.function)
        u, shrunk = Matrices(weights.a, wide, rank, weights.a_scales, half.delta), batch.added(parts)
    elif _stored(weights.dense):
        whole = True
        u, shrunk = Matrices(weights.dense, wide, hidden, weights.dense_scales, half.delta), x
    elif _has_deltas(weights):
        u = Matrices(weights.delta_u, wide, rank, weights.delta_u_scales, half.delta)
        shrunk = _shrink(batch, x, weights, half, hidden, weights.v_index if own is None else own.place)
    return batch.expand_and_activate(
        shrunk,
        u,
        z,
        width=wide,
        ranks=(hidden,) * len(half.ranks) if whole else half.ranks,
        whole=whole,
        places=weights.u_index if own is None else own.place,
        columns=weights.delta_columns,
        column_places=weights.v_index,
        ragged=own,
        channels=None if own is None or (z is None and added is None) else channels,
        base=added,
        bias=weights.bias,
        activation=str(spec.activation),
        swiglu=spec.swiglu,
    )


def _added(batch: Batch, weights: Weights, half: HalfSpec, scope: str, width: int, inputs: int) -> Matrices | None:
    """The base, where it is to be added to whole deltas before one product: both packed, of the same inputs."""
    how, columns = half.base, weights.base_columns
    if how is None or half.delta is None or weights.base is None or not _stored(weights.dense) or not batch.adds_bases:
        return None
    selects = scope != "off" and columns is not None and half.used < len(columns)
    if selects or half.base_first != half.delta_first or (columns is not None and len(columns) != inputs):
        return None
    return Matrices(weights.base, width, inputs, weights.base_scales, how, half.base_first)


def _stored(deltas: Tensor | None) -> bool:
    """Whether any expert that is here has such a delta: a rank may have trimmed experts only, and so nothing stored."""
    return deltas is not None and deltas.numel() > 0


def _has_deltas(weights: Weights) -> bool:
    vs = (weights.delta_v, weights.delta_columns, weights.shared_v)
    return _stored(weights.delta_u) and any(map(_stored, vs))


def _shrink(
    batch: Batch,
    x: Tensor,
    weights: Weights,
    half: HalfSpec,
    inputs: int,
    places: Tensor | None,
    ragged: Ragged | None = None,
) -> Tensor:
    """s [rows, k] = V x, rows being pairs, or x's own rows for a V that all experts share.

    Where V only names columns it is x itself, and the expanding kernel looks them up. ragged: as of x's columns.
    """
    if weights.delta_columns is not None:
        return x
    rank = sum(half.ranks)
    if weights.shared_v is not None:
        # Once per token, however many experts it goes to.
        shared = Matrices(weights.shared_v, rank, inputs, weights.shared_v_scales, half.delta, half.delta_first)
        return batch.added(batch.factor_product("shrink", x, shared, grouped=False))
    own = Matrices(weights.delta_v, rank, inputs, weights.delta_v_scales, half.delta, half.delta_first)
    return batch.added(batch.factor_product("shrink", x, own, grouped=True, places=places, ragged=ragged))


def _base_gate_up(
    batch: Batch, x: Tensor, weights: Weights, half: HalfSpec, padding: Tensor | None, spec: LayerSpec
) -> Tensor | None:
    """z [parts, tokens, 2 I], or [parts, tokens, I] of experts without a gate; None without a base."""
    width, hidden = spec.intermediate_size, x.shape[1]
    if weights.base_u is not None and weights.base_v is not None:
        shrunk = batch.added(batch.factor_product("shrink", x, _base_v(weights, half, hidden), grouped=False))
        z = batch.empty(1, batch.tokens, len(half.base_ranks) * width, dtype=x.dtype)
        for part in range(len(half.base_ranks)):
            s, u = _base_u(weights, half, shrunk, width, part)
            out = z[..., part * width : (part + 1) * width]
            batch.factor_product("expand_down", s, u, grouped=False, out=out)
        return z
    if weights.base is None:
        return None
    # As many ascending columns as there are inputs are all of them.
    columns = weights.base_columns
    inputs = None if columns is None or len(columns) == hidden else columns
    return _base(batch, x, inputs, weights, half, padding, spec.scope, len(half.ranks) * width)


def _base_down(
    batch: Batch,
    h: Tensor,
    weights: Weights,
    half: HalfSpec,
    padding: Tensor | None,
    spec: LayerSpec,
    hidden: int,
) -> Tensor | None:
    """float32 [parts, tokens, H], None without a base."""
    inner = spec.intermediate_size
    spots = None
    if spec.widths and weights.channels is not None and inner:
        spots = weights.channels[-spec.num_experts * inner :].view(spec.num_experts, inner)
    if weights.base_u is not None and weights.base_v is not None:
        mix = batch.mix(h, None, h.dtype)
        shrunk = batch.added(batch.factor_product("shrink", mix, _base_v(weights, half, inner), grouped=False))
        return batch.factor_product("expand_down", *_base_u(weights, half, shrunk, hidden), grouped=False, exact=True)
    if weights.base is None:
        return None
    columns, norms = weights.base_columns, weights.base_norms
    inputs = None if columns is None or len(columns) == inner else columns
    # A selection sees the mix unrounded, as the reference's does: it must not depend on the type.
    selects = spec.scope != "off" and norms is not None and half.used < len(norms)
    mix = batch.mix(h, inputs, torch.float32 if selects else h.dtype, spots)
    return _base(batch, mix, None, weights, half, padding, spec.scope, hidden, exact=True)


def _base(
    batch: Batch,
    x: Tensor,
    inputs: Tensor | None,
    weights: Weights,
    half: HalfSpec,
    padding: Tensor | None,
    scope: str,
    width: int,
    *,
    exact: bool = False,
) -> Tensor:
    """[parts, tokens, width]: what a base gives for x's columns `inputs`, None for all, or for those of them that are
    chosen."""
    norms = weights.base_norms
    packed, chosen = x if inputs is None else None, None
    if norms is not None:
        packed, chosen = batch.used_inputs(x, inputs, norms, padding, half, scope)
    assert packed is not None
    assert weights.base is not None
    packed = packed.to(batch.dtype)
    if half.base is None:
        return batch.base_product(packed, weights.base, chosen, exact=exact)
    if chosen is not None:
        # Of an input that is not chosen no code can be left out: it is multiplied with zero.
        assert norms is not None
        zeros = packed.new_zeros(len(packed), len(norms))
        packed = zeros.index_copy_(1, chosen.long(), packed)
    base = Matrices(weights.base, width, packed.shape[1], weights.base_scales, half.base, half.base_first)
    return batch.factor_product("base", packed, base, grouped=False, exact=exact)


def _base_v(weights: Weights, half: HalfSpec, inputs: int) -> Matrices:
    assert weights.base_v is not None
    rank = sum(half.base_ranks)
    return Matrices(weights.base_v, rank, inputs, weights.base_v_scales, half.base, half.base_first)


def _base_u(weights: Weights, half: HalfSpec, shrunk: Tensor, width: int, part: int = 0) -> tuple[Tensor, Matrices]:
    """What a part's U is multiplied with, of shrunk [tokens, ranks], and that U."""
    assert weights.base_u is not None
    first, rank = sum(half.base_ranks[:part]), half.base_ranks[part]
    own = shrunk[:, first : first + rank]
    if half.base is None:
        return own, Matrices(weights.base_u[:, first : first + rank], width, rank)
    assert weights.base_u_scales is not None
    found, at, at_scales = Matrices(weights.base_u, width, rank, weights.base_u_scales, half.base), 0, 0
    for before in half.base_ranks[:part]:
        one = found._replace(inputs=before)
        at += one.places // layout.UNIT * half.base.bits * one.stride
        at_scales += one.groups * one.stride
    return own, found._replace(values=weights.base_u[at:], scales=weights.base_u_scales[at_scales:])
