"""MoBE's arithmetic in float64: the start's error is an SVD's, gradients are the error's, a fit helps."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from offline.algebra.factorization import input_moment
from offline.algebra.mixing import Fit, Target, add_gradient, clusters, fit, inverse, mix, project, start
from offline.algebra.sharing import fitted_u, shared_v


def experts(count: int, out: int, inputs: int, seed: int = 0) -> list[Tensor]:
    """Weights that share something, float64."""
    generator = torch.Generator().manual_seed(seed)

    def draw() -> Tensor:
        return torch.randn(out, inputs, generator=generator, dtype=torch.float64)

    common = draw() * torch.logspace(0, -1.5, inputs, dtype=torch.float64)
    return [common + 0.5 * draw() for _ in range(count)]


def moment(inputs: int, seed: int = 1) -> Tensor:
    """A second moment of inputs with directions of very different size."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(inputs, 4 * inputs, generator=generator, dtype=torch.float64)
    x *= torch.logspace(0, -1, inputs, dtype=torch.float64)[:, None]
    return x @ x.T / x.shape[1]


@pytest.mark.parametrize("function", ["silu", "tanh"])
def test_inverse_is_exact_where_it_is_used(function: str) -> None:
    values = torch.linspace(-0.2, 0.2, 101, dtype=torch.float64)
    forward = {"silu": torch.nn.functional.silu, "tanh": torch.tanh}[function]
    torch.testing.assert_close(forward(inverse(function, values)), values, rtol=0, atol=1e-14)


@pytest.mark.parametrize("function", ["silu", "tanh"])
@pytest.mark.parametrize(("count", "bases", "groups"), [(8, 2, 1), (8, 4, 2), (7, 3, 1), (5, 1, 1), (4, 4, 1)])
def test_the_start_has_the_error_of_grouped_singular_value_decompositions(
    function: str, count: int, bases: int, groups: int
) -> None:
    """Whitened by one metric that all share; the SVDs are torch's own, of the stacked experts."""
    rank, weights, gram = 5, experts(count, 12, 10), moment(10)
    root = torch.linalg.cholesky(gram)
    expected = 0.0
    vs = []
    for members in clusters(count, bases):
        stacked = torch.cat([weights[expert] for expert in members])
        expected += float(torch.linalg.svdvals(stacked @ root)[rank:].square().sum())
        moments = sum((input_moment(weights[expert], torch.float64) for expert in members), torch.zeros(()))
        vs.append(shared_v(gram * len(members), moments, rank, len(members))[0])
    matrices, logits = start(torch.stack(vs), count, function, groups)
    found = 0.0
    for expert, weight in enumerate(weights):
        v = mix(matrices.double(), logits[expert].double().softmax(dim=0), function)
        left = (weight - fitted_u(weight, gram, v) @ v) @ root
        found += float(left.square().sum())
    assert math.sqrt(found) == pytest.approx(math.sqrt(expected), rel=1e-4)
    # No expert mixes from another group's bases, and each has something to move where it has a choice.
    alpha = logits.softmax(dim=1)
    size = bases // groups
    for expert, row in enumerate(alpha.tolist()):
        own = next(j for j, members in enumerate(clusters(count, bases)) if expert in members) // size
        used = [j for j, value in enumerate(row) if value > 0]
        assert used == list(range(own * size, (own + 1) * size))


def test_fitted_u_is_least_squares() -> None:
    """Against torch's solver on explicit inputs; where V has rows of zeros the others are as if it had not."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(9, 40, generator=generator, dtype=torch.float64)
    weight = torch.randn(6, 9, generator=generator, dtype=torch.float64)
    v = torch.randn(4, 9, generator=generator, dtype=torch.float64)
    expected = torch.linalg.lstsq((v @ x).T, (weight @ x).T).solution.T
    torch.testing.assert_close(fitted_u(weight, x @ x.T, v), expected, rtol=1e-8, atol=1e-9)
    with_zeros = torch.cat([v, torch.zeros(2, 9, dtype=torch.float64)])
    torch.testing.assert_close(fitted_u(weight, x @ x.T, with_zeros)[:, :4], expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("gram", [None, moment(10)], ids=["plain", "weighted"])
@pytest.mark.parametrize("function", ["silu", "tanh"])
def test_gradients_are_those_of_the_error_with_the_best_a(function: str, gram: Tensor | None) -> None:
    """Against autograd through the closed form of A, which the code does not differentiate."""
    generator = torch.Generator().manual_seed(3)
    weight = experts(1, 12, 10)[0]
    bases = torch.randn(3, 4, 10, generator=generator, dtype=torch.float64)
    logits = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    metric = torch.eye(10, dtype=torch.float64) if gram is None else gram

    def error(bases: Tensor, logits: Tensor) -> Tensor:
        v = mix(bases, logits[1].softmax(dim=0), function)
        a = torch.linalg.solve(v @ metric @ v.T, v @ metric @ weight.T).T
        left = weight - a @ v
        return (left @ metric * left).sum()

    leaves = [bases.clone().requires_grad_(), logits.clone().requires_grad_()]
    expected = error(*leaves)
    expected.backward()
    into = [torch.zeros_like(bases), torch.zeros_like(logits)]
    energy = float((weight @ metric * weight).sum())
    found = add_gradient(bases, logits, Target(1, weight, gram, energy, 2.0), function, into)
    assert found == pytest.approx(expected.item(), rel=1e-9)
    for mine, leaf in zip(into, leaves, strict=True):
        torch.testing.assert_close(mine, 2 * leaf.grad, rtol=1e-6, atol=1e-9)


def run(weights: list[Tensor], bases: int, rank: int, function: str = "silu", **changes: float) -> Fit:
    vs = []
    for members in clusters(len(weights), bases):
        moments = sum((input_moment(weights[expert], torch.float64) for expert in members), torch.zeros(()))
        vs.append(shared_v(torch.eye(weights[0].shape[1]), moments, rank, len(members))[0])
    energies = [float(weight.square().sum()) for weight in weights]

    def step(matrices: Tensor, logits: Tensor) -> tuple[float, list[Tensor]]:
        into = [torch.zeros_like(matrices), torch.zeros_like(logits)]
        total = sum(
            add_gradient(matrices, logits, Target(e, weight.float(), None, energies[e], 1.0), function, into)
            for e, weight in enumerate(weights)
        )
        return total / sum(energies), [gradient / sum(energies) for gradient in into]

    settings = {"learning_rate": 0.07, "max_steps": 200, "window": 25, "tolerance": 1e-3, **changes}
    return fit(*start(torch.stack(vs), len(weights), function, 1), step, advance=lambda share: None, **settings)


@pytest.mark.parametrize("function", ["silu", "tanh"])
def test_a_fit_ends_below_its_start(function: str) -> None:
    found = run(experts(8, 24, 16), 2, 6, function)
    assert found.end < 0.97 * found.start
    assert found.ended in ("converged", "max_steps")
    assert found.halvings == 0


def test_a_fit_stops_where_nothing_is_gained_any_more() -> None:
    assert run(experts(8, 24, 16), 2, 6, tolerance=0.5).steps == 25
    # One basis for all experts starts at the optimum: there is nothing to mix.
    found = run(experts(4, 24, 16), 1, 6)
    assert found.ended == "converged"
    assert found.end == pytest.approx(found.start, rel=1e-3)
    assert run(experts(4, 24, 16), 2, 6, max_steps=0).steps == 0


def test_a_fit_that_diverges_goes_on_from_its_best_point_more_slowly() -> None:
    found = run(experts(8, 24, 16), 2, 6, learning_rate=30.0)
    assert found.halvings > 0
    assert found.end <= found.start
    assert torch.isfinite(found.bases).all()


def test_a_fit_that_never_holds_ends_as_its_start() -> None:
    found = run(experts(8, 24, 16), 2, 6, learning_rate=1e30)
    assert found.ended == "diverged"
    assert found.end == found.start
    assert torch.isfinite(found.bases).all()
    assert torch.isfinite(found.logits).all()


def test_overflow_is_told_by_nan() -> None:
    weight, v = torch.full((4, 6), 1e30), torch.full((2, 6), 1e30)
    assert math.isnan(project(weight, None, v).explained)
