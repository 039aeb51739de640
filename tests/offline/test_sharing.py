"""Shared V and merged U against singular value decompositions of the stacked experts, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from offline.algebra.factorization import input_moment, output_moment, whitened_factors
from offline.algebra.sharing import least, mean_u, merged_u, seed_experts, shared_v, unexplained

shapes = st.tuples(st.integers(2, 12), st.integers(2, 12))


def case(shape: tuple[int, int], experts: int, tokens: int, seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """Deltas [out, in] and inputs [in, tokens] of each expert; expert 1, if there is one, saw no token."""
    generator = torch.Generator().manual_seed(seed)
    deltas = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(experts)]
    counts = [0 if i == 1 else tokens + i for i in range(experts)]
    scales = torch.logspace(1, -1, shape[1], dtype=torch.float64)[:, None]
    inputs = [torch.randn(shape[1], n, generator=generator, dtype=torch.float64) * scales for n in counts]
    return deltas, inputs


def share_v(deltas: list[Tensor], inputs: list[Tensor], rank: int) -> tuple[Tensor, list[Tensor]]:
    """As a caller streams it."""
    gram = sum(((x @ x.T) for x in inputs), torch.zeros(()))
    moment = sum((input_moment(d, torch.float64) for d in deltas), torch.zeros(()))
    v, projector = shared_v(gram, moment, rank, len(deltas))
    return v, [delta @ projector for delta in deltas]


@settings(max_examples=80, deadline=None)
@given(shape=shapes, experts=st.integers(1, 4), tokens=st.integers(1, 30), seed=st.integers(0, 999), data=st.data())
def test_shared_v_is_the_svd_of_the_stacked_deltas(
    shape: tuple[int, int], experts: int, tokens: int, seed: int, data: st.DataObject
) -> None:
    deltas, inputs = case(shape, experts, tokens, seed)
    rank = data.draw(st.integers(1, shape[1]))
    v, us = share_v(deltas, inputs, rank)
    assert v.shape == (rank, shape[1])
    assert all(u.shape == (shape[0], rank) and u.isfinite().all() for u in us)
    everything = torch.cat(inputs, dim=1)
    outputs = torch.cat(deltas) @ everything
    error = torch.cat([(d - u @ v) @ everything for d, u in zip(deltas, us, strict=True)]).norm()
    best = torch.linalg.svdvals(outputs)[rank:].norm()
    assert error <= best * (1 + 1e-6) + 1e-6 * outputs.norm()


@settings(max_examples=30, deadline=None)
@given(shape=shapes, experts=st.integers(1, 4), seed=st.integers(0, 999))
def test_shared_v_is_nested_balanced_and_exact_at_full_rank(shape: tuple[int, int], experts: int, seed: int) -> None:
    deltas, inputs = case(shape, experts, 40, seed)
    full = min(shape[0] * experts, shape[1])
    v, us = share_v(deltas, inputs, full)
    for u, delta in zip(us, deltas, strict=True):
        assert torch.allclose(u @ v, delta, atol=1e-7)
    rank = max(full // 2, 1)
    v_short, us_short = share_v(deltas, inputs, rank)
    assert torch.allclose(us[0][:, :rank] @ v[:rank], us_short[0] @ v_short, atol=1e-7)
    norms = torch.stack([u.square().sum(dim=0) for u in us]).mean(dim=0).sqrt()
    assert torch.allclose(norms, v.norm(dim=1), rtol=1e-4)


def test_no_perturbation_of_a_shared_v_helps() -> None:
    deltas, inputs = case((6, 8), 3, 20, 0)
    v, us = share_v(deltas, inputs, 3)
    everything = torch.cat(inputs, dim=1)

    def error(v: Tensor, us: list[Tensor]) -> float:
        return sum(float(((d - u @ v) @ everything).square().sum()) for d, u in zip(deltas, us, strict=True))

    best = error(v, us)
    generator = torch.Generator().manual_seed(0)
    for size in (0.1, 1e-3):
        moved = v + size * torch.randn(v.shape, generator=generator, dtype=v.dtype)
        shifted = [u + size * torch.randn(u.shape, generator=generator, dtype=u.dtype) for u in us]
        assert error(moved, us) >= best
        assert error(v, shifted) >= best


@settings(max_examples=60, deadline=None)
@given(shape=shapes, experts=st.integers(1, 4), tokens=st.integers(1, 30), seed=st.integers(0, 999), data=st.data())
def test_a_merged_u_is_the_svd_of_the_experts_side_by_side(
    shape: tuple[int, int], experts: int, tokens: int, seed: int, data: st.DataObject
) -> None:
    deltas, inputs = case(shape, experts, tokens, seed)
    rank = data.draw(st.integers(1, shape[0]))
    moments = [output_moment(d, x @ x.T, torch.float64) for d, x in zip(deltas, inputs, strict=True)]
    u = merged_u(torch.stack(moments).sum(dim=0), rank)
    outputs = [d @ x for d, x in zip(deltas, inputs, strict=True)]
    error = sum(float((y - u @ (u.T @ y)).square().sum()) for y in outputs) ** 0.5
    together = torch.cat(outputs, dim=1)
    assert error <= torch.linalg.svdvals(together)[rank:].norm() * (1 + 1e-6) + 1e-6 * together.norm()
    assert torch.allclose(u.T @ u, torch.eye(rank, dtype=torch.float64), atol=1e-9)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_a_cluster_of_one_is_the_whitened_factorization(shape: tuple[int, int]) -> None:
    deltas, inputs = case(shape, 1, 30, 0)
    gram = inputs[0] @ inputs[0].T
    u = merged_u(output_moment(deltas[0], gram, torch.float64), 4)
    own = whitened_factors(deltas[0], gram, 4)
    assert torch.allclose(u @ (u.T @ deltas[0]), own[0] @ own[1], atol=1e-8)


def test_experts_join_the_seed_that_explains_them() -> None:
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64)).Q
    seeds = [basis[:, :3], basis[:, 3:6]]
    delta = seeds[1] @ torch.randn(3, 5, generator=generator, dtype=torch.float64)
    inputs = torch.randn(5, 20, generator=generator, dtype=torch.float64)
    errors = [unexplained(delta, inputs @ inputs.T, u, u.T @ delta) for u in seeds]
    expected = [float(((delta - u @ u.T @ delta) @ inputs).square().sum()) for u in seeds]
    assert torch.allclose(torch.tensor(errors), torch.tensor(expected), atol=1e-9)
    assert least(errors) == 1
    assert least([2.0, 1.0, 1.0]) == 1


def test_seeds_are_the_most_routed_experts() -> None:
    assert seed_experts([5, 9, 9, 0, 7], 3) == [1, 2, 4]
    assert seed_experts([1, 1, 1], 2) == [0, 1]
    with pytest.raises(ValueError, match="cannot choose 3 of 2"):
        seed_experts([1, 2], 3)


def test_mean_u_weighs_by_tokens() -> None:
    a, b = torch.rand(3, 2), torch.rand(3, 2)
    assert torch.allclose(mean_u([(a, 3), (b, 1)]).float(), (3 * a + b) / 4)
    assert torch.allclose(mean_u([(a, 0), (b, 0)]).float(), (a + b) / 2)
    with pytest.raises(ValueError, match="no members"):
        mean_u([])


def test_nothing_to_share_is_zero_not_nan() -> None:
    v, projector = shared_v(torch.zeros(4, 4), torch.zeros(4, 4), 2, 3)
    assert torch.equal(v, torch.zeros(2, 4).double())
    assert torch.equal(projector, torch.zeros(4, 2).double())
    assert merged_u(torch.zeros(4, 4), 2).isfinite().all()


@pytest.mark.parametrize("rank", [0, 5])
def test_rank_out_of_range_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match="rank"):
        shared_v(torch.eye(4), torch.eye(4), rank, 1)
    with pytest.raises(ValueError, match="rank"):
        merged_u(torch.eye(4), rank)
