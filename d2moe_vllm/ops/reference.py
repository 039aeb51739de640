"""The MoE layer of a d2moe checkpoint in plain torch (METHODS 1.5 and 1.6, paper eq. 10).

Two uses: the oracle that faster backends are measured against, and the code that travels inside every
checkpoint for plain transformers. For the latter it imports torch and nothing else.

    z   = W_b^{gate,up}[:, J] x[J]                                       once per token
    h_e = act(z^gate + U_e^gate V_e^gate x) * (z^up + U_e^up V_e^up x)   per routed expert
    y   = W_b^down[:, J2] (sum_e g_e h_e)[J2] + sum_e g_e U_e^down V_e^down h_e
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Callable[[Tensor], Tensor]

ACTIVATIONS: dict[str, Activation] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}
"""Gate activations by vLLM's names."""


def fused_experts(
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    w13_delta_u: Tensor | Sequence[Tensor] | None,
    w13_delta_v: Tensor | Sequence[Tensor] | None,
    w13_base: Tensor | None,
    w13_base_columns: Tensor | None,
    w13_base_norms: Tensor | None,
    w2_delta_u: Tensor | Sequence[Tensor] | None,
    w2_delta_v: Tensor | Sequence[Tensor] | None,
    w2_base: Tensor | None,
    w2_base_columns: Tensor | None,
    w2_base_norms: Tensor | None,
    padding_mask: Tensor | None,
    *,
    num_experts: int,
    gate_rank: int,
    activation: str | Activation,
    scope: str,
    w13_groups: int,
    w13_used: int,
    w2_groups: int,
    w2_used: int,
    static_shapes: bool = False,
) -> Tensor:
    """Routed experts of one layer, the base computed once per token.

    x: [T, H], any floating dtype, that of the weights. topk_weights: [T, K]. topk_ids: int [T, K]; -1 (and
    anything else outside 0..num_experts-1) is an expert that is not here and adds nothing.
    w13_delta_v: [E, k_gate + k_up, H], gate's rows first, so that both shrink in one product.
    w13_delta_u: [E, I, k_gate + k_up], gate's columns first. w2_delta_u: [E, H, k]. w2_delta_v: [E, k, I].
    w13_base: [kept, 2 I], input-major, gate's outputs then up's. w2_base: [kept, H].
    *_base_columns: int [kept], ascending, the inputs these rows belong to, evenly spread over the groups.
    *_base_norms: float32 [kept], ||W_b[:, j]||_2; for w13 joint, sqrt(gate^2 + up^2).
    padding_mask: bool [T], True for rows that are no tokens. They get some output but influence no other.
    A projection without deltas has None for u and v, one without a base None for its three. Deltas may
    also be sequences of per-expert matrices.

    scope: "batch", "token" or "off", see select_columns. *_groups, *_used: groups of kept columns, and how
    many columns are used in all. static_shapes: visit every expert with all rows instead of its own rows:
    more work, but no shape and no control flow depends on data (CUDA graphs, tracing).

    Returns [T, H] in x's dtype. Sums over experts are float32 (float64 for float64 inputs), rounded once.
    """
    act = ACTIVATIONS[activation] if isinstance(activation, str) else activation
    accumulate = torch.float64 if x.dtype == torch.float64 else torch.float32
    z = base_product(
        x, w13_base, w13_base_columns, w13_base_norms, padding_mask, scope=scope, groups=w13_groups, used=w13_used
    )
    intermediate = _intermediate_size(z, w13_delta_u)
    mix = x.new_zeros((x.shape[0], intermediate), dtype=accumulate) if w2_base is not None else None
    output = torch.zeros_like(x, dtype=accumulate)
    visits = _visit_all if static_shapes else _visit_routed
    for expert, rows, gates in visits(topk_ids, topk_weights.to(accumulate), num_experts):
        own_x, own_z = (x, z) if static_shapes else (x[rows], None if z is None else z[rows])
        v13, u13 = (None, None) if w13_delta_v is None else (w13_delta_v[expert], w13_delta_u[expert])  # type: ignore[index]
        hidden = _hidden(own_x, own_z, u13, v13, gate_rank, act, accumulate)
        if mix is not None:
            _add(mix, rows, gates, hidden)
        if w2_delta_v is not None:
            delta = hidden.to(x.dtype) @ w2_delta_v[expert].t() @ w2_delta_u[expert].t()  # type: ignore[index]
            _add(output, rows, gates, delta.to(accumulate))
    if mix is not None:
        output += base_product(
            mix, w2_base, w2_base_columns, w2_base_norms, padding_mask, scope=scope, groups=w2_groups, used=w2_used
        )
    return output.to(x.dtype)


def base_product(
    x: Tensor,
    base: Tensor | None,
    columns: Tensor | None,
    norms: Tensor | None,
    padding_mask: Tensor | None,
    *,
    scope: str,
    groups: int,
    used: int,
) -> Tensor | None:
    """`W_b[:, J] x[J]` for rows x [T, n] and input-major base [kept, out]: [T, out] in the base's dtype.

    None where there is no base.
    """
    if base is None or columns is None or norms is None:
        return None
    kept = x.index_select(1, columns)
    mask = select_columns(kept, norms, padding_mask, scope=scope, groups=groups, used=used)
    if mask is not None:
        # where, not a product: what is left out may be infinite or NaN in a padding row.
        kept = torch.where(mask, kept, 0)
    return kept.to(base.dtype) @ base


def select_columns(
    kept: Tensor, norms: Tensor, padding_mask: Tensor | None, *, scope: str, groups: int, used: int
) -> Tensor | None:
    """Dynamic pruning (METHODS 1.5): which of the kept columns this forward pass uses.

    kept: [T, kept], the inputs at the base's columns. norms: float32 [kept]. Per group of consecutive kept
    columns the used/groups with the highest `||W_b[:, j]|| * ||X[j, :]||`, in float32; of equal ones the
    first. scope "batch" takes the norm of X over all rows but padding, "token" each row's own value.

    Returns bool [1 or T, kept], or None where all are used. Raises ValueError for an unknown scope.
    """
    if scope == "off" or used >= norms.numel():
        return None
    # float32, so that every backend and dtype makes the same choice; float64 only for the oracle's sake.
    magnitude = kept.abs().to(torch.float64 if kept.dtype == torch.float64 else torch.float32)
    if scope == "batch":
        if padding_mask is not None:
            magnitude = torch.where(padding_mask.unsqueeze(1), 0, magnitude)
        magnitude = magnitude.square().sum(dim=0, keepdim=True).sqrt()
    elif scope != "token":
        raise ValueError(f"scope is {scope!r}, not batch, token or off")
    scores = (magnitude * norms).unflatten(1, (groups, -1))
    # A stable sort, not topk: of equal scores the lowest column wins, on every device.
    best = scores.argsort(dim=-1, descending=True, stable=True)[..., : used // groups]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True).flatten(1)


def _hidden(
    x: Tensor,
    z: Tensor | None,
    delta_u: Tensor | None,
    delta_v: Tensor | None,
    gate_rank: int,
    act: Activation,
    accumulate: torch.dtype,
) -> Tensor:
    """`h_e` [n, I] of one expert for rows x [n, H] and their share of the base z [n, 2 I], unrounded.

    Base and delta are added after widening: with bfloat16 products this leaves two roundings, each relative
    to its own part, where adding first would leave three.
    """
    parts = [] if z is None else [part.to(accumulate) for part in z.chunk(2, dim=-1)]
    if delta_u is not None and delta_v is not None:
        shrunk = x @ delta_v.t()
        gate = shrunk[:, :gate_rank] @ delta_u[:, :gate_rank].t()
        up = shrunk[:, gate_rank:] @ delta_u[:, gate_rank:].t()
        deltas = [gate.to(accumulate), up.to(accumulate)]
        parts = [part + delta for part, delta in zip(parts, deltas, strict=True)] if parts else deltas
    return act(parts[0]) * parts[1]


def _intermediate_size(z: Tensor | None, delta_u: Tensor | Sequence[Tensor] | None) -> int:
    if z is not None:
        return z.shape[1] // 2
    if delta_u is None:
        raise ValueError("gate and up have neither a base nor deltas")
    return delta_u[0].shape[0]


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
