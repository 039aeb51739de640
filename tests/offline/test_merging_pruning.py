"""Base: merge and static pruning, against plain loops in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offline.merging import MERGES, Evidence, fisher_merge, mean_merge
from offline.pruning import column_scores, select_columns


def evidence(
    tokens: list[int], fisher: list[torch.Tensor] | None, epsilon: float = 1e-3, power: float = 0.0
) -> Evidence:
    return Evidence(torch.tensor(tokens), fisher, epsilon, power)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    experts=st.integers(1, 5),
    epsilon=st.sampled_from([1e-6, 1e-3, 1.0]),
    power=st.sampled_from([0.0, 1.0]),
)
def test_fisher_merge_is_the_weighted_mean(seed: int, experts: int, epsilon: float, power: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(5, 7, generator=generator) for _ in range(experts)]
    fisher = [torch.rand(5, 7, generator=generator) ** 4 for _ in range(experts)]
    tokens = torch.randint(1, 50, (experts,), generator=generator).tolist()
    merged = fisher_merge(weights, evidence(tokens, fisher, epsilon, power))
    scaled = [f.double() * (t / sum(tokens)) ** power for f, t in zip(fisher, tokens, strict=True)]
    mean = sum(float(f.mean()) for f in scaled) / experts
    top = sum((f + epsilon * mean) * w.double() for f, w in zip(scaled, weights, strict=True))
    expected = top / sum(f + epsilon * mean for f in scaled)
    assert torch.allclose(merged.double(), expected, rtol=1e-4, atol=1e-5)


def test_without_evidence_every_merge_is_the_plain_mean() -> None:
    weights = [torch.full((2, 3), float(i)) for i in range(4)]
    nothing = evidence([0, 0, 0, 0], [torch.zeros(2, 3)] * 4)
    for merge in MERGES.values():
        assert torch.allclose(merge(weights, nothing), torch.full((2, 3), 1.5))


def test_an_expert_that_was_never_routed_hardly_moves_the_base() -> None:
    weights = [torch.ones(2, 2), torch.full((2, 2), 100.0)]
    merged = fisher_merge(weights, evidence([10, 0], [torch.ones(2, 2), torch.zeros(2, 2)], epsilon=1e-6))
    assert torch.allclose(merged, torch.ones(2, 2), atol=1e-2)


def test_tiny_fisher_values_do_not_underflow() -> None:
    weights = [torch.zeros(2, 2), torch.ones(2, 2)]
    fisher = [torch.full((2, 2), 1e-38), torch.full((2, 2), 3e-38)]
    assert torch.allclose(fisher_merge(weights, evidence([1, 1], fisher, 1e-6)), torch.full((2, 2), 0.75), atol=1e-3)


def test_order_of_experts_does_not_matter() -> None:
    weights = [torch.randn(6, 4) for _ in range(5)]
    fisher = [torch.rand(6, 4) for _ in range(5)]
    forwards = fisher_merge(weights, evidence([1, 2, 3, 4, 5], fisher))
    backwards = fisher_merge(weights[::-1], evidence([5, 4, 3, 2, 1], fisher[::-1]))
    assert torch.allclose(forwards, backwards, atol=1e-6)


def test_fisher_merge_needs_fisher() -> None:
    with pytest.raises(ValueError, match="Fisher"):
        fisher_merge([torch.ones(1, 1)], evidence([1], None))
    assert torch.equal(mean_merge([torch.ones(1, 1)], evidence([1], None)), torch.ones(1, 1))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1000), groups=st.integers(1, 4), size=st.integers(1, 6), data=st.data())
def test_columns_are_the_best_of_every_group(seed: int, groups: int, size: int, data: st.DataObject) -> None:
    per_group = data.draw(st.integers(1, size))
    # Few distinct values, so that ties are common.
    scores = torch.randint(0, 4, (groups * size,), generator=torch.Generator().manual_seed(seed)).double()
    columns = select_columns(scores, groups * per_group, groups)
    expected = []
    for group in range(groups):
        members = range(group * size, (group + 1) * size)
        best = sorted(members, key=lambda j: (-float(scores[j]), j))[:per_group]
        expected += sorted(best)
    assert columns.tolist() == expected
    assert columns.dtype == torch.int32


@pytest.mark.parametrize(("columns", "kept", "groups"), [(10, 4, 3), (12, 4, 3), (12, 15, 3)])
def test_uneven_selections_are_refused(columns: int, kept: int, groups: int) -> None:
    with pytest.raises(ValueError, match="cannot keep"):
        select_columns(torch.ones(columns), kept, groups)


def test_scores_are_the_papers_product_of_norms() -> None:
    base, inputs = torch.randn(5, 4), torch.randn(4, 9)
    assert torch.allclose(
        column_scores(base.norm(dim=0), inputs.norm(dim=1)),
        torch.tensor([float(base[:, j].norm() * inputs[j].norm()) for j in range(4)]).double(),
    )
