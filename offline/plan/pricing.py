"""The budget of whole deltas: one price over bits, channels and base, solved for the files (METHODS 4.3).

The price knows payloads; what files have besides, headers and all that is no expert, is found by laying them out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from d2moe_vllm.format.config import Channels, CheckpointConfig, Layer, Projection
from d2moe_vllm.format.kinds import HALVES
from offline.algebra.price import LayerCosts, Settled, Sizes, settle
from offline.errors import UnreachableError
from offline.io.shards import plan_shards
from offline.methods.pricing import ways
from offline.methods.storing import storage_of
from offline.plan.budget import Budget, Problem
from offline.source.sites import SITES

Chosen = Mapping[int, Settled]
"""Layer -> what it stores."""


@dataclass(frozen=True)
class Priced:
    """A budget, and what every layer's part in it is."""

    budget: Budget
    chosen: Chosen


def solve_priced(problem: Problem, costs: Mapping[int, LayerCosts]) -> Priced:
    """The choice of least expected loss whose files are at most (1 - ratio) of the source's bytes; smaller where more
    bytes would save nothing. Raises UnreachableError where not even experts without channels fit."""
    source, recipe, shape = problem.draft.source, problem.recipe, problem.shape
    target = int((1 - recipe.ratio) * source.bytes)
    sizes = Sizes(
        shape.num_experts,
        shape.hidden_size,
        shape.intermediate_size,
        problem.draft.dtype,
        recipe.group_size,
        int(recipe.delta.channel_multiple),
        "gate" in shape.roles,
    )
    least = sizes.masks(base=False) * len(costs)
    room = target - sum(spec.nbytes for spec in problem.other_tensors.values())
    spare = 0
    while True:
        if room < least:
            raise _unreachable(problem, sizes)
        chosen = _settle(costs, sizes, room)
        budget = budget_of(problem, chosen)
        if budget.nbytes <= target:
            return Priced(budget, chosen)
        # Headers name offsets and counts, whose digits vary with the choice.
        room -= budget.nbytes - target + spare
        spare = max(2 * spare, 16)


def _settle(costs: Mapping[int, LayerCosts], sizes: Sizes, room: int) -> dict[int, Settled]:
    first, count = next(iter(costs.values())), len(costs)
    if any(one is not first for one in costs.values()):
        return dict(zip(costs, settle(list(costs.values()), sizes, room), strict=True))
    # Layers that cost the same, as before calibration all do: some have the best choice below an equal share of the
    # room, and as many as there is room for the next one above it.
    below = settle([first], sizes, room // count)[0]
    above, many = below, 0
    for more in MORE:
        above = settle([first], sizes, int(more * room / count))[0]
        if above.nbytes > max(below.nbytes, room // count):
            many = (room - count * below.nbytes) // (above.nbytes - below.nbytes)
            break
    return {layer: above if number < many else below for number, layer in enumerate(costs)}


MORE = (1.05, 1.2, 1.5, 2.0)
"""Shares of the room at which the next choice is looked for."""


def _unreachable(problem: Problem, sizes: Sizes) -> UnreachableError:
    nothing = torch.zeros(sizes.experts, sizes.intermediate, dtype=torch.bool)
    way = next(way for way in ways(problem.recipe) if not way.base)
    empty = Settled(dict.fromkeys(HALVES, way), nothing, 0.0, 0)
    most = max(budget_of(problem, dict.fromkeys(problem.shape.layers, empty)).stored_ratio, 0.0)
    return UnreachableError(
        f"ratio {problem.recipe.ratio:g} cannot be reached: without any expert it is {most:.3f}; choose a lower ratio",
        math.floor(1000 * most) / 1000,
    )


def budget_of(problem: Problem, chosen: Chosen) -> Budget:
    """The exact files of what layers store."""
    layers = {number: layer_of(problem, one) for number, one in chosen.items()}
    config = CheckpointConfig.model_validate(problem.draft.model_dump() | {"layers": layers})
    shards = plan_shards({**problem.other_tensors, **config.expert_tensors()}, problem.shard_bytes)
    kept = sum(float(one.kept.double().mean()) for one in chosen.values()) / len(chosen)
    bases = {half: {n: "full" if one.ways[half].base else "none" for n, one in chosen.items()} for half in HALVES}
    choices = {(number, SITES[roles[0]]): bases[half][number] for half, roles in HALVES.items() for number in chosen}
    return Budget(config, shards, dict.fromkeys(problem.shape.roles, kept), choices)  # type: ignore[arg-type]


def layer_of(problem: Problem, one: Settled) -> Layer:
    """config.json's entry."""
    group_size, groups = problem.recipe.group_size, problem.recipe.base.groups

    def counts(kept: Tensor) -> tuple[int, ...]:
        return tuple(kept.view(groups, -1).sum(dim=1).tolist())

    projections: dict[str, Any] = {
        role: Projection(
            full_base=bool(way.base),
            delta="dense" if way.delta else "factors",
            base_storage=storage_of(way.base, group_size),
            delta_storage=storage_of(way.delta, group_size),
            bias=problem.shape.biased,
        )
        for half, way in one.ways.items()
        for role in problem.shape.halves[half]
    }
    if bool(one.kept.all()):
        return Layer(**projections)
    base = counts(one.kept.any(dim=0)) if any(way.base for way in one.ways.values()) else None
    return Layer(**projections, channels=Channels(experts=tuple(map(counts, one.kept)), base=base))


SPREAD = 1.47
"""Of the logarithms of channels' costs: with it a fifth of the channels costs 1 % of what all do, half of them 7 %."""
LOST = {16: 0.0, 8: 1e-4, 4: 7e-3, 3: 0.024, 2: 0.1}
"""By bits of the experts' numbers, what is lost of what the loss of all channels would cost."""


def typical_costs(problem: Problem) -> dict[int, LayerCosts]:
    """For a plan, before anything is measured: every layer as the shared models' are on average, and without a base,
    as whether one pays calibration alone can tell."""
    shape = problem.shape
    experts, channels = shape.num_experts, shape.intermediate_size
    places = (torch.arange(experts * channels, dtype=torch.float64) + 0.5) / (experts * channels)
    cost = torch.exp(SPREAD * torch.special.ndtri(places))
    # Every expert has some of all costs, in each of the slices that ranks share out.
    groups = problem.recipe.base.groups
    sliced = (cost / cost.sum()).view(channels // groups, groups, experts)
    cost = sliced.transpose(0, 1).reshape(channels, experts).T.contiguous()
    even = torch.full((experts, channels), 1 / channels, dtype=torch.float64)
    own = [way for way in ways(problem.recipe) if not way.base]
    lost = {way: torch.full((experts,), LOST[way.delta] / (2 * experts), dtype=torch.float64) for way in own}
    found = LayerCosts(cost, dict.fromkeys(HALVES, lost), dict.fromkeys(HALVES, even))
    return dict.fromkeys(shape.layers, found)


def saves_nothing(problem: Problem, budget: Budget) -> bool:
    """Whether the result is smaller than asked because more bytes would save nothing: by over half a point."""
    return budget.stored_ratio > problem.recipe.ratio + 0.005
