"""Factors that experts share (D2-MoE appendix A.6, METHODS 1.7): one V for all of them, or fewer U's than experts.

Pure functions on one expert, or on sums over experts that the caller accumulates one expert at a time.
Gram matrices here are sums over tokens, or means times tokens: each expert counts by what it is used.

Share-V, one V and a U per expert, in two passes:

    gram = sum_i gram_i;  moment = sum_i input_moment(delta_i, dtype)                        pass 1
    v, projector = shared_v(gram, moment, rank, experts);  u_i = delta_i @ projector         pass 2

Merge-U, d U's and a V per expert, in three passes:

    seeds = seed_experts(tokens, d);  u_s = merged_u(output_moment(delta_s, gram_s, dtype), rank) for the seeds
    each other expert joins the seed with the least unexplained(delta_i, gram_i, u_s, u_sᵀ delta_i);
        moment_c = sum_{i in c} output_moment(delta_i, gram_i, dtype)
    u_c = merged_u(moment_c, rank);  v_i = u_cᵀ delta_i

Both, one V and d U's: v and the u_i of Share-V; each expert joins the seed with the least
unexplained(delta_i, gram_i, u_s, v); u_c = mean_u of its members.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from offline.algebra.factorization import gram_root, whitened_energy

NEGLIGIBLE = 1e-13
"""Eigenvalues below this share of the largest are rounding; their components are left out."""

RIDGE = 1e-12
"""Added to V G Vᵀ, relative to its mean diagonal: rows of V beyond the rank of the data are zero."""

NEAR = 0.01
"""How strongly a U that is fitted to a rounded V is held to what it was, about as much as rounding it to 4 bits costs.
Any value from 1e-8 on leaves trained experts the same error; matrices of lower rank need 1e-4."""


def shared_v(gram: Tensor, moment: Tensor, rank: int, experts: int) -> tuple[Tensor, Tensor]:
    """V of all experts, and the projector that gives each its U: minimises sum_i ||(D_i - U_i V) G^(1/2)||_F^2.

    gram: float [in, in], sum_i G_i; moment: float [in, in], sum_i D_iᵀ D_i; experts: how many were summed.
    With G = B Bᵀ, and L, Q the top eigenvalues and vectors of Bᵀ M B: the projector is B Q L^(-1/2) and
    V = L^(-1/2) Qᵀ Bᵀ M, which is the SVD of the stacked deltas times B, without stacking them.
    Returns v [rank, in] and projector [in, rank], float64: U_i = D_i @ projector. Nested: the first r rows
    and columns are the optimum of rank r. Balanced: rows of v have the norm of the columns of the U_i (root
    mean square over experts). Components beyond the rank of the data are zero.
    Eigenproblem and root are of size [in, in] in float64. Raises ValueError where the rank is out of range.
    """
    _check(rank, len(moment))
    root, moment = gram_root(gram), moment.double()
    values, vectors = torch.linalg.eigh(root.T @ moment @ root)
    values, vectors = values[-rank:].flip(0), vectors[:, -rank:].flip(1)
    # Not an inverse of G: only of singular values that are not rounding.
    inverse = torch.where(values > NEGLIGIBLE * values[0].clamp(min=0), values, torch.inf).rsqrt()
    projector = root @ vectors * inverse
    v = projector.T @ moment
    # The U_i stacked are orthonormal, so each column has the root mean square norm experts^(-1/2).
    scale = (v.norm(dim=1) * experts**0.5).sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    return v / scale[:, None], projector * scale


def fitted_u(weight: Tensor, gram: Tensor, v: Tensor) -> Tensor:
    """The best U for a given V: minimises ||(W - U V) G^(1/2)||_F, U = W G Vᵀ (V G Vᵀ)^-1.

    weight: [out, in]; gram: symmetric [in, in]; v: [k, in]. Returns float64 [out, k].
    """
    v = v.double()
    seen = v @ gram.double()
    inner = seen @ v.T
    inner.diagonal().add_((RIDGE * inner.diagonal().mean()).clamp(min=torch.finfo(torch.float64).tiny))
    return torch.linalg.solve(inner, seen @ weight.double().T).T


def refitted_u(u: Tensor, weight: Tensor, gram: Tensor, v: Tensor) -> Tensor:
    """The best U for a V that has changed, near the U that it had: minimises
    ||(W - U' V) G^(1/2)||_F^2 + r ||U' - U||^2, with r NEAR of the mean of V G Vᵀ's diagonal.

    Rows of V that hold next to nothing, as of a matrix of lower rank, are noise once they are rounded; the plain
    optimum makes use of it by columns of U so large that no rounding of U survives them.
    u: [out, k]; weight: [out, in]; gram: symmetric [in, in]; v: [k, in]. Returns float64 [out, k].
    """
    u, v = u.double(), v.double()
    seen = v @ gram.double()
    inner = seen @ v.T
    inner.diagonal().add_((NEAR * inner.diagonal().mean()).clamp(min=torch.finfo(torch.float64).tiny))
    return u + torch.linalg.solve(inner, seen @ (weight.double() - u @ v).T).T


def fitted_v(weight: Tensor, u: Tensor) -> Tensor:
    """The best V for a given U, whatever is read: V = (Uᵀ U)^-1 Uᵀ W.

    weight: [out, in]; u: [out, k]. Returns float64 [k, in].
    """
    u = u.double()
    inner = u.T @ u
    inner.diagonal().add_((RIDGE * inner.diagonal().mean()).clamp(min=torch.finfo(torch.float64).tiny))
    return torch.linalg.solve(inner, u.T @ weight.double())


def merged_u(moment: Tensor, rank: int) -> Tensor:
    """One U for a cluster of experts: minimises sum_i ||(D_i - U V_i) G_i^(1/2)||_F^2 with V_i = Uᵀ D_i.

    moment: float64 [out, out], sum over the cluster of D_i G_i D_iᵀ. Returns float64 [out, rank], orthonormal
    columns, nested. Raises ValueError where the rank is out of range.
    """
    _check(rank, len(moment))
    return torch.linalg.eigh(moment.double()).eigenvectors[:, -rank:].flip(1)


def mean_u(members: Iterable[tuple[Tensor, int]]) -> Tensor:
    """Tokens-weighted mean of a cluster's U's, where all share one V; the plain mean where none was routed.

    members: per expert U_i [out, rank] and its tokens; read once, one at a time. Returns float64 [out, rank].
    Raises ValueError where there is none.
    """
    plain = weighted = None
    count = total = 0
    for member, tokens in members:
        u = member.double()
        plain = u.clone() if plain is None else plain.add_(u)
        weighted = u * tokens if weighted is None else weighted.add_(u, alpha=tokens)
        count, total = count + 1, total + tokens
    if plain is None or weighted is None:
        raise ValueError("a cluster has no members")
    return weighted / total if total else plain / count


def seed_experts(tokens: Sequence[int], count: int) -> list[int]:
    """The `count` most routed experts, ascending; of equals the lower number.

    Raises ValueError where there are fewer experts.
    """
    if not 1 <= count <= len(tokens):
        raise ValueError(f"cannot choose {count} of {len(tokens)} experts")
    return sorted(sorted(range(len(tokens)), key=lambda expert: (-tokens[expert], expert))[:count])


def unexplained(delta: Tensor, gram: Tensor, u: Tensor, v: Tensor) -> float:
    """||(delta - u v) G^(1/2)||_F^2 on the expert's own inputs: what joining this U would cost it.

    delta: float32 or float64 [out, in], whose dtype products run in; gram: [in, in]; u: [out, rank]; v: [rank, in].
    """
    return whitened_energy(delta - u.to(delta.dtype) @ v.to(delta.dtype), gram)


def least(errors: Sequence[float]) -> int:
    """The cluster to join, by its number in `errors`; of equals the first."""
    return min(range(len(errors)), key=lambda cluster: (errors[cluster], cluster))


def _check(rank: int, limit: int) -> None:
    if not 1 <= rank <= limit:
        raise ValueError(f"rank {rank} is not between 1 and {limit}")
