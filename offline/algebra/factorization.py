"""Factors of a delta (D2-MoE §3.3, METHODS 1.3): a table of named functions, and the errors they leave.

All low-rank methods are one computation, seen through different inputs: with G = B Bᵀ the second moment that the
method believes in, U is the top left singular vectors of delta @ B and V = Uᵀ delta. So nothing is inverted, and
the answers are nested: the first r columns of U and rows of V are the method's answer at rank r.

Products run in the delta's own dtype, float32 or float64, eigenproblems in float64, all on the delta's device.
Real Grams are large (Mixtral's `down`: 14336 x 14336), so they are read in blocks of columns, never copied.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from offline.algebra.pruning import column_scores, select_columns

Factors = tuple[Tensor, Tensor]

BLOCK = 1024
"""Columns per block of a large product."""
ASVD_ALPHA = 0.5
"""The exponent of ASVD's scaling (arXiv 2312.05821, section 4.1)."""
TINY = 1e-12
"""Matrices below this are scaled before their elements are squared: float32 ends at 1e-38."""
SAFE_EXCESS = 1e-6
"""Share of the squared error by which float32 products may exceed the optimum, before float64 is taken."""
SAFE_SUM = 1e-5
"""Share of a squared error by which float32 products may be wrong where it is read from eigenvalues, before float64 is
taken."""


def column_blocks(columns: int) -> Iterator[slice]:
    """Consecutive slices of at most BLOCK columns."""
    return (slice(first, min(first + BLOCK, columns)) for first in range(0, columns, BLOCK))


def shrink_gram(gram: Tensor, tokens: int, strength: float) -> Tensor:
    """Pull a second moment towards a multiple of the identity, the more the fewer tokens it was seen on.

    G <- (1 - l) G + l (tr G / n) I with l = strength * n / (strength * n + tokens); gram [n, n] float.
    No token at all, or constant zero inputs, give the identity, which makes the factorization a plain SVD.
    Works in place, at real sizes a copy is gigabytes; returns `gram`.
    """
    size = gram.shape[0]
    mean = float(gram.diagonal().double().mean())
    if tokens == 0 or mean <= 0:
        gram.zero_().diagonal().fill_(1)
        return gram
    share = strength * size / (strength * size + tokens)
    gram.mul_(1 - share).diagonal().add_(share * mean)
    return gram


def gram_root(gram: Tensor) -> Tensor:
    """Lower-triangular float64 B with B Bᵀ = gram, symmetric positive semi-definite [n, n].

    Cholesky's; where gram is singular, from its eigenvectors, with tiny negative eigenvalues as zero.
    """
    root, failed = torch.linalg.cholesky_ex(gram.double())
    if not failed:
        return root
    values, vectors = torch.linalg.eigh(gram.double())
    return torch.linalg.qr((vectors * values.clamp(min=0).sqrt()).T).R.T


def input_moment(delta: Tensor, dtype: torch.dtype) -> Tensor:
    """deltaᵀ delta in `dtype`, [in, in]; only half of it is computed."""
    moment = torch.empty(delta.shape[1], delta.shape[1], dtype=dtype, device=delta.device)
    delta = delta.to(dtype)
    for block in column_blocks(delta.shape[1]):
        lower = delta[:, block.start :].T @ delta[:, block]
        moment[block.start :, block] = lower
        moment[block, block.start :] = lower.T
    return moment


def output_moment(delta: Tensor, gram: Tensor, dtype: torch.dtype) -> Tensor:
    """delta G deltaᵀ, products in `dtype`, sums in float64: float64 [out, out].

    gram: symmetric [in, in]. Its blocks on and below the diagonal are enough: with G = L + Lᵀ the answer is
    delta L deltaᵀ plus its transpose.
    """
    half = torch.zeros(delta.shape[0], delta.shape[0], dtype=torch.float64, device=delta.device)
    delta = delta.to(dtype)
    for block in column_blocks(delta.shape[1]):
        half += _lower_product(delta, gram, block) @ delta[:, block].T
    return half + half.T


def whitened_energy(matrix: Tensor, gram: Tensor) -> float:
    """||matrix G^(1/2)||_F^2: the mean (or sum, as gram is) of the squared outputs. NaN where it overflows.

    matrix: float32 or float64 [out, in]; gram: symmetric [in, in]. Products in the matrix's dtype, summed in
    float64: in float32 right to 1e-6, because rounding errors of so many products average out.
    """
    _wide(matrix)
    if 0 < (largest := float(matrix.abs().max())) < TINY:
        return whitened_energy(matrix / largest, gram) * largest**2
    total = 0.0
    for block in column_blocks(matrix.shape[1]):
        product = _lower_product(matrix, gram, block).mul_(matrix[:, block])
        total += 2 * float(product.sum(dtype=torch.float64))
    return max(total, 0.0) if math.isfinite(total) else math.nan


def _lower_product(matrix: Tensor, gram: Tensor, block: slice) -> Tensor:
    """matrix @ L[:, block], where gram = L + Lᵀ with L lower triangular block by block."""
    below = gram[block.stop :, block].to(matrix.dtype)
    diagonal = gram[block, block].to(matrix.dtype) / 2
    return (matrix[:, block] @ diagonal).addmm_(matrix[:, block.stop :], below)


def whitened_factors(delta: Tensor, gram: Tensor | None, rank: int) -> Factors:
    """Best rank-`rank` factors of `delta` for inputs with second moment `gram` (D2-MoE eq. 6-8).

    delta: float32 or float64 [out, in]; gram: float [in, in], symmetric, positive semi-definite, any scale.
    Returns u [out, rank] and v [rank, in] in delta's dtype, nested and balanced (u's columns and v's rows have
    equal norms): ||(delta - u v) X||_F is minimal at every rank. No inverse is taken, so a singular gram is no
    special case; what it never saw is left to chance there: shrink it. Temporaries: below 1.2 GB for Mixtral.
    Raises ValueError where shapes or dtypes disagree with this or 1 <= rank <= min(out, in) does not hold.
    """
    out_features, in_features = _check(delta, rank)
    gram = _needed(gram, in_features)
    if out_features <= in_features:
        return _project(delta, _top(lambda dtype: output_moment(delta, gram, dtype), delta, rank))
    # The same subspace from the smaller side, made orthonormal again on the output side.
    root = gram_root(gram)
    right = _top(lambda dtype: _rooted_moment(delta, root, dtype), delta, rank)
    return _project(delta, _orthonormal(delta @ (root @ right).to(delta.dtype)))


def whitened_curve(delta: Tensor, gram: Tensor | None, rank: int) -> Tensor:
    """What `whitened_factors` leave at every rank, ||(delta - u[:, :r] v[:r]) G^(1/2)||_F^2 for r = 0..rank, before
    factors are rounded: float64 [rank + 1], on delta's device.

    Sums of eigenvalues that are left out, so no eigenvector is computed. Arguments and errors as `whitened_factors`.
    """
    out_features, in_features = _check(delta, rank)
    gram = _needed(gram, in_features)
    if out_features <= in_features:
        values = _values(lambda dtype: output_moment(delta, gram, dtype), delta, rank)
    else:
        root = gram_root(gram)
        values = _values(lambda dtype: _rooted_moment(delta, root, dtype), delta, rank)
    left = values.flip(0).cumsum(0).flip(0)
    return torch.cat([left, left.new_zeros(1)])[: rank + 1]


def _rooted_moment(delta: Tensor, root: Tensor, dtype: torch.dtype) -> Tensor:
    """rootᵀ deltaᵀ delta root, products in `dtype`; root: lower triangular float64 [in, in]. float64 [in, in]."""
    middle = input_moment(delta, dtype)
    factor = root.to(dtype)
    result = torch.empty_like(root)
    for block in column_blocks(len(root)):  # the root is triangular: only its lower blocks take part
        part = middle[:, block.start :] @ factor[block.start :, block]
        lower = factor[block.start :, block.start :].T @ part[block.start :]
        result[block.start :, block] = lower
        result[block, block.start :] = lower.T
    return result


def asvd_factors(delta: Tensor, gram: Tensor | None, rank: int) -> Factors:
    """Truncated SVD of delta * s per input column, divided by s again (ASVD, arXiv 2312.05821, section 4.1).

    s = (root mean square of the input)^ASVD_ALPHA, from gram's diagonal. The paper scales by the mean absolute
    value, which a Gram does not know. Arguments, result and errors as `whitened_factors`.
    """
    gram = _needed(gram, _check(delta, rank)[1])
    return _scaled_factors(delta, gram.diagonal().double().clamp(min=0).pow(ASVD_ALPHA / 2), rank)


def svd_factors(delta: Tensor, gram: Tensor | None, rank: int) -> Factors:
    """Plain truncated SVD, blind to activations; arguments, result and errors as `whitened_factors`."""
    _check(delta, rank)
    return _scaled_factors(delta, torch.ones(delta.shape[1], dtype=torch.float64, device=delta.device), rank)


def svd_base(base: Tensor, input_energy: Tensor, rank: int) -> Factors:
    """A low-rank base (D2-MoE Table 5, "SVD"): the best for independent inputs of these energies.

    base: float32 or float64 [out, in]; input_energy [in]: sum or mean of squares of each input. Result and
    errors as `whitened_factors`.
    """
    _check(base, rank)
    return _scaled_factors(base, input_energy.to(base.device, torch.float64).clamp(min=0).sqrt(), rank)


def _scaled_factors(delta: Tensor, scale: Tensor, rank: int) -> Factors:
    """As `whitened_factors` with the diagonal gram scale^2."""
    largest = float(scale.max())
    scaled = delta * (scale / (largest if largest > 0 else 1)).to(delta.dtype)
    if delta.shape[0] <= delta.shape[1]:
        return _project(delta, _top(lambda dtype: input_moment(scaled.T, dtype), delta, rank))
    right = _top(lambda dtype: input_moment(scaled, dtype), delta, rank)
    return _project(delta, _orthonormal(scaled @ right.to(delta.dtype)))


def _top(moment: Callable[[torch.dtype], Tensor], delta: Tensor, rank: int) -> Tensor:
    """The `rank` top eigenvectors of moment(dtype), best first, float64. In float32 only where that is safe."""
    values, vectors = torch.linalg.eigh(moment(delta.dtype).double())
    if delta.dtype != torch.float64 and not _rounding_is_harmless(values.flip(0), rank):
        vectors = torch.linalg.eigh(moment(torch.float64)).eigenvectors
    return vectors[:, -rank:].flip(1)


def _values(moment: Callable[[torch.dtype], Tensor], delta: Tensor, rank: int) -> Tensor:
    """All eigenvalues of moment(dtype), none below 0, descending, float64. In float32 only where sums of those behind
    any of the first `rank` are right to SAFE_SUM."""
    values = torch.linalg.eigvalsh(moment(delta.dtype).double()).clamp(min=0).flip(0)
    if delta.dtype == torch.float64:
        return values
    left, total = values.sum() - values.cumsum(0), float(values.sum())
    # Noise e per entry moves a sum of eigenvalues by about e times the root of their number.
    noise = torch.finfo(torch.float32).eps * total / len(values) ** 0.5
    matters = left > 1e-13 * total
    if not (noise <= SAFE_SUM * left)[:rank][matters[:rank]].all():
        values = torch.linalg.eigvalsh(moment(torch.float64)).clamp(min=0).flip(0)
    return values


def _rounding_is_harmless(values: Tensor, rank: int) -> bool:
    """Whether float32 noise in a moment with these eigenvalues, descending, leaves every error up to `rank`.

    Noise e per entry mixes each of the r kept directions with each of the n - r dropped ones by e / gap, which
    costs e^2 / gap: about r (n - r) e^2 / values[r] in all, against the error that the dropped ones leave anyway.
    Measured with e = float32's eps * the mean eigenvalue, this is right to a factor of four, on the safe side.
    What is left below a float64's own noise does not count. (float32 eigenvectors would be another matter: their
    noise goes with the largest eigenvalue and cost up to 4 % of the error.)
    """
    size = len(values)
    values = values.clamp(min=0)
    total = float(values.sum())
    noise = torch.finfo(torch.float32).eps * total / size
    left = total - values.cumsum(0)
    kept = torch.arange(1, size + 1, dtype=torch.float64, device=values.device)
    excess = kept * (size - kept) * noise**2 / values.clamp(min=torch.finfo(torch.float64).tiny)
    matters = left > 1e-13 * total
    return bool((excess <= SAFE_EXCESS * left)[:rank][matters[:rank]].all())


def _project(delta: Tensor, left: Tensor) -> Factors:
    """Factors from the orthonormal output directions, with the scale of each component shared equally: with
    G = I this is sqrt(sigma) on both sides."""
    u = left.to(delta.dtype)
    v = u.T @ delta
    scale = v.norm(dim=1).sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    return u * scale, v / scale[:, None]


def _orthonormal(vectors: Tensor) -> Tensor:
    return torch.linalg.qr(vectors.double()).Q


def _wide(matrix: Tensor) -> None:
    if matrix.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"computed in float32 or float64, not in {matrix.dtype}; convert first")


def _check(delta: Tensor, rank: int) -> tuple[int, int]:
    _wide(delta)
    out_features, in_features = delta.shape
    if not 1 <= rank <= min(out_features, in_features):
        raise ValueError(f"rank {rank} is not between 1 and {min(out_features, in_features)}")
    return out_features, in_features


def _needed(gram: Tensor | None, in_features: int) -> Tensor:
    if gram is None:
        raise ValueError("this method needs a gram")
    if gram.shape != (in_features, in_features):
        raise ValueError(f"gram is {list(gram.shape)}, delta has {in_features} inputs")
    return gram


DELTAS: dict[str, Callable[[Tensor, Tensor | None, int], Factors]] = {
    "whitened": whitened_factors,
    "svd": svd_factors,
    "asvd": asvd_factors,
}


def column_factors(delta: Tensor, gram: Tensor, rank: int, groups: int) -> Factors:
    """The delta kept on its `rank` best input columns, zero elsewhere (D2-MoE Table 6, "pruning").

    Score ||delta[:, j]|| * sqrt(G_jj), the best `rank / groups` in each of `groups` slices of the input.
    Returns u [out, rank], those columns in delta's dtype, and int32 [rank], which, ascending.
    Raises ValueError where groups do not divide the columns or the rank, or the shapes disagree.
    """
    gram = _needed(gram, delta.shape[1])
    scores = column_scores(delta.norm(dim=0), gram.diagonal().clamp(min=0).sqrt())
    columns = select_columns(scores, rank, groups)
    return delta[:, columns.long()], columns


def error_curve(delta: Tensor, gram: Tensor, u: Tensor, v: Tensor, total: float | None = None) -> Tensor:
    """||(delta - u[:, :r] v[:r]) G^(1/2)||_F^2 for every r = 0..rank: float64 [rank + 1], for any factors.

    From cumulative sums: with P = delta G vᵀ and K = (uᵀ u) * (v G vᵀ) it is the delta's own energy, minus
    twice the sum of u * P, plus the sum of K, over the first r columns. So rounding is 1e-16 of that energy.
    total: `whitened_energy(delta.double(), gram)`, where the caller has it already.
    """
    total = whitened_energy(delta.double(), gram) if total is None else total
    u, v = u.double(), v.double()
    seen = torch.empty(len(v), delta.shape[1], dtype=torch.float64, device=delta.device)
    for block in column_blocks(delta.shape[1]):
        seen[:, block] = v @ gram[:, block].double()
    cross = (u * (delta.double() @ seen.T)).sum(dim=0)
    products = (u.T @ u) * (seen @ v.T)
    added = 2 * products.tril(-1).sum(dim=1) + products.diagonal()
    curve = total + (added - 2 * cross).cumsum(0)
    return torch.cat([curve.new_tensor([total]), curve]).clamp(min=0)
