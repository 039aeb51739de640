"""Second moments that are computed by half."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offline.algebra import moments
from offline.algebra.moments import Moment


@given(
    size=st.integers(1, 70), block=st.sampled_from([1, 7, 16, 64, 100]), batches=st.lists(st.integers(0, 9), max_size=4)
)
def test_it_is_the_mean_of_outer_products(size: int, block: int, batches: list[int]) -> None:
    """Whatever blocks and batches."""
    rows = [torch.randn(count, size, generator=torch.Generator().manual_seed(size + count)) for count in batches]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moments, "BLOCK", block)
        moment = Moment(size)
        for some in rows:
            moment.add(some)
        found = moment.mean(sum(batches))
    every = torch.cat([torch.zeros(0, size), *rows]).double()
    expected = every.T @ every / max(len(every), 1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    if block == 1:
        assert torch.equal(found, found.T)


def test_half_of_the_products_are_spared(monkeypatch: pytest.MonkeyPatch) -> None:
    """By counting multiplications, not seconds: four blocks take ten products of sixteen."""
    monkeypatch.setattr(moments, "BLOCK", 16)
    done = []
    plain = torch.Tensor.addmm_
    monkeypatch.setattr(
        torch.Tensor, "addmm_", lambda self, a, b: done.append(len(a) * a.shape[1] * b.shape[1]) or plain(self, a, b)
    )
    moment = Moment(64)
    moment.add(torch.ones(5, 64))
    assert sum(done) == 5 * 64 * 64 * 10 / 16
    assert torch.equal(moment.mean(5), torch.ones(64, 64))
