"""What layers buy at one price: against an exhaustive search, and to the byte."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from d2moe_vllm.format.kinds import storage_tensors
from offline.algebra.price import LayerCosts, Settled, Sizes, Way, settle

WAYS = [Way(0, 16), Way(0, 8), Way(0, 4), Way(0, 3), Way(0, 2), Way(4, 2), Way(4, 0)]
LOST = {16: 0.0, 8: 0.0002, 4: 0.02, 3: 0.06, 2: 0.2, 0: 0.8}
"""Of what dropping costs, by the bits of what is rounded."""


def layers(sizes: Sizes, count: int, seed: int = 0, ways: list[Way] = WAYS) -> list[LayerCosts]:
    """Costs as models have them: of many magnitudes, in layers that matter more or less, a base that helps in some."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    found = []
    for number in range(count):
        channels = (4 * torch.randn(sizes.experts, sizes.intermediate, generator=generator).double()).exp() * (
            1 + number
        )
        losses, shares = {}, {}
        for half in ("w13", "w2"):
            helped = float(drawn(1)) ** 2
            total = channels.mean() * sizes.intermediate * (0.5 + drawn(sizes.experts))
            losses[half] = {way: total * LOST[way.delta] * (helped if way.base else 1) for way in ways}
            spread = 0.5 + drawn(*channels.shape)
            shares[half] = spread / spread.sum(dim=1, keepdim=True)
        found.append(LayerCosts(channels, losses, shares))
    return found


def whole(sizes: Sizes) -> int:
    """Bytes of a layer that is as it was."""
    return 2 * 3 * sizes.experts * sizes.hidden * sizes.intermediate


def bytes_of(sizes: Sizes, settled: Settled) -> int:
    """Tensor by tensor, as the format has them."""

    def matrix(out: int, inputs: int, bits: int) -> int:
        kind = "bfloat16" if bits == 16 else f"int{bits}"
        return sum(spec.nbytes for spec in storage_tensors(kind, 64, (out, inputs)).values())

    total = 0
    union = int(settled.kept.any(dim=0).sum())
    for half, times in (("w13", 2), ("w2", 1)):
        way = settled.ways[half]
        for count in settled.kept.sum(dim=1).tolist():
            if count and way.delta:
                total += times * matrix(*((count, sizes.hidden) if half == "w13" else (sizes.hidden, count)), way.delta)
        if union and way.base:
            out, inputs = (union, sizes.hidden) if half == "w13" else (sizes.hidden, union)
            total += times * matrix(out, inputs, way.base)
    if not settled.kept.all():
        has_base = any(way.base for way in settled.ways.values())
        total += (sizes.experts + has_base) * ((sizes.intermediate + 7) // 8)
    return total


def loss_of(costs: LayerCosts, settled: Settled) -> float:
    stays = sum(costs.losses[half][way][:, None] * costs.shares[half] for half, way in settled.ways.items())
    return float(torch.where(settled.kept, stays, costs.channels).sum())


def every_choice(sizes: Sizes, costs: LayerCosts) -> Iterator[tuple[int, float]]:
    """(bytes, loss) of all that a layer may do."""
    count = sizes.experts * sizes.intermediate
    for first, second in itertools.product(costs.losses["w13"], costs.losses["w2"]):
        for bits in itertools.product((False, True), repeat=count):
            kept = torch.tensor(bits).view(sizes.experts, sizes.intermediate)
            found = Settled({"w13": first, "w2": second}, kept, 0, 0)
            yield bytes_of(sizes, found), loss_of(costs, found)


@pytest.mark.parametrize("seed", range(2))
def test_an_exhaustive_search_agrees(seed: int) -> None:
    """But for less than the largest step there is: a price finds the best among the sizes on its way."""
    sizes = Sizes(experts=2, hidden=64, intermediate=3)
    costs = layers(sizes, 2, seed, [Way(0, 4), Way(0, 2), Way(4, 2)])
    first, second = (sorted(set(every_choice(sizes, one))) for one in costs)

    def best(room: int) -> float:
        return min((a + min((b for other, b in second if other <= room - size), default=torch.inf)
                    for size, a in first if size <= room), default=torch.inf)  # fmt: skip

    most = max(first)[0] + max(second)[0]
    step = max(sizes.per_channel({"w13": way, "w2": way})[0] for way in (Way(0, 4),)) + 64 * 3
    for share in (0.1, 0.3, 0.5, 0.7, 0.9):
        room = int(share * most)
        found = settle(costs, sizes, room)
        loss = sum(one.loss for one in found)
        assert best(room) <= loss * (1 + 1e-9)
        assert loss <= best(int(room - step)) * (1 + 1e-9)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.floats(0.02, 1.1), st.sampled_from([1, 4, 16]))
def test_bytes_are_exact_and_never_more_than_there_is_room(seed: int, share: float, multiple: int) -> None:
    sizes = Sizes(experts=3, hidden=64, intermediate=70, multiple=multiple)
    costs = layers(sizes, 3, seed)
    room = int(share * 3 * whole(sizes))
    found = settle(costs, sizes, room)
    for one, cost in zip(found, costs, strict=True):
        assert one.nbytes == bytes_of(sizes, one)
        assert one.loss == pytest.approx(loss_of(cost, one), rel=1e-9, abs=1e-9)
        assert all(count % multiple == 0 or count == 70 for count in one.kept.sum(dim=1).tolist())
    assert sum(one.nbytes for one in found) <= room


@pytest.mark.parametrize("share", [0.07, 0.11, 0.16, 0.23, 0.34, 0.5])
def test_the_room_is_spent(share: float) -> None:
    """But for less than half a percent, where more bytes would save something."""
    sizes = Sizes(experts=4, hidden=64, intermediate=64)
    every = 4 * whole(sizes)
    spent = sum(one.nbytes for one in settle(layers(sizes, 4), sizes, int(share * every)))
    assert 0 <= share * every - spent < 0.005 * every


def test_more_room_is_never_worse_and_the_answer_is_always_the_same() -> None:
    sizes = Sizes(experts=4, hidden=64, intermediate=64)
    costs = layers(sizes, 4)
    losses = []
    for share in (0.03, 0.06, 0.1, 0.15, 0.2, 0.3, 0.5, 0.8, 1.0):
        found, again = (settle(costs, sizes, int(share * 4 * whole(sizes))) for _ in range(2))
        assert all(torch.equal(a.kept, b.kept) and a.ways == b.ways for a, b in zip(found, again, strict=True))
        losses.append(sum(one.loss for one in found))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 1e-6 * losses[0]


def test_a_base_keeps_what_any_expert_keeps_and_is_paid_for_together() -> None:
    """Only ways with a base are there: a channel of which no expert makes much goes for all at once."""
    sizes = Sizes(experts=4, hidden=64, intermediate=64)
    [costs] = layers(sizes, 1, ways=[Way(4, 2)])
    costs.channels[:, :32] *= 1e-6
    [found] = settle([costs], sizes, sizes.layer({"w13": Way(4, 2), "w2": Way(4, 2)}, torch.ones(4, 64).bool()) // 2)
    assert not found.kept[:, :32].any()
    assert found.kept[:, 32:].any()


def test_experts_that_no_token_reached_stay_while_there_is_room() -> None:
    sizes = Sizes(experts=4, hidden=64, intermediate=64)
    [costs] = layers(sizes, 1)
    costs = LayerCosts(torch.full_like(costs.channels, float(costs.channels.mean())), costs.losses, costs.shares)
    for one in (costs.channels, *costs.losses["w13"].values(), *costs.losses["w2"].values()):
        one[2] = 0
    half = whole(sizes) // 2
    assert not settle([costs], sizes, half)[0].kept[2].any()
    [found] = settle([costs.floored()], sizes, int(half * 1.1))
    assert found.kept.all()
    [found] = settle([costs.floored()], sizes, half // 10)
    assert int(found.kept[2].sum()) * 4 < int(found.kept[0].sum())


def test_what_it_refuses() -> None:
    sizes = Sizes(experts=2, hidden=64, intermediate=16)
    [costs] = layers(sizes, 1)
    [found] = settle([costs], sizes, sizes.masks(base=False))
    assert not found.kept.any()
    with pytest.raises(ValueError, match="hold no channel sets"):
        settle([costs], sizes, sizes.masks(base=False) - 1)
    with pytest.raises(ValueError, match="costs are finite"):
        settle([LayerCosts(costs.channels * torch.nan, costs.losses, costs.shares)], sizes, 1000)
    with pytest.raises(ValueError, match="needs ways"):
        settle([LayerCosts(costs.channels, {"w13": costs.losses["w13"]}, costs.shares)], sizes, 1000)
