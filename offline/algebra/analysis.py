"""The paper's analyses of weights as pure functions (D2-MoE App. B.2, METHODS 1.7): CKA and energy retention."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

SHARES = (1, 2, 5, 10, 15, 20, 30, 40, 50, 60, 70, 80, 90, 100)
"""Percent of the rank at which energy curves are given."""


def unit_gram(samples: Tensor) -> Tensor:
    """H K H / ||H K H||_F as a vector [n * n], for samples [n, features], K = samples samplesᵀ, H the centring matrix.

    Zero where all samples are equal. In the dtype of `samples`. The scalar product of two such vectors is linear CKA,
    tr(HKHL) / sqrt(tr(HKHK) tr(HLHL)) (D2-MoE eq. 11), between 0 and 1; 0 where one side does not vary at all.
    """
    centred = samples - samples.mean(dim=0)
    gram = (centred @ centred.T).flatten()
    norm = torch.linalg.vector_norm(gram)
    return gram / norm if norm > 0 else gram


def cka_matrix(matrix: Callable[[int], Tensor], count: int, block: int) -> Tensor:
    """Linear CKA between all pairs of `count` matrices [n, features]: float64 [count, count], symmetric.

    matrix(i) is asked for one matrix at a time; at most `block` + 2 Gram matrices [n, n] are held at once.
    """
    result = torch.zeros(count, count, dtype=torch.float64)
    for start in range(0, count, block):
        held = range(start, min(start + block, count))
        first = unit_gram(matrix(start))
        grams = first.new_empty(len(held), len(first))
        for index in held:
            grams[index - start] = first if index == start else unit_gram(matrix(index))
        for index in range(start, count):
            other = grams[index - start] if index in held else unit_gram(matrix(index))
            result[start : held.stop, index] = (grams @ other).double()
    return result.triu() + result.triu(1).T


def gram_count(count: int, block: int) -> int:
    """How many Gram matrices `cka_matrix` computes."""
    return sum(count - start for start in range(0, count, block))


def unrelated_cka(samples: int, features: int) -> float:
    """About the linear CKA of two independent matrices [samples, features] of Gaussian numbers: not zero.

    Centred Gram matrices of n samples with p features have E tr(AB) = p² (n-1) and E tr(A²) = p (n-1) (p + n).
    """
    return features / (features + samples)


def spectrum(matrix: Tensor) -> Tensor:
    """Squared singular values of [m, n], descending, float64 [min(m, n)], from the smaller Gram matrix."""
    wide = matrix.double() if matrix.shape[0] <= matrix.shape[1] else matrix.double().T
    return torch.linalg.eigvalsh(wide @ wide.T).flip(0).clamp(min=0)


def energy_curve(energies: Tensor, shares: Sequence[int] = SHARES) -> list[float]:
    """Energy retention (D2-MoE eq. 12): the share of the energy in the first `share` % of components, rounded up.

    energies: squared singular values, descending. A matrix of zeros has kept all it had: 1 everywhere.
    """
    total = float(energies.sum())
    if total <= 0:
        return [1.0] * len(shares)
    sums = energies.cumsum(0) / total
    return [float(sums[max(math.ceil(share * len(energies) / 100), 1) - 1].clamp(max=1)) for share in shares]


def mean_curve(curves: Sequence[Sequence[float]]) -> list[float]:
    """Point by point over several curves."""
    return [sum(values) / len(values) for values in zip(*curves, strict=True)]
