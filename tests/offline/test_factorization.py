"""The algebra of the deltas, against independent float64 computations and as properties."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from offline.factorization import relative_error, shrink_gram, svd_factors, whitened_factors

shapes = st.tuples(st.integers(2, 24), st.integers(2, 24))


def case(shape: tuple[int, int], tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    delta = torch.randn(*shape, generator=generator, dtype=torch.float64)
    scales = torch.logspace(1, -1, shape[1], dtype=torch.float64)
    inputs = torch.randn(shape[1], tokens, generator=generator, dtype=torch.float64) * scales[:, None]
    return delta, inputs


@settings(max_examples=80, deadline=None)
@given(shape=shapes, extra=st.integers(0, 30), seed=st.integers(0, 1000), data=st.data())
def test_whitened_error_is_the_least_possible(
    shape: tuple[int, int], extra: int, seed: int, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(1, min(shape)))
    delta, inputs = case(shape, shape[1] + extra, seed)
    u, v = whitened_factors(delta, inputs @ inputs.T, rank)
    assert u.shape == (shape[0], rank)
    assert v.shape == (rank, shape[1])
    assert u.dtype == v.dtype == torch.float64
    error = ((delta - u @ v) @ inputs).norm()
    # Eckart-Young on the outputs themselves; no gram, root or eigenvector is involved.
    best = torch.linalg.svdvals(delta @ inputs)[rank:].norm()
    assert error <= best * (1 + 1e-6) + 1e-9 * (delta @ inputs).norm()


@settings(max_examples=40, deadline=None)
@given(shape=shapes, seed=st.integers(0, 1000), tokens=st.integers(1, 6))
def test_singular_grams_are_no_special_case(shape: tuple[int, int], seed: int, tokens: int) -> None:
    delta, inputs = case(shape, tokens, seed)
    rank = min(shape)
    u, v = whitened_factors(delta, inputs @ inputs.T, rank)
    assert u.isfinite().all()
    assert v.isfinite().all()
    assert ((delta - u @ v) @ inputs).norm() <= 1e-6 * (delta @ inputs).norm()


@settings(max_examples=40, deadline=None)
@given(shape=shapes, seed=st.integers(0, 1000))
def test_no_perturbation_of_the_factors_lowers_the_error(shape: tuple[int, int], seed: int) -> None:
    delta, inputs = case(shape, shape[1] + 8, seed)
    rank = max(1, min(shape) // 2)
    u, v = whitened_factors(delta, inputs @ inputs.T, rank)
    error = ((delta - u @ v) @ inputs).norm()
    generator = torch.Generator().manual_seed(seed)
    for size in (1e-1, 1e-3):
        du = size * torch.randn(u.shape, generator=generator, dtype=u.dtype)
        dv = size * torch.randn(v.shape, generator=generator, dtype=v.dtype)
        assert ((delta - (u + du) @ (v + dv)) @ inputs).norm() >= error * (1 - 1e-9)


@pytest.mark.parametrize("shape", [(20, 12), (12, 20), (16, 16)])
def test_full_rank_is_exact_and_error_falls_with_rank(shape: tuple[int, int]) -> None:
    delta, inputs = case(shape, 64, 0)
    gram = inputs @ inputs.T
    errors = [
        relative_error(delta, torch.matmul(*whitened_factors(delta, gram, k)), gram) for k in range(1, min(shape) + 1)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-7
    assert torch.allclose(torch.matmul(*whitened_factors(delta, gram, min(shape))), delta, atol=1e-9)


@pytest.mark.parametrize("shape", [(20, 12), (12, 20)])
def test_factors_are_balanced_and_scale_of_the_gram_does_not_matter(shape: tuple[int, int]) -> None:
    delta, inputs = case(shape, 64, 1)
    gram = inputs @ inputs.T
    u, v = whitened_factors(delta, gram, 5)
    assert torch.allclose(u.norm(dim=0), v.norm(dim=1))
    u2, v2 = whitened_factors(delta, gram * 1e6, 5)
    assert torch.allclose(u @ v, u2 @ v2, atol=1e-8)


@settings(max_examples=30, deadline=None)
@given(shape=shapes, seed=st.integers(0, 1000))
def test_identity_gram_is_the_plain_svd(shape: tuple[int, int], seed: int) -> None:
    delta, _ = case(shape, 1, seed)
    rank = max(1, min(shape) // 2)
    identity = torch.eye(shape[1], dtype=torch.float64)
    whitened, plain = whitened_factors(delta, identity, rank), svd_factors(delta, identity, rank)
    assert torch.allclose(whitened[0] @ whitened[1], plain[0] @ plain[1], atol=1e-6)
    assert torch.allclose(plain[0].norm(dim=0), torch.linalg.svdvals(delta)[:rank].sqrt())


def test_zero_delta_gives_zero_product() -> None:
    u, v = whitened_factors(torch.zeros(6, 4), torch.eye(4), 2)
    assert (u @ v).abs().max() == 0
    assert u.isfinite().all()


@pytest.mark.parametrize("rank", [0, 5])
def test_rank_out_of_range_is_refused(rank: int) -> None:
    for factor in (whitened_factors, svd_factors):
        with pytest.raises(ValueError, match="rank"):
            factor(torch.zeros(6, 4), torch.eye(4), rank)


def test_gram_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="gram"):
        whitened_factors(torch.zeros(6, 4), torch.eye(6), 2)


def test_shrinkage_grows_as_tokens_get_fewer() -> None:
    gram = torch.diag(torch.tensor([4.0, 1.0, 1.0]))
    few, many = shrink_gram(gram, 3, 0.5), shrink_gram(gram, 3000, 0.5)
    assert few.diagonal().mean() == pytest.approx(2.0)
    assert abs(few[0, 0] - 2.0) < abs(many[0, 0] - 2.0) < 2.0
    assert torch.equal(shrink_gram(gram, 0, 0.5), torch.eye(3, dtype=torch.float64))
    assert torch.equal(shrink_gram(torch.zeros(3, 3), 7, 0.5), torch.eye(3, dtype=torch.float64))
    assert torch.equal(shrink_gram(gram, 10, 0.0), gram.double())
