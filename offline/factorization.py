"""Low-rank factors of a delta (D2-MoE §3.3, METHODS 1.3): a table of named functions."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Factors = tuple[Tensor, Tensor]


def shrink_gram(gram: Tensor, tokens: int, strength: float) -> Tensor:
    """Pull a second moment towards a multiple of the identity, the more the fewer tokens it was seen on.

    G <- (1 - l) G + l (tr G / n) I with l = strength * n / (strength * n + tokens); gram [n, n] float.
    No token at all, or constant zero inputs, give the identity, which makes the factorization a plain SVD.
    Returns float64 [n, n].
    """
    size = gram.shape[0]
    mean = float(gram.diagonal().double().mean())
    if tokens == 0 or mean <= 0:
        return torch.eye(size, dtype=torch.float64)
    share = strength * size / (strength * size + tokens)
    shrunk = gram.double() * (1 - share)  # the one copy: at real sizes each is gigabytes
    shrunk.diagonal().add_(share * mean)
    return shrunk


def gram_root(gram: Tensor) -> Tensor:
    """A symmetric square root of a positive semi-definite [n, n]; tiny negative eigenvalues count as zero."""
    values, vectors = torch.linalg.eigh(gram.double())
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def whitened_factors(delta: Tensor, gram: Tensor, rank: int, root: Tensor | None = None) -> Factors:
    """Best rank-`rank` factors of `delta` for inputs with second moment `gram` (D2-MoE eq. 6-8).

    delta: [out, in]; gram: [in, in], symmetric, positive semi-definite, any scale; root: `gram_root(gram)`
    if the caller has it already.
    Returns u [out, rank] and v [rank, in] in float64, balanced (u's columns and v's rows have equal norms):
    ||(delta - u v) X||_F is minimal. No inverse is taken, so a singular gram is no special case.
    Raises ValueError where the shapes disagree or 1 <= rank <= min(out, in) does not hold.
    """
    out_features, in_features = _check(delta, rank)
    if gram.shape != (in_features, in_features):
        raise ValueError(f"gram is {list(gram.shape)}, delta has {in_features} inputs")
    delta, gram = delta.double(), gram.double()
    if out_features <= in_features:
        # Top eigenvectors of the outputs' second moment.
        left = torch.linalg.eigh(delta @ gram @ delta.T).eigenvectors[:, -rank:].flip(1)
    else:
        # The same subspace from the smaller side, made orthonormal again on the output side.
        whitened = delta @ (gram_root(gram) if root is None else root)
        right = torch.linalg.eigh(whitened.T @ whitened).eigenvectors[:, -rank:].flip(1)
        left = torch.linalg.qr(whitened @ right).Q
    return _balance(left, left.T @ delta)


def svd_factors(delta: Tensor, gram: Tensor, rank: int, root: Tensor | None = None) -> Factors:
    """Plain truncated SVD, blind to activations; arguments, result and errors as `whitened_factors`."""
    _check(delta, rank)
    left, values, right = torch.linalg.svd(delta.double(), full_matrices=False)
    return _balance(left[:, :rank], values[:rank, None] * right[:rank])


def _check(delta: Tensor, rank: int) -> tuple[int, int]:
    out_features, in_features = delta.shape
    if not 1 <= rank <= min(out_features, in_features):
        raise ValueError(f"rank {rank} is not between 1 and {min(out_features, in_features)}")
    return out_features, in_features


def _balance(u: Tensor, v: Tensor) -> Factors:
    """Share the scale of each component equally: with orthonormal u and G = I this is sqrt(sigma) on both sides."""
    scale = v.norm(dim=1).sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    return u * scale, v / scale[:, None]


DELTAS: dict[str, Callable[[Tensor, Tensor, int, Tensor | None], Factors]] = {
    "whitened": whitened_factors,
    "svd": svd_factors,
}
NEEDS_GRAM = frozenset({"whitened"})


def relative_error(weight: Tensor, approximation: Tensor, gram: Tensor) -> float:
    """||(W - W') X||_F / ||W X||_F for inputs with second moment `gram`, in float64; 0 where W X is 0."""
    weight, error, gram = weight.double(), weight.double() - approximation.double(), gram.double()

    def energy(matrix: Tensor) -> float:
        value = float(((matrix @ gram) * matrix).sum())
        return max(value, 0.0) if math.isfinite(value) else math.nan

    total = energy(weight)
    if not math.isfinite(total):
        return math.nan
    return (energy(error) / total) ** 0.5 if total > 0 else 0.0
