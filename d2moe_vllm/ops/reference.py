"""The MoE layer of a d2moe checkpoint in plain torch (METHODS 1.5 and 1.6, paper eq. 10).

Two uses: the oracle that faster backends are measured against, and the code that travels inside every
checkpoint for plain transformers. For the latter it imports torch, and of ours only weights.py and packing.py.

    z   = W_b^{gate,up}[:, J] x[J]                                       once per token
    h_e = act(z^gate + U_e^gate V_e^gate x) * (z^up + U_e^up V_e^up x)   per routed expert
    y   = W_b^down[:, J2] (sum_e g_e h_e)[J2] + sum_e g_e U_e^down V_e^down h_e

Experts may have biases, which are added to what act is given, to what it is multiplied with, and, g_e times, to y. They
may be without a gate: h_e = act(z^up + U_e^up V_e^up x) then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from d2moe_vllm.ops.weights import UNGATED_SWIGLU, HalfSpec, LayerSpec, Weights, opened_half

Activation = Callable[[Tensor], Tensor]
Gated = Callable[..., Tensor]
"""Of what gate and up give, or, without a gate, of what up gives alone."""
Product = Callable[[Tensor, Tensor], Tensor]


def relu2(x: Tensor) -> Tensor:
    """ReLU, squared."""
    return F.relu(x).square()


ACTIVATIONS: dict[str, Activation] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu2": relu2,
}
"""Of what gate gives, or, without one, of what up gives; by vLLM's names."""


FUNCTIONS: dict[str, Activation] = {"silu": F.silu, "tanh": torch.tanh}
"""What may be applied to a mix of bases (METHODS 3)."""

MIXED_ROWS = 128
"""Rows of a V that are mixed from bases at once."""
TILE_ROWS = 16
"""Rows of tiled_product's products: as many as cost little more than one where reading the weights is the limit."""
VECTORS, SERIAL = 32, 16384
"""torch computes functions by vectors, but what is left over one by one, with other bits: a multiple of VECTORS values
leaves nothing over, and up to SERIAL, a multiple itself, are not shared out among threads."""


def _row_by_row(act: Activation, x: Tensor) -> Tensor:
    """`act(x)` for rows x [n, I], each bit of a row independent of the other rows and of n."""
    padded = F.pad(x, (0, -x.shape[1] % VECTORS))
    pieces = [act(piece) for row in padded.split(1) for piece in row.split(SERIAL, dim=1)]
    return torch.cat(pieces, dim=1).view(padded.shape)[:, : x.shape[1]]


def gated(act: Activation, swiglu: Sequence[float] = (), *, gate: bool = True) -> Gated:
    """act(gate) * up; or, with limit, alpha and beta, the clamped SwiGLU of LayerSpec.swiglu, act being silu; or
    act(up), of experts without a gate. Raises ValueError for a SwiGLU of those."""
    if not gate:
        if swiglu:
            raise ValueError(UNGATED_SWIGLU)
        return act
    if not swiglu:
        return lambda gate, up: act(gate) * up
    limit, alpha, beta = swiglu

    def clamped(gate: Tensor, up: Tensor) -> Tensor:
        # g * sigmoid(alpha * g) is silu(alpha * g) / alpha.
        return act(gate.clamp(max=limit) * alpha) / alpha * (up.clamp(-limit, limit) + beta)

    return clamped


def fused_experts(
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    w13: Weights,
    w2: Weights,
    padding_mask: Tensor | None,
    spec: LayerSpec,
) -> Tensor:
    """Routed experts of one layer, the base computed once per token.

    x: [T, H], any floating dtype, that of the weights. topk_weights: [T, K]. topk_ids: int [T, K]; -1 (and
    anything else outside 0..num_experts-1) is an expert that is not here and adds nothing.
    padding_mask: bool [T], True for rows that are no tokens. They get some output but influence no other.

    Returns [T, H] in x's dtype. Sums over experts are float32 (float64 for float64 inputs), rounded once.
    """
    act = ACTIVATIONS[spec.activation] if isinstance(spec.activation, str) else spec.activation
    accumulate = torch.float64 if x.dtype == torch.float64 else torch.float32
    product: Product = widened_product
    if spec.batch_invariant and not spec.static_shapes:
        product, act = tiled_product, partial(_row_by_row, act)
    gate_up, parts = gated(act, spec.swiglu, gate=spec.gate), len(spec.w13.ranks)
    w13 = opened_half(w13, spec.w13, spec, x.shape[1], x.dtype)
    w2 = opened_half(w2, spec.w2, spec, x.shape[1], x.dtype, down=True)
    z = base_product(x, w13, spec.w13, padding_mask, spec.scope, product, x.dtype)
    # A V that all experts share needs each token once, however many experts it goes to.
    shrunk = None if w13.shared_v is None else product(x, w13.shared_v.t())
    factors13, factors2 = _factors(w13, spec), _factors(w2, spec)
    has_base = w2.base is not None or w2.base_u is not None
    mix = x.new_zeros((x.shape[0], spec.intermediate_size), dtype=accumulate) if has_base else None
    ragged = bool(spec.widths) and spec.intermediate_size > 0
    output = torch.zeros_like(x, dtype=accumulate)
    visits = _visit_all if spec.static_shapes else _visit_routed
    for expert, rows, gates in visits(topk_ids, topk_weights.to(accumulate), spec.num_experts):
        if w2.bias is not None:
            _add(output, rows, gates, w2.bias[expert].to(accumulate).expand(len(gates), -1))
        if spec.widths and not spec.widths[expert]:
            continue
        own_x, own_z, own_shrunk = (t if spec.static_shapes or t is None else t[rows] for t in (x, z, shrunk))
        channels = _channels(w2.channels[expert], spec.widths[expert]) if w2.channels is not None and ragged else None
        if own_z is not None and channels is not None:
            own_z = own_z.unflatten(-1, (parts, -1)).index_select(-1, channels).flatten(-2)
        biases = None if w13.bias is None else w13.bias[expert].to(accumulate).chunk(parts)
        hidden = _hidden(
            own_x, own_z, own_shrunk, factors13(expert), spec.w13.ranks, biases, gate_up, accumulate, product
        )
        if mix is not None:
            own = (
                hidden
                if channels is None
                else mix.new_zeros(len(hidden), mix.shape[1]).index_copy_(1, channels, hidden)
            )
            _add(mix, rows, gates, own)
        if (factors := factors2(expert)) is not None:
            delta = product(_shrink(hidden.to(x.dtype), factors.v, product), factors.u.t())
            _add(output, rows, gates, factors.where_present(delta.to(accumulate)))
    if mix is not None:
        output += base_product(mix, w2, spec.w2, padding_mask, spec.scope, product, x.dtype)
    return output.to(x.dtype)


def widened_product(x: Tensor, w: Tensor) -> Tensor:
    """`x @ w` in the dtype of x, whatever w is stored in."""
    return x @ w.to(x.dtype)


def tiled_product(x: Tensor, w: Tensor) -> Tensor:
    """`x @ w` for rows x [n, in], each bit of a row independent of the other rows and of n.

    A CPU's matrix product sums in an order that depends on the number of rows: here it is always the same.
    """
    padded, w = F.pad(x, (0, 0, 0, -x.shape[0] % TILE_ROWS)), w.to(x.dtype)
    return torch.cat([tile @ w for tile in padded.split(TILE_ROWS)])[: x.shape[0]]


def base_product(
    x: Tensor,
    weights: Weights,
    half: HalfSpec,
    padding_mask: Tensor | None,
    scope: str,
    product: Product,
    dtype: torch.dtype,
) -> Tensor | None:
    """`W_b[:, J] x[J]`, or `U_b V_b x`, for rows x [T, in]: [T, out] in `dtype`, which x is rounded to after the
    selection; None without a base."""
    if weights.base_u is not None and weights.base_v is not None:
        shrunk = product(x.to(dtype), weights.base_v.t())
        if len(half.base_ranks) == 1:
            return product(shrunk, weights.base_u.t())
        return torch.cat(_expand(shrunk, weights.base_u, half.base_ranks, product), dim=-1)
    if weights.base is None:
        return None
    if weights.base_columns is None or weights.base_norms is None:
        return product(x.to(dtype), weights.base)
    kept = x.index_select(1, weights.base_columns)
    mask = select_columns(kept, weights.base_norms, padding_mask, half, scope)
    if mask is not None:
        # where, not a product: what is left out may be infinite or NaN in a padding row.
        kept = torch.where(mask, kept, 0)
    return product(kept.to(dtype), weights.base)


def select_columns(
    kept: Tensor, norms: Tensor, padding_mask: Tensor | None, half: HalfSpec, scope: str
) -> Tensor | None:
    """Dynamic pruning (METHODS 1.5): which of the kept columns this forward pass uses.

    kept: [T, kept], the inputs at the base's columns. norms: float32 [kept]. Per group of consecutive kept
    columns the used/groups with the highest `||W_b[:, j]|| * ||X[j, :]||`, in float32; of equal ones the
    first. scope "batch" takes the norm of X over all rows but padding, "token" each row's own value.

    Returns bool [1 or T, kept], or None where all are used. Raises ValueError for an unknown scope.
    """
    if scope == "off" or half.used >= norms.numel():
        return None
    # float32, so that every backend and dtype makes the same choice; float64 only for the oracle's sake.
    magnitude = kept.abs().to(torch.float64 if kept.dtype == torch.float64 else torch.float32)
    if scope == "batch":
        if padding_mask is not None:
            magnitude = torch.where(padding_mask.unsqueeze(1), 0, magnitude)
        magnitude = magnitude.square().sum(dim=0, keepdim=True).sqrt()
    elif scope != "token":
        raise ValueError(f"scope is {scope!r}, not batch, token or off")
    scores = (magnitude * norms).unflatten(1, (half.groups, -1))
    # A stable sort, not topk: of equal scores the lowest column wins, on every device.
    best = scores.argsort(dim=-1, descending=True, stable=True)[..., : half.used // half.groups]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True).flatten(1)


class _Mixed(NamedTuple):
    """One expert's V of gate and up, mixed from bases: never whole, but in tiles of rows.

    bases: [m, k, in], gate's `gate_rank` rows before up's; alpha: [2 m], gate's before up's.
    """

    bases: Tensor
    alpha: Tensor
    function: Activation
    gate_rank: int

    def shrink(self, x: Tensor, product: Product) -> Tensor:
        """`V x` [n, k] for rows x [n, in]."""
        parts = (slice(self.gate_rank), slice(self.gate_rank, None))
        return torch.cat(
            [
                product(x, self.function(torch.tensordot(alpha.to(tile.dtype), tile, dims=1)).t())
                for part, alpha in zip(parts, self.alpha.chunk(2), strict=True)
                for tile in self.bases[:, part].split(MIXED_ROWS, dim=1)
            ],
            dim=1,
        )


class _Factors(NamedTuple):
    """One expert's delta: u [I or H, k]; v [k, in], or int [k] naming columns, or what mixes it, or None: u is it all,
    [out, in].

    present: bool [1], False for an expert that has none, where only the device knows; None: it has.
    """

    u: Tensor
    v: Tensor | _Mixed | None
    present: Tensor | None = None

    def where_present(self, delta: Tensor) -> Tensor:
        return delta if self.present is None else torch.where(self.present, delta, 0)


def _factors(weights: Weights, spec: LayerSpec) -> Callable[[int], _Factors | None]:
    """A function that finds an expert's factors when they are needed; None where it is known to have none."""
    if weights.bases is not None:
        return _mixed(weights, spec)
    us, shared_v, u_index = weights.delta_u, weights.shared_v, weights.u_index
    vs = weights.delta_v if weights.delta_columns is None else weights.delta_columns
    if weights.dense is not None:
        us, vs = weights.dense, None
    # A rank may have a layer's trimmed experts only, and so nothing stored.
    elif shared_v is None and (vs is None or len(vs) == 0):
        us = None
    if us is None or len(us) == 0:
        return lambda expert: None
    u_places, v_places = _places(u_index, spec), _places(weights.v_index, spec)

    def find(expert: int) -> _Factors | None:
        place = u_places[expert]
        if isinstance(place, int) and place < 0:
            return None
        v = shared_v if vs is None else _at(vs, v_places[expert])
        present = None if u_index is None or isinstance(place, int) else u_index[expert : expert + 1] >= 0
        return _Factors(_at(us, place), v, present)

    return find


def _mixed(weights: Weights, spec: LayerSpec) -> Callable[[int], _Factors]:
    """`_factors` of experts that are mixed from bases; they stand at their own number's place."""
    bases, a, alpha = weights.bases, weights.a, weights.alpha
    if bases is None or a is None or alpha is None:
        raise ValueError("bases need a and alpha, and the other way round")

    def find(expert: int) -> _Factors:
        v = _Mixed(bases, _at(alpha, expert), FUNCTIONS[spec.function], spec.w13.ranks[0])
        return _Factors(_at(a, expert), v)

    return find


def _places(index: Tensor | None, spec: LayerSpec) -> Sequence[int | Tensor]:
    """Per expert its index; with static shapes one that stays on the device, int [1], and is never negative."""
    if spec.widths:
        own = [expert for expert in range(spec.num_experts) if expert not in spec.without]
        return [own.index(expert) if expert in own else -1 for expert in range(spec.num_experts)]
    if index is None:
        return range(spec.num_experts)
    return index.clamp(min=0).split(1) if spec.static_shapes else index.tolist()


def _at(matrices: Tensor | Sequence[Tensor], place: int | Tensor) -> Tensor:
    # Indexing by a tensor of no dimensions would synchronise.
    return matrices[place] if isinstance(place, int) else matrices.index_select(0, place)[0]  # type: ignore[union-attr]


def _channels(bits: Tensor, width: int) -> Tensor:
    """The numbers, int64 [width], of the bits uint8 [bytes] that are set, ascending; the device is not waited for."""
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    clear = (bits.unsqueeze(1) >> places & 1).flatten().eq(0).to(torch.uint8)
    return clear.argsort(stable=True)[:width]


def _shrink(x: Tensor, v: Tensor | _Mixed | None, product: Product) -> Tensor:
    """`V x` for rows x [n, in]: [n, k]; V [k, in], or int [k] where its rows are unit vectors, or mixed, or none."""
    if v is None:
        return x
    if isinstance(v, _Mixed):
        return v.shrink(x, product)
    return x.index_select(1, v) if v.dim() == 1 else product(x, v.t())


def _expand(shrunk: Tensor, u: Tensor, ranks: Sequence[int], product: Product) -> list[Tensor]:
    """Gate's and up's `U s` [n, I] for rows s [n, k], with u [I, k], gate's columns before up's, so many of each."""
    pairs = zip(shrunk.split(list(ranks), dim=1), u.split(list(ranks), dim=1), strict=True)
    return [product(own, own_u.t()) for own, own_u in pairs]


def _hidden(
    x: Tensor,
    z: Tensor | None,
    shrunk: Tensor | None,
    factors: _Factors | None,
    ranks: Sequence[int],
    biases: Sequence[Tensor] | None,
    gate_up: Gated,
    accumulate: torch.dtype,
    product: Product,
) -> Tensor:
    """`h_e` [n, I] of one expert for rows x [n, H] and their share of the base z [n, 2 I], or [n, I] without a gate,
    unrounded.

    shrunk: `V x` [n, k] for a V that all experts share. Base and delta are added after widening: with bfloat16
    products this leaves two roundings, each relative to its own part, where adding first would leave three.
    """
    parts = [] if z is None else [part.to(accumulate) for part in z.chunk(len(ranks), dim=-1)]
    if factors is not None:
        if factors.v is None:
            found: Sequence[Tensor] = product(x, factors.u.t()).chunk(len(ranks), dim=-1)
        else:
            shrunk = _shrink(x, factors.v, product) if shrunk is None else shrunk
            found = _expand(shrunk, factors.u, ranks, product)
        deltas = [factors.where_present(delta.to(accumulate)) for delta in found]
        parts = [part + delta for part, delta in zip(parts, deltas, strict=True)] if parts else deltas
    if biases is not None:
        parts = [part + bias for part, bias in zip(parts, biases, strict=True)]
    return gate_up(*parts)


def _add(total: Tensor, rows: Tensor, gates: Tensor, value: Tensor) -> None:
    """total[rows] += gates * value, for rows by index, or by a mask where value has all rows."""
    value = gates.unsqueeze(1) * value
    if rows.dtype == torch.bool:
        total += torch.where(rows.unsqueeze(1), value, 0)
    else:
        total.index_add_(0, rows, value)


def _visit_routed(topk_ids: Tensor, topk_weights: Tensor, num_experts: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yields (expert, indices of its rows [n], their gates [n]) for experts that have rows. Synchronises."""
    ids = topk_ids.flatten().clamp(min=-1)
    order = ids.argsort(stable=True)
    counts = torch.bincount(ids + 1, minlength=num_experts + 1).tolist()
    start = counts[0]
    for expert, count in enumerate(counts[1 : num_experts + 1]):
        if count:
            picks = order[start : start + count]
            yield expert, picks // topk_ids.shape[1], topk_weights.flatten()[picks]
        start += count


def _visit_all(topk_ids: Tensor, topk_weights: Tensor, num_experts: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yields (expert, mask of its rows [T], gates [T]) for every expert."""
    for expert in range(num_experts):
        routed = topk_ids == expert
        yield expert, routed.any(dim=1), torch.where(routed, topk_weights, 0).sum(dim=1)
