"""Expected losses of rounding, against the sum over tokens that they stand for."""

from __future__ import annotations

import pytest
import torch

from offline.algebra.losses import column_shares, rounding_losses, row_shares
from offline.algebra.rounding import round_matrix

OUT, IN, ROWS = 96, 64, 500


def test_losses_are_sums_over_tokens_and_a_sample_tells_them() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(OUT, IN, generator=generator) * (0.5 + torch.rand(OUT, 1, generator=generator))
    inputs = torch.randn(ROWS, IN, generator=generator) @ (
        torch.eye(IN) + 0.3 * torch.randn(IN, IN, generator=generator)
    )
    back = torch.randn(ROWS, OUT, generator=generator) * (0.5 + torch.rand(OUT, generator=generator))
    gram, sensitivity = inputs.T @ inputs / ROWS, back.double().square().sum(dim=0)
    bits = [16, 8, 4, 3, 2, 0]
    every = rounding_losses([weight] * 6, [sensitivity] * 6, gram, bits, sample=OUT)
    for found, number in zip(every, bits, strict=True):
        stored = weight if number == 16 else round_matrix(weight, gram, number).dense() if number else 0 * weight
        # Gradients and errors are taken as independent, so squares are multiplied output by output.
        given = (inputs @ (weight - stored).T).double().square().mean(dim=0)
        assert found == pytest.approx(0.5 * float((given * sensitivity).sum()), rel=1e-3, abs=1e-9)
    sampled = rounding_losses([weight] * 6, [sensitivity] * 6, gram, bits, sample=32)
    assert sampled == pytest.approx(every, rel=0.15)
    alone = rounding_losses([weight], [sensitivity], gram, [3], sample=32)
    assert alone == pytest.approx(sampled[3:4], rel=1e-9)


def test_shares_add_up_and_odd_ones_are_even() -> None:
    weight, sensitivity = torch.ones(4, IN), torch.tensor([1.0, 2.0, 3.0, 2.0]).double()
    assert row_shares([weight, weight], [sensitivity, sensitivity]).tolist() == [0.125, 0.25, 0.375, 0.25]
    assert column_shares(torch.diag(torch.tensor([1.0, 3.0]))).tolist() == [0.25, 0.75]
    assert row_shares([0 * weight], [sensitivity]).tolist() == [0.25] * 4
    assert column_shares(torch.zeros(2, 2)).tolist() == [0.5, 0.5]


def test_never_reached_experts_lose_nothing() -> None:
    zero = torch.zeros(OUT).double()
    assert rounding_losses([torch.randn(OUT, IN)], [zero], torch.eye(IN), [2]) == [0]
