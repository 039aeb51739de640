"""Base: merge and static pruning, against plain loops in float64."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from offline.algebra.merging import MERGES, Merge, MergeOptions
from offline.algebra.pruning import column_scores, select_columns

SHAPE = (5, 7)


@dataclass
class Case:
    """One layer's experts and what calibration saw of them: inputs [in, tokens], Fisher, routed tokens."""

    seed: int
    tokens: list[int]
    weights: list[Tensor] = field(init=False)
    fisher: list[Tensor] = field(init=False)
    inputs: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        self.weights = [torch.randn(SHAPE, generator=generator) for _ in self.tokens]
        self.fisher = [torch.rand(SHAPE, generator=generator) ** 4 * (t > 0) for t in self.tokens]
        self.inputs = [torch.randn(SHAPE[1], t, generator=generator) for t in self.tokens]

    def grams(self) -> list[Tensor]:
        return [x @ x.T / max(x.shape[1], 1) for x in self.inputs]

    def mean(self) -> Tensor:
        return torch.stack(self.weights).double().mean(dim=0)


def run(name: str, case: Case, order: list[int] | None = None, **options: Any) -> Tensor:
    order = list(range(len(case.tokens))) if order is None else order
    return run_parts(name, case, [order], **options)


def run_parts(name: str, case: Case, parts: list[list[int]], **options: Any) -> Tensor:
    """Each part of the experts on a process of its own, states summed as an all-reduce does."""
    processes = [MERGES[name](*SHAPE, len(case.tokens), MergeOptions(**options)) for _ in parts]
    grams = case.grams()
    for number in range(MERGES[name].passes):
        for merge, part in zip(processes, parts, strict=True):
            for i in part:
                merge.add(case.weights[i], case.tokens[i], sum(case.tokens), case.fisher[i], grams[i])
        for tensors in zip(*(merge.state() for merge in processes), strict=True):
            total = torch.stack(tensors).sum(dim=0)
            for tensor in tensors:
                tensor.copy_(total)
        for merge in processes:
            if number + 1 < merge.passes:
                merge.next_pass()
    results = [merge.result() for merge in processes]
    assert all(torch.equal(result, results[0]) for result in results)
    assert results[0].dtype == torch.float32
    return results[0]


routed = st.lists(st.sampled_from([0, 1, 3, 20, 60]), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    tokens=routed.filter(any),
    epsilon=st.sampled_from([1e-6, 1e-3, 1.0]),
    power=st.sampled_from([0.0, 1.0]),
)
def test_fisher_merge_is_the_weighted_mean(seed: int, tokens: list[int], epsilon: float, power: float) -> None:
    case = Case(seed, tokens)
    merged = run("fisher", case, fisher_epsilon=epsilon, frequency_power=power)
    scaled = [f.double() * (t / sum(tokens)) ** power for f, t in zip(case.fisher, tokens, strict=True)]
    mean = sum(float(f.mean()) for f in scaled) / len(tokens)
    top = sum((f + epsilon * mean) * w.double() for f, w in zip(scaled, case.weights, strict=True))
    expected = top / sum(f + epsilon * mean for f in scaled)
    assert torch.allclose(merged.double(), expected, rtol=1e-4, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), tokens=routed)
def test_frequency_merge_weighs_by_routed_tokens(seed: int, tokens: list[int]) -> None:
    case = Case(seed, tokens)
    weights = torch.stack(case.weights).double()
    shares = torch.tensor(tokens if any(tokens) else [1] * len(tokens)).double()
    expected = (weights * shares[:, None, None]).sum(dim=0) / shares.sum()
    assert torch.allclose(run("frequency", case).double(), expected, atol=1e-6)
    assert torch.allclose(run("mean", case).double(), case.mean(), atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000), tokens=routed.filter(any), across=st.booleans(), name=st.sampled_from(["fisher", "mean"])
)
def test_what_an_expert_lacks_has_no_part_in_the_merge(seed: int, tokens: list[int], across: bool, name: str) -> None:
    """Rows or columns, position by position over the experts that have it; what none has is zero."""
    case = Case(seed, tokens)
    masks = (
        torch.rand(len(tokens), SHAPE[1] if across else SHAPE[0], generator=torch.Generator().manual_seed(seed)) > 0.5
    )
    merge = MERGES[name](*SHAPE, len(tokens), MergeOptions(partial="columns" if across else "rows", fisher_epsilon=0.1))
    for weight, fisher, mask, count in zip(case.weights, case.fisher, masks, tokens, strict=True):
        merge.add(weight, count, sum(tokens), fisher, kept=mask)
    had = [mask.double().expand(SHAPE) if across else mask.double()[:, None].expand(SHAPE) for mask in masks]
    mean = sum(float((f.double() * h).sum()) for f, h in zip(case.fisher, had, strict=True))
    mean /= max(sum(float(h.sum()) for h in had), 1)
    counts = [
        h * (f.double() + 0.1 * mean) if name == "fisher" and mean else h for f, h in zip(case.fisher, had, strict=True)
    ]
    top = sum(c * w.double() for c, w in zip(counts, case.weights, strict=True))
    expected = torch.where(sum(had) > 0, top / sum(counts).clamp(min=1e-300), 0.0)
    assert torch.allclose(merge.result().double(), expected, rtol=1e-4, atol=1e-5)


def test_merges_of_whole_matrices_say_so() -> None:
    with pytest.raises(ValueError, match="TiesMerge merges whole matrices only"):
        MERGES["ties"](*SHAPE, 2, MergeOptions(partial="rows"))
    with pytest.raises(ValueError, match="needs to know which"):
        MERGES["mean"](*SHAPE, 2, MergeOptions(partial="rows")).add(torch.zeros(SHAPE), 1, 1)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1000), tokens=routed, shrinkage=st.sampled_from([0.0, 0.1, 1.0]))
def test_regmean_is_the_least_squares_merge(seed: int, tokens: list[int], shrinkage: float) -> None:
    # At least one expert with more tokens than inputs, so that the solution is unique.
    case = Case(seed, [60, *tokens])
    top, bottom = torch.zeros(SHAPE).double(), torch.zeros(SHAPE[1], SHAPE[1]).double()
    for weight, inputs in zip(case.weights, case.inputs, strict=True):
        gram = inputs.double() @ inputs.double().T
        gram = (1 - shrinkage) * gram + shrinkage * gram.diagonal().diag()
        top, bottom = top + weight.double() @ gram, bottom + gram
    merged = run("regmean", case, regmean_shrinkage=shrinkage)
    assert torch.allclose(merged.double(), top @ torch.linalg.inv(bottom), atol=1e-3)


def test_fully_shrunk_regmean_is_the_mean_weighted_by_input_energy() -> None:
    case = Case(3, [4, 0, 9])
    energy = [x.double().square().sum(dim=1) for x in case.inputs]
    expected = sum(w.double() * e for w, e in zip(case.weights, energy, strict=True)) / sum(energy)
    assert torch.allclose(run("regmean", case, regmean_shrinkage=1.0).double(), expected, atol=1e-4)


def test_regmean_leaves_unseen_inputs_at_the_mean() -> None:
    case = Case(0, [3, 2])
    for inputs in case.inputs:
        inputs[4] = 0
    merged = run("regmean", case, regmean_shrinkage=0.0)
    assert torch.allclose(merged[:, 4].double(), case.mean()[:, 4], atol=1e-4)
    assert merged.isfinite().all()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1000), tokens=routed, density=st.sampled_from([0.1, 0.2, 0.5, 1.0]))
def test_ties_trims_elects_and_averages(seed: int, tokens: list[int], density: float) -> None:
    case = Case(seed, tokens)
    merged, mean = run("ties", case, ties_density=density).double(), case.mean()
    differences = []
    for weight in case.weights:
        flat = (weight.double() - mean).flatten()
        best = sorted(range(len(flat)), key=lambda j: -abs(float(flat[j])))[: max(round(density * len(flat)), 1)]
        kept = torch.zeros_like(flat)
        kept[best] = flat[best]
        differences.append(kept)
    expected = mean.flatten().clone()
    for j in range(len(expected)):
        values = [float(d[j]) for d in differences]
        rounding = 1e-6 * sum(map(abs, values)) + 1.2e-7 * len(values) * abs(float(mean.flatten()[j]))
        if abs(sum(values)) <= 3 * rounding:  # as where all were kept, and they are differences from their mean
            assert abs(sum(values)) > rounding / 3 or abs(merged.flatten()[j] - expected[j]) < 1e-5
            expected[j] = merged.flatten()[j]
            continue
        agreeing = [v for v in values if v * sum(values) > 0]
        expected[j] += sum(agreeing) / len(agreeing)
    assert torch.allclose(merged.flatten(), expected, atol=1e-5)


def test_ties_keeps_the_mean_where_no_sign_wins() -> None:
    case = Case(1, [1, 2, 3, 4, 5])
    assert torch.allclose(run("ties", case, ties_density=1.0).double(), case.mean(), atol=1e-6)
    case.weights = [case.weights[0].clone() for _ in case.tokens]
    assert torch.allclose(run("ties", case), case.weights[0], atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), tokens=routed, data=st.data(), name=st.sampled_from(sorted(MERGES)))
def test_neither_order_nor_processes_matter(seed: int, tokens: list[int], data: st.DataObject, name: str) -> None:
    case = Case(seed, tokens)
    whole = run(name, case)
    assert whole.isfinite().all()
    order = data.draw(st.permutations(range(len(tokens))))
    cut = data.draw(st.integers(0, len(order)))
    assert torch.allclose(run(name, case, order), whole, rtol=1e-3, atol=1e-4)
    assert torch.allclose(run_parts(name, case, [order[:cut], order[cut:]]), whole, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", sorted(MERGES))
def test_without_evidence_every_merge_is_the_plain_mean(name: str) -> None:
    case = Case(0, [0, 0, 0, 0])
    case.weights = [torch.full(SHAPE, float(i)) for i in (0, 3, 3, 0)]
    assert torch.allclose(run(name, case, ties_density=1.0), torch.full(SHAPE, 1.5))


def test_an_expert_that_was_never_routed_hardly_moves_the_base() -> None:
    case = Case(0, [10, 0])
    case.weights = [torch.ones(SHAPE), torch.full(SHAPE, 100.0)]
    case.fisher = [torch.ones(SHAPE), torch.zeros(SHAPE)]
    assert torch.allclose(run("fisher", case, fisher_epsilon=1e-6), torch.ones(SHAPE), atol=1e-2)


def test_tiny_fisher_values_do_not_underflow() -> None:
    case = Case(0, [1, 1])
    case.weights = [torch.zeros(SHAPE), torch.ones(SHAPE)]
    case.fisher = [torch.full(SHAPE, 1e-38), torch.full(SHAPE, 3e-38)]
    assert torch.allclose(run("fisher", case, fisher_epsilon=1e-6), torch.full(SHAPE, 0.75), atol=1e-3)


def test_arguments_are_left_as_they_were() -> None:
    for name in MERGES:
        case, same = Case(7, [3, 5]), Case(7, [3, 5])
        run(name, case)
        for given_, kept in ((case.weights, same.weights), (case.fisher, same.fisher)):
            assert all(torch.equal(a, b) for a, b in zip(given_, kept, strict=True))


def new(name: str, experts: int = 1) -> Merge:
    return MERGES[name](*SHAPE, experts, MergeOptions())


def test_what_is_missing_is_refused() -> None:
    with pytest.raises(ValueError, match="Fisher"):
        new("fisher").add(torch.ones(SHAPE), 1, 1)
    with pytest.raises(ValueError, match="Gram matrix of 7"):
        new("regmean").add(torch.ones(SHAPE), 1, 1, None, torch.eye(5))
    with pytest.raises(ValueError, match="weight is"):
        new("mean").add(torch.ones(1, 1), 1, 1)
    merge = new("mean", experts=2)
    merge.add(torch.ones(SHAPE, dtype=torch.bfloat16), 1, 1)
    with pytest.raises(ValueError, match="1 experts were added to a merge of 2"):
        merge.result()
    merge = new("ties")
    merge.add(torch.ones(SHAPE), 1, 1)
    with pytest.raises(ValueError, match="two passes"):
        merge.result()


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
