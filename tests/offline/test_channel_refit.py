"""Refits of what stays when channels go, against least squares in float64 on the rows themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from offline.algebra.channels import refit_outputs
from offline.algebra.factorization import shrink_gram

OUT, IN, ROWS = 12, 40, 300
Problem = tuple[Tensor, Tensor, Tensor]


@pytest.fixture(scope="module")
def problem() -> Problem:
    """A weight, rows of inputs that go together, and which inputs stay."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(IN, IN, generator=generator) * 0.4 + torch.eye(IN)
    rows = torch.randn(ROWS, IN, generator=generator) @ mix
    return torch.randn(OUT, IN, generator=generator), rows, torch.rand(IN, generator=generator) < 0.6


def refit_dropped(weight: Tensor, gram: Tensor, kept: Tensor) -> Tensor:
    """Where gate and up lost nothing, from the inputs' second moment alone."""
    wide = gram.double()
    return refit_outputs(weight, kept, wide[kept][:, kept], weight.double() @ wide[:, kept], ROWS, 0.0)


def least_squares(inputs: Tensor, outputs: Tensor, ridge: float = 0, towards: Tensor | None = None) -> Tensor:
    """argmin ||outputs - inputs Wᵀ||² + ridge ||W - towards||², by a QR of the stacked rows."""
    width = inputs.shape[1]
    start = torch.zeros(outputs.shape[1], width) if towards is None else towards
    tops = torch.cat([inputs.double(), ridge**0.5 * torch.eye(width, dtype=torch.float64)])
    sides = torch.cat([outputs.double(), ridge**0.5 * start.T.double()])
    return torch.linalg.lstsq(tops, sides).solution.T


def test_what_stays_takes_over_what_went(problem: Problem) -> None:
    weight, rows, kept = problem
    gram = (rows.double().T @ rows.double() / ROWS).float()
    found = refit_dropped(weight, gram, kept)
    expected = least_squares(rows[:, kept], rows.double() @ weight.double().T)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    assert float((rows @ weight.T - rows[:, kept] @ found.T).norm()) < 0.8 * float(
        (rows[:, ~kept] @ weight[:, ~kept].T).norm()
    )


def test_the_shrunk_moment_stands_on_both_sides(problem: Problem) -> None:
    """As least squares on the rows and on as much white noise as the shrinkage adds."""
    weight, rows, kept = problem
    gram = (rows.T @ rows / ROWS).float()
    mean, share = float(gram.diagonal().mean()), 0.5 * IN / (0.5 * IN + 30)
    white = (ROWS * share * mean) ** 0.5 * torch.eye(IN, dtype=torch.float64)
    every = torch.cat([(1 - share) ** 0.5 * rows.double(), white])
    expected = least_squares(every[:, kept], every @ weight.double().T)
    found = refit_dropped(weight, shrink_gram(gram, 30, 0.5), kept)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_outputs_are_fitted_to_what_channels_have_become(problem: Problem) -> None:
    weight, rows, kept = problem
    become = rows[:, kept] + 2 * torch.randn(ROWS, int(kept.sum()), generator=torch.Generator().manual_seed(1))
    outputs = rows @ weight.T
    moment, cross = become.T @ become / ROWS, outputs.T @ become / ROWS
    share = 0.1 * IN / (0.1 * IN + ROWS)
    ridge = ROWS * share * float(moment.diagonal().mean()) / (1 - share)
    found = refit_outputs(weight, kept, moment, cross, ROWS)
    expected = least_squares(become, outputs, ridge, weight[:, kept])
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    plain = refit_dropped(weight, rows.T @ rows / ROWS, kept)
    assert float((outputs - become @ found.T).norm()) < 0.95 * float((outputs - become @ plain.T).norm())


def test_nothing_is_changed_where_nothing_was_lost(problem: Problem) -> None:
    weight, rows, _ = problem
    every, moment = torch.ones(IN, dtype=torch.bool), rows.T @ rows / ROWS
    assert torch.equal(refit_dropped(weight, moment, every), weight)
    found = refit_outputs(weight, every, moment, weight.double() @ moment.double(), ROWS)
    torch.testing.assert_close(found, weight, rtol=1e-5, atol=1e-5)


def test_without_tokens_it_is_plain_dropping(problem: Problem) -> None:
    weight, _, kept = problem
    count = int(kept.sum())
    zero = torch.zeros(count, count), torch.zeros(OUT, count)
    assert torch.equal(refit_dropped(weight, shrink_gram(torch.zeros(IN, IN), 0, 0.1), kept), weight[:, kept])
    assert torch.equal(refit_outputs(weight, kept, *zero, 0), weight[:, kept])
    assert torch.equal(refit_outputs(weight, kept, *zero, 5), weight[:, kept])


def test_none_kept_is_nothing(problem: Problem) -> None:
    weight, rows, _ = problem
    none = torch.zeros(IN, dtype=torch.bool)
    assert refit_dropped(weight, rows.T @ rows, none).shape == (OUT, 0)
    assert refit_outputs(weight, none, torch.zeros(0, 0), torch.zeros(OUT, 0), ROWS).shape == (OUT, 0)


def test_singular_moments_are_no_special_case(problem: Problem) -> None:
    """Channels that are copies, and one that is always zero."""
    weight, rows, kept = problem
    rows = rows.clone()
    rows[:, 1] = rows[:, 0]
    rows[:, 2] = 0
    kept = kept.clone()
    kept[:3] = True
    found = refit_dropped(weight, rows.T @ rows / ROWS, kept)
    assert torch.isfinite(found).all()
    outputs = rows @ weight.T
    best = rows[:, kept].double() @ least_squares(rows[:, kept], outputs, 1e-9).T
    loss = float((outputs - rows[:, kept] @ found.T).norm())
    assert loss == pytest.approx(float((outputs.double() - best).norm()), rel=1e-3)


def test_wrong_shapes_are_refused(problem: Problem) -> None:
    weight, _, kept = problem
    count = int(kept.sum())
    moments = torch.eye(count), torch.zeros(OUT, count)
    with pytest.raises(ValueError, match="the moment is"):
        refit_outputs(weight, kept, torch.eye(count + 1), moments[1], ROWS)
    with pytest.raises(ValueError, match="kept is"):
        refit_outputs(weight, kept[1:], *moments, ROWS)
    with pytest.raises(ValueError, match="cross moment"):
        refit_outputs(weight, kept, torch.eye(count), torch.zeros(OUT, count + 1), ROWS)
