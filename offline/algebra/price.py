"""One price over bits, channels and base (METHODS 4.3): what every layer buys, so that all of them fit into a room.

Every half of a layer, gate+up or down, is stored in one way; every expert keeps a set of intermediate channels. What
a way costs is known channel by channel, and so is what a dropped channel costs, all as expected loss. At a price per
byte a channel stays where it saves more than its own bytes are worth; each layer takes the pair of ways for which loss
and price are least; the price falls until the room is spent. Costs in, masks out: no files, no model.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from d2moe_vllm.format.kinds import GROUP_SIZE, HALVES, Dtype, storage_tensors

HALVINGS = 24
"""Of the logarithm of the price."""
NEAR = 3.0
"""How far from the price at which layers change their ways, in its logarithm, the price of channels is looked for."""
MIXTURES = 5
"""Of layers that have changed their ways already and layers that have not: so many are tried."""
SURVEYED = 1 << 16
"""Channels of a layer, of all experts together, by which its ways are chosen; which of them stay is exact."""
UNSEEN = 1e-3
"""Of what a layer's mean expert costs, the least that any is taken to cost."""
FILLED = 256
"""Purchases of single channels that are tried at the end."""
LOWEST = 1e-12
"""Of the highest price that may be asked, the lowest."""


class Way(NamedTuple):
    """How the projections of a half are stored: bits of the base's codes and of the deltas', 16 for numbers that are
    not rounded. base 0: there is none, and deltas are the experts themselves. delta 0: experts are the base alone."""

    base: int
    delta: int


@dataclass(frozen=True)
class LayerCosts:
    """What a layer may do, as expected loss in nats over the calibration text.

    channels: float64 [experts, intermediate], of a channel that is dropped. losses: by the halves of the format, each
    way that may be taken -> float64 [experts], what the expert's half loses with all its channels. shares: by half,
    float64 [experts, intermediate], how that is spread over the channels, whose sum over an expert's is 1.
    """

    channels: Tensor
    losses: Mapping[str, Mapping[Way, Tensor]]
    shares: Mapping[str, Tensor]

    def stays(self, half: str, way: Way) -> Tensor:
        """What the channels' part of a half loses where they stay, float64 [experts, intermediate]."""
        return self.losses[half][way][:, None] * self.shares[half]

    def floored(self, share: float = UNSEEN) -> LayerCosts:
        """The same, where every expert costs at least a share of the layer's mean expert, spread evenly.

        An expert that the calibration text does not reach costs nothing by measure, and would be the first to go, also
        where there is room for all; other texts reach it.
        """
        size = self.channels.shape[1]
        least = share * float(self.channels.sum(dim=1).mean()) / size

        def floor(losses: Tensor) -> Tensor:
            return losses.clamp(min=share * float(losses.mean()))

        losses = {half: {way: floor(one) for way, one in ways.items()} for half, ways in self.losses.items()}
        return LayerCosts(self.channels.clamp(min=least), losses, self.shares)


class Settled(NamedTuple):
    """What a layer stores; kept: bool [experts, intermediate]; loss: what is expected of it; nbytes: what it takes."""

    ways: Mapping[str, Way]
    kept: Tensor
    loss: float
    nbytes: int


@dataclass(frozen=True)
class Sizes:
    """The shape of the layers, and from it the exact bytes of what they store.

    multiple: an expert keeps a multiple of so many channels, or all of them; dtype: of what is not rounded; gate:
    whether experts have one.
    """

    experts: int
    hidden: int
    intermediate: int
    dtype: Dtype = "bfloat16"
    group_size: int = GROUP_SIZE
    multiple: int = 1
    gate: bool = True

    @functools.lru_cache(maxsize=1 << 20)  # noqa: B019 (what it holds on to is a handful of numbers)
    def matrices(self, half: str, bits: int, channels: int) -> int:
        """Of one expert's projections of a half with so many channels, or of the base's."""
        if not bits or not channels:
            return 0
        shape = (self.hidden, channels) if half == "w2" else (channels, self.hidden)
        storage = self.dtype if bits == 16 else f"int{bits}"
        tensors = storage_tensors(storage, self.group_size, shape).values()
        count = len(HALVES[half]) - (half == "w13" and not self.gate)
        return count * sum(spec.nbytes for spec in tensors)

    def masks(self, *, base: bool) -> int:
        """Of the channel sets of a layer that drops any; base: whether there is one, which has its own."""
        return (self.experts + base) * -(-self.intermediate // 8)

    def per_channel(self, ways: Mapping[str, Way]) -> tuple[float, float]:
        """Bytes of one channel of an expert, and of one of the base, on average."""
        every = self.intermediate
        own = sum(self.matrices(half, way.delta, every) for half, way in ways.items()) / every
        return own, sum(self.matrices(half, way.base, every) for half, way in ways.items()) / every

    def layer(self, ways: Mapping[str, Way], kept: Tensor) -> int:
        """Bytes of a layer."""
        counts = kept.sum(dim=1).tolist()
        union = int(kept.any(dim=0).sum())
        tables = {count: sum(self.matrices(half, way.delta, count) for half, way in ways.items())
                  for count in set(counts)}  # fmt: skip
        bases = sum(self.matrices(half, way.base, union) for half, way in ways.items())
        masks = 0 if bool(kept.all()) else self.masks(base=any(way.base for way in ways.values()))
        return bases + masks + sum(tables[count] for count in counts)


Ways = tuple[Way, Way]
"""Of gate+up, and of down."""


class _Layer:
    """One layer at the market: what it buys at a price."""

    def __init__(self, costs: LayerCosts, sizes: Sizes) -> None:
        self.costs, self.sizes = costs, sizes
        if set(costs.losses) != set(HALVES) or not all(costs.losses.values()):
            raise ValueError(f"a layer needs ways for each of {', '.join(HALVES)}")
        shape = (sizes.experts, sizes.intermediate)
        shaped = [costs.channels.shape == shape]
        for half, ways in costs.losses.items():
            shaped += [costs.shares[half].shape == shape, *(one.shape == shape[:1] for one in ways.values())]
        given = [
            costs.channels,
            *costs.shares.values(),
            *(one for ways in costs.losses.values() for one in ways.values()),
        ]
        if not all(shaped) or not all(bool(torch.isfinite(one).all()) for one in given):
            raise ValueError(f"costs are finite and of {shape[0]} experts with {shape[1]} channels")
        self.worth = [self._worth(half) for half in HALVES]
        self.dropped = float(costs.channels.sum())
        pairs: list[Ways] = [(one, other) for one in self.worth[0] for other in self.worth[1]]
        self.per_channel = {pair: sizes.per_channel(self.named(pair)) for pair in pairs}
        every = torch.ones(shape, dtype=torch.bool, device=costs.channels.device)
        self.every = {pair: self.settled(pair, every) for pair in pairs}
        step = -(-shape[0] * shape[1] // SURVEYED)
        few = slice(None, None, step)
        self.survey = LayerCosts(
            costs.channels[:, few], costs.losses, {half: found[:, few] for half, found in costs.shares.items()}
        )
        self.scale = shape[1] / self.survey.channels.shape[1]

    def _worth(self, half: str) -> list[Way]:
        """The ways of a half, without those that cost and take no less than another."""

        def standing(way: Way) -> tuple[int, float]:
            every = self.sizes.intermediate
            own = self.sizes.experts * self.sizes.matrices(half, way.delta, every)
            return own + self.sizes.matrices(half, way.base, every), float(self.costs.losses[half][way].sum())

        found: list[Way] = []
        least = math.inf
        for way in sorted(self.costs.losses[half], key=standing):
            loss = standing(way)[1]
            if loss < least:
                found.append(way)
                least = loss
        return found

    def named(self, pair: Ways) -> dict[str, Way]:
        return dict(zip(HALVES, pair, strict=True))

    def stays(self, pair: Ways) -> Tensor:
        """What channels lose that stay, float64 [experts, intermediate]."""
        first, second = (self.costs.stays(half, way) for half, way in zip(HALVES, pair, strict=True))
        return first + second

    def saved(self, pair: Ways) -> Tensor:
        """By channels that stay: what dropping them would lose, less what they lose then."""
        return self.costs.channels - self.stays(pair)

    def settled(self, pair: Ways, kept: Tensor) -> Settled:
        # Summed as it is, not as what dropping all would lose less what is saved: that cancels where little is lost.
        loss = float(torch.where(kept, self.stays(pair), self.costs.channels).sum())
        return Settled(self.named(pair), kept, loss, self.sizes.layer(self.named(pair), kept))

    def with_ways(self, pair: Ways, price: float) -> Settled:
        """The best channels with these ways."""
        own, base = self.per_channel[pair]
        gain = self.saved(pair) - price * own
        if base:
            # The base's part of a channel is charged to all experts together, whose own parts pay for it or do not.
            gain = gain.masked_fill(gain.clamp(min=0).sum(dim=0) <= price * base, -torch.inf)
        some = self.settled(pair, _multiples(gain, self.sizes.multiple))
        return min(some, self.every[pair], key=lambda found: found.loss + price * found.nbytes)

    def buy(self, price: float) -> tuple[Ways, Settled]:
        """The first of the best pairs, found by bytes on average, and the best channels with it."""
        best: tuple[float, Ways] | None = None
        survey = self.survey
        second = survey.shares["w2"]
        for one in self.worth[0]:
            rest = survey.channels - survey.stays("w13", one)
            for other in self.worth[1]:
                pair = one, other
                own, base = self.per_channel[pair]
                gain = rest.addcmul(second, survey.losses["w2"][other][:, None], value=-1)
                gain = gain.sub_(price * own).clamp_(min=0)
                saved = float((gain.sum(dim=0) - price * base).clamp_(min=0).sum() if base else gain.sum())
                saved *= self.scale
                every = self.every[pair]
                total = min(
                    self.dropped - saved + price * self.sizes.masks(base=base > 0), every.loss + price * every.nbytes
                )
                if best is None or total < best[0]:
                    best = total, pair
        assert best is not None
        return best[1], self.with_ways(best[1], price)


def _multiples(gain: Tensor, multiple: int) -> Tensor:
    """Of every row of `gain` [experts, intermediate] the best set whose number is a multiple, or all; bool."""
    if multiple == 1:
        return gain > 0
    best = gain.sort(dim=1, descending=True, stable=True)
    sums = torch.cat([torch.zeros_like(gain[:, :1]), best.values.cumsum(dim=1)], dim=1)
    counts = torch.arange(gain.shape[1] + 1, device=gain.device)
    allowed = (counts % multiple == 0) | (counts == gain.shape[1])
    number = sums.masked_fill(~allowed, -torch.inf).argmax(dim=1, keepdim=True)
    return torch.zeros_like(gain, dtype=torch.bool).scatter_(1, best.indices, counts[None, :-1] < number)


def settle(layers: Sequence[LayerCosts], sizes: Sizes, room: int) -> list[Settled]:
    """What every layer stores, within `room` bytes of all of them together, for the least expected loss.

    The price is found by bisection. Where a layer changes its ways at that price, more bytes are asked for at once than
    there are: then all ways that are next to it are tried, each with the channels of its own price. What is left is
    spent channel by channel. Equal choices fall to the first, so the answer is a function of the arguments.
    Raises ValueError where costs have another shape or are not finite, and where not even layers without any channel
    fit into `room`.
    """
    if room < (least := len(layers) * sizes.masks(base=False)):
        raise ValueError(f"{room} bytes hold no channel sets; {least} are the least")
    market = [_Layer(costs, sizes) for costs in layers]
    highest = max(float(costs.channels.sum()) for costs in layers) * 2 + 1e-30
    low, high = math.log(highest * LOWEST), math.log(highest)
    lower = [layer.buy(math.exp(low)) for layer in market]
    if _nbytes(lower) <= room:
        return [found for _, found in lower]
    upper = [layer.buy(math.exp(high)) for layer in market]
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        attempt = [layer.buy(math.exp(middle)) for layer in market]
        if _nbytes(attempt) <= room:
            upper, high = attempt, middle
        else:
            lower, low = attempt, middle
    # From the ways of the smaller purchase to those of the larger one, a layer at a time.
    candidates = [[pair for pair, _ in upper]]
    for number, (pair, _) in enumerate(lower):
        if pair != candidates[-1][number]:
            candidates.append([*candidates[-1][:number], pair, *candidates[-1][number + 1 :]])
    last, count = len(candidates) - 1, min(len(candidates), MIXTURES)
    tried = [candidates[number * last // max(count - 1, 1)] for number in range(count)]
    found = [_with_ways(market, pairs, room, (low + high) / 2) for pairs in tried]
    return min((one for one in found if one is not None), key=lambda one: sum(layer.loss for layer in one))


def _nbytes(found: Sequence[tuple[Ways, Settled]]) -> int:
    return sum(one.nbytes for _, one in found)


def _with_ways(market: Sequence[_Layer], pairs: Sequence[Ways], room: int, near: float) -> list[Settled] | None:
    """The best channels with these ways, or None where none fit; near: the logarithm of a price to look about."""
    highest = math.log(max(float(layer.costs.channels.sum()) for layer in market) * 2 + 1e-30)

    def at(price: float) -> list[Settled] | None:
        found = [layer.with_ways(pair, math.exp(price)) for layer, pair in zip(market, pairs, strict=True)]
        return found if sum(one.nbytes for one in found) <= room else None

    low, high = near - NEAR, near + NEAR
    while (found := at(high)) is None:
        if high >= highest:
            return None
        low, high = high, min(high + NEAR, highest)
    while low > highest + math.log(LOWEST) and (more := at(low)) is not None:
        found, low, high = more, low - NEAR, low
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if (attempt := at(middle)) is not None:
            found, high = attempt, middle
        else:
            low = middle
    return _fill(market, *_upgrade(market, list(pairs), found, room), room)


def _upgrade(
    market: Sequence[_Layer], pairs: list[Ways], found: list[Settled], room: int
) -> tuple[list[Ways], list[Settled]]:
    """Spends what is left on better ways for the channels that stay, those first that save most for a byte."""
    left = room - sum(one.nbytes for one in found)
    while True:
        best: tuple[float, int, Ways, Settled] | None = None
        for number, (layer, one) in enumerate(zip(market, found, strict=True)):
            for pair in layer.per_channel if bool(one.kept.any()) else ():
                if layer.every[pair].nbytes <= layer.every[pairs[number]].nbytes:
                    continue
                more = layer.sizes.layer(layer.named(pair), one.kept) - one.nbytes
                if not 0 < more <= left:
                    continue
                better = layer.settled(pair, one.kept)
                rate = (one.loss - better.loss) / more
                if rate > 0 and (best is None or rate > best[0]):
                    best = rate, number, pair, better
        if best is None:
            return pairs, found
        _, number, pairs[number], better = best
        left -= better.nbytes - found[number].nbytes
        found[number] = better


def _fill(market: Sequence[_Layer], pairs: Sequence[Ways], found: list[Settled], room: int) -> list[Settled]:
    """Spends what is left on channels that are not kept, those first that save most for a byte."""
    multiple = market[0].sizes.multiple
    left = room - sum(one.nbytes for one in found)
    offers: list[tuple[float, int, int]] = []
    for number, (layer, pair, one) in enumerate(zip(market, pairs, found, strict=True)):
        own, base = layer.per_channel[pair]
        gain = layer.saved(pair)
        open_ = ~one.kept & (gain > 0) & (one.kept.any(dim=0) if base else True)
        for expert in open_.any(dim=1).nonzero().flatten().tolist():
            channels = open_[expert].nonzero().flatten()
            gains = gain[expert, channels].sort(descending=True).values
            sums = gains[: len(gains) // multiple * multiple].view(-1, multiple).sum(dim=1)
            offers += [(-value / max(own, 1e-9), number, expert) for value in sums[:FILLED].tolist()]
    offers.sort()
    refused = set()
    for _, number, expert in offers[:FILLED]:
        if (number, expert) in refused:
            continue
        layer, pair, one = market[number], pairs[number], found[number]
        gain = layer.saved(pair)[expert]
        gain = gain.masked_fill(one.kept[expert] | ~one.kept.any(dim=0) if layer.per_channel[pair][1]
                                else one.kept[expert], -torch.inf)  # fmt: skip
        kept = one.kept.clone()
        kept[expert, gain.sort(descending=True, stable=True).indices[:multiple]] = True
        larger = layer.settled(pair, kept)
        if larger.nbytes - one.nbytes > left:
            refused.add((number, expert))
            continue
        found[number] = larger
        left -= larger.nbytes - one.nbytes
    return found
