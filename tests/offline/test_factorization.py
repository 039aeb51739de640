"""The algebra of the deltas, against independent float64 computations and as properties."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from offline.algebra import factorization
from offline.algebra.factorization import (
    DELTAS,
    column_factors,
    error_curve,
    shrink_gram,
    svd_base,
    svd_factors,
    whitened_curve,
    whitened_energy,
    whitened_factors,
)
from offline.algebra.pruning import select_columns

shapes = st.tuples(st.integers(2, 24), st.integers(2, 24))


@pytest.fixture(autouse=True, params=[5, factorization.BLOCK])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything in blocks smaller than the matrices too, as at real sizes."""
    monkeypatch.setattr(factorization, "BLOCK", request.param)


def relative_error(weight: Tensor, approximation: Tensor, gram: Tensor) -> float:
    """||(W - W') X||_F / ||W X||_F for inputs with second moment `gram`; 0 where W X is 0."""
    total = whitened_energy(weight, gram)
    return (whitened_energy(weight - approximation, gram) / total) ** 0.5 if total > 0 else 0.0


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


@settings(max_examples=60, deadline=None)
@given(shape=shapes, seed=st.integers(0, 1000), data=st.data(), name=st.sampled_from(sorted(DELTAS)))
def test_factors_are_nested_and_full_rank_is_exact(
    shape: tuple[int, int], seed: int, data: st.DataObject, name: str
) -> None:
    delta, inputs = case(shape, shape[1] + 20, seed)
    gram = inputs @ inputs.T
    rank = data.draw(st.integers(1, min(shape)))
    u, v = DELTAS[name](delta, gram, min(shape))
    shorter = DELTAS[name](delta, gram, rank)
    assert torch.allclose(u @ v, delta, atol=1e-8)
    assert torch.allclose(u[:, :rank] @ v[:rank], shorter[0] @ shorter[1], atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(shape=shapes, seed=st.integers(0, 1000), tokens=st.integers(1, 40), data=st.data())
def test_no_other_method_beats_whitening(shape: tuple[int, int], seed: int, tokens: int, data: st.DataObject) -> None:
    delta, inputs = case(shape, tokens, seed)
    gram = inputs @ inputs.T
    rank = data.draw(st.integers(1, min(shape)))

    def error(approximation: Tensor) -> float:
        return float(((delta - approximation) @ inputs).norm())

    best = error(torch.matmul(*whitened_factors(delta, gram, rank)))
    rounding = 1e-7 * error(torch.zeros_like(delta))
    for name in ("svd", "asvd"):
        assert error(torch.matmul(*DELTAS[name](delta, gram, rank))) >= best - rounding
    assert error(torch.matmul(*svd_base(delta, gram.diagonal(), rank))) >= best - rounding
    u, columns = column_factors(delta, gram, rank, 1)
    assert error(torch.zeros_like(delta).index_copy(1, columns.long(), u)) >= best - rounding


@settings(max_examples=40, deadline=None)
@given(shape=shapes, seed=st.integers(0, 1000), data=st.data())
def test_asvd_and_the_low_rank_base_are_the_svd_of_scaled_columns(
    shape: tuple[int, int], seed: int, data: st.DataObject
) -> None:
    delta, inputs = case(shape, 30, seed)
    gram, energy = inputs @ inputs.T / 30, inputs.square().sum(dim=1)
    rank = data.draw(st.integers(1, min(shape)))
    root_mean_square = (energy / 30).sqrt()
    for scale, found in (
        (root_mean_square.sqrt(), DELTAS["asvd"](delta, gram, rank)),
        (energy.sqrt(), svd_base(delta, energy, rank)),
    ):
        left, values, right = torch.linalg.svd(delta * scale, full_matrices=False)
        expected = (left[:, :rank] * values[:rank]) @ right[:rank] / scale
        assert torch.allclose(found[0] @ found[1], expected, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(shape=shapes, seed=st.integers(0, 1000), tokens=st.integers(0, 40), name=st.sampled_from(sorted(DELTAS)))
def test_error_curve_is_the_error_at_every_rank(shape: tuple[int, int], seed: int, tokens: int, name: str) -> None:
    delta, inputs = case(shape, tokens, seed)
    gram = inputs @ inputs.T
    u, v = DELTAS[name](delta, gram, min(shape))
    generator = torch.Generator().manual_seed(seed)
    # Any factors, not only the method's own.
    u = u + 0.01 * torch.randn(u.shape, generator=generator, dtype=u.dtype)
    curve = error_curve(delta, gram, u, v)
    assert curve.shape == (min(shape) + 1,)
    direct = [float(((delta - u[:, :r] @ v[:r]) @ inputs).square().sum()) for r in range(min(shape) + 1)]
    assert torch.allclose(curve, torch.tensor(direct, dtype=torch.float64), rtol=1e-6, atol=1e-9 * (1 + direct[0]))
    assert whitened_energy(delta, gram) == pytest.approx(direct[0], rel=1e-9)
    assert torch.equal(error_curve(delta, gram, u, v, whitened_energy(delta, gram)), curve)


@settings(max_examples=60, deadline=None)
@given(shape=shapes, seed=st.integers(0, 1000), tokens=st.integers(0, 40), data=st.data())
def test_eigenvalues_tell_what_whitened_factors_leave(
    shape: tuple[int, int], seed: int, tokens: int, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(1, min(shape)))
    delta, inputs = case(shape, tokens, seed)
    gram = inputs @ inputs.T
    curve = whitened_curve(delta, gram, rank)
    expected = error_curve(delta, gram, *whitened_factors(delta, gram, rank))
    assert curve.dtype == torch.float64
    assert torch.allclose(curve, expected, rtol=1e-6, atol=1e-9 * (1 + float(expected[0])))


@pytest.mark.parametrize("shape", [(60, 90), (90, 60)])
@pytest.mark.parametrize("outlier", [1.0, 30.0, 1e3])
def test_eigenvalues_of_float32_products_are_right_where_little_is_left(shape: tuple[int, int], outlier: float) -> None:
    delta, inputs = case(shape, 200, 0)
    inputs[:3] *= outlier
    delta, gram = delta.float(), (inputs @ inputs.T).float()
    expected = whitened_curve(delta.double(), gram.double(), min(shape) - 1)
    assert torch.allclose(whitened_curve(delta, gram, min(shape) - 1), expected, rtol=1e-4)


@pytest.mark.parametrize("shape", [(60, 90), (90, 60)])
@pytest.mark.parametrize("outlier", [1.0, 30.0, 1e3])
def test_float32_products_leave_the_optimum(shape: tuple[int, int], outlier: float) -> None:
    """As real deltas are stored; channels with massive activations drown the others in float32."""
    delta, inputs = case(shape, 200, 0)
    inputs[:3] *= outlier
    delta, gram = delta.float(), (inputs @ inputs.T).float()
    # Rounding made the Gram another one, a little: the optimum of that one.
    values, vectors = torch.linalg.eigh(gram.double())
    outputs = delta.double() @ (vectors * values.clamp(min=0).sqrt())
    singular = torch.linalg.svdvals(outputs)
    for rank in (2, 10, 30):
        u, v = whitened_factors(delta, gram, rank)
        assert u.dtype == v.dtype == torch.float32
        # What u spans, made orthonormal again: rounding u and v themselves is the storage's, not the method's.
        basis = torch.linalg.qr(u.double()).Q
        error = (outputs - basis @ (basis.T @ outputs)).norm()
        assert error <= singular[rank:].norm() * (1 + 1e-6) + 1e-7 * singular.norm()
        assert torch.allclose((u @ v).double(), basis @ (basis.T @ delta.double()), atol=1e-4)


@pytest.mark.parametrize("shape", [(60, 90), (90, 60)])
@pytest.mark.parametrize("outlier", [1.0, 30.0, 1e3])
def test_errors_in_float32_are_those_in_float64(shape: tuple[int, int], outlier: float) -> None:
    delta, inputs = case(shape, 200, 0)
    inputs[:3] *= outlier
    weight, gram = delta.float(), (inputs @ inputs.T).float()
    approximation = torch.matmul(*whitened_factors(weight, gram, 20))
    values, vectors = torch.linalg.eigh(gram.double())
    root = vectors * values.clamp(min=0).sqrt()
    expected = ((weight.double() - approximation.double()) @ root).norm() / (weight.double() @ root).norm()
    assert relative_error(weight, approximation, gram) == pytest.approx(float(expected), rel=1e-3)
    assert relative_error(weight.double(), approximation, gram) == pytest.approx(float(expected), rel=1e-6)


@settings(max_examples=40, deadline=None)
@given(shape=shapes, seed=st.integers(0, 1000), name=st.sampled_from(sorted(DELTAS)), dead=st.integers(0, 3))
def test_degenerate_inputs_give_finite_factors(shape: tuple[int, int], seed: int, name: str, dead: int) -> None:
    delta, inputs = case(shape, 5, seed)
    constant = inputs[:, :1].expand(-1, 5)
    grams = [torch.zeros(shape[1], shape[1]), inputs @ inputs.T, constant @ constant.T]
    delta[:dead] = 0
    for gram in grams:
        for dtype in (torch.float32, torch.float64):
            u, v = DELTAS[name](delta.to(dtype), gram.to(dtype), min(shape))
            assert u.isfinite().all()
            assert v.isfinite().all()
            assert relative_error(delta, u @ v, gram) <= 1e-3 * (name == "whitened") + 2 * (name != "whitened")


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), groups=st.integers(1, 4), size=st.integers(1, 5), data=st.data())
def test_pruned_deltas_keep_their_best_columns(seed: int, groups: int, size: int, data: st.DataObject) -> None:
    delta, inputs = case((6, groups * size), 30, seed)
    rank = groups * data.draw(st.integers(1, size))
    u, columns = column_factors(delta, inputs @ inputs.T, rank, groups)
    scores = torch.tensor([float(delta[:, j].norm() * inputs[j].norm()) for j in range(groups * size)])
    assert torch.equal(columns, select_columns(scores, rank, groups))
    assert torch.equal(u, delta[:, columns.tolist()])
    if rank == groups * size:
        assert torch.equal(u, delta)


@pytest.mark.parametrize("rank", [0, 5])
def test_rank_out_of_range_is_refused(rank: int) -> None:
    for factor in (*DELTAS.values(), svd_base):
        with pytest.raises(ValueError, match="rank"):
            factor(torch.zeros(6, 4), torch.eye(4), rank)


def test_half_precision_is_refused() -> None:
    for factor in (*DELTAS.values(), svd_base):
        with pytest.raises(ValueError, match="bfloat16"):
            factor(torch.zeros(6, 4, dtype=torch.bfloat16), torch.eye(4), 2)
    with pytest.raises(ValueError, match="bfloat16"):
        whitened_energy(torch.zeros(6, 4, dtype=torch.bfloat16), torch.eye(4))


@pytest.mark.parametrize("name", ["whitened", "asvd"])
def test_gram_of_another_size_or_none_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="gram"):
        DELTAS[name](torch.zeros(6, 4), torch.eye(6), 2)
    with pytest.raises(ValueError, match="gram"):
        DELTAS[name](torch.zeros(6, 4), None, 2)


def test_overflow_is_no_error_of_zero() -> None:
    assert math.isnan(whitened_energy(torch.full((2, 2), 1e300, dtype=torch.float64), torch.eye(2).double()))
    assert math.isnan(whitened_energy(torch.full((2, 2), torch.inf), torch.eye(2)))


def test_shrinkage_grows_as_tokens_get_fewer() -> None:
    gram = torch.diag(torch.tensor([4.0, 1.0, 1.0]))
    few, many = shrink_gram(gram.clone(), 3, 0.5), shrink_gram(gram.clone(), 3000, 0.5)
    assert few.diagonal().mean() == pytest.approx(2.0)
    assert abs(few[0, 0] - 2.0) < abs(many[0, 0] - 2.0) < 2.0
    assert torch.equal(shrink_gram(gram.clone(), 0, 0.5), torch.eye(3))
    assert torch.equal(shrink_gram(torch.zeros(3, 3), 7, 0.5), torch.eye(3))
    assert torch.equal(shrink_gram(gram.clone(), 10, 0.0), gram)


def test_shrinkage_works_in_place() -> None:
    for tokens in (0, 5):
        gram = torch.rand(3, 3)
        assert shrink_gram(gram, tokens, 0.5) is gram
