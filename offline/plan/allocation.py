"""Adaptive allocation (D2-MoE App. A.7, METHODS 1.7): ranks go where they save most error per byte.

One budget for all layers, the three projections, and the question whether a layer's base pays for itself. The
error of a projection falls with its rank along a measured curve. At a price per byte every projection takes the
rank where error plus price is least, and every selection the kind of base for which that sum is least; the price
is lowered until the budget is used up. For convex curves this is the greedy optimum.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from d2moe_vllm.format.kinds import Role
from offline.errors import InputError
from offline.methods.options import Option
from offline.plan.budget import Budget, Choices, Problem, Ranks, fill
from offline.source.sites import SITES

Curves = Mapping[tuple[int, Option, Role], Tensor]
"""float64 [steps + 1]: what a projection's error costs at ranks 0, 1, 2, ... rank multiples."""


class _Market:
    """What every projection and selection would buy at a price per byte."""

    def __init__(self, problem: Problem, curves: Curves) -> None:
        self.problem, self.curves = problem, curves
        self._tables: dict[Role, Tensor] = {}
        self.base = {
            (role, option): problem.base_bytes(role, option)
            for role in problem.shape.roles
            for option in problem.options
        }

    def buy(self, price: float) -> tuple[Choices, Ranks]:
        choices: Choices = {}
        ranks: Ranks = {}
        for layer in self.problem.shape.layers:
            for site, roles in self.problem.shape.selections.items():
                best = min(
                    (self._best(layer, option, roles, price) for option in self.problem.options),
                    key=lambda found: found[0],
                )
                choices[layer, site] = best[1]
                for role, steps in zip(roles, best[2], strict=True):
                    ranks[layer, role] = steps * self.problem.rank_multiple
        return choices, ranks

    def _best(
        self, layer: int, option: Option, roles: tuple[Role, ...], price: float
    ) -> tuple[float, Option, list[int]]:
        total, steps = 0.0, []
        for role in roles:
            curve = self.curves[layer, option, role]
            cost = curve + price * self._bytes(role, len(curve))
            # Without a base a projection needs a delta.
            lowest = 1 if option == "none" else 0
            step = int(cost[lowest:].argmin()) + lowest
            total += float(cost[step]) + price * self.base[role, option]
            steps.append(step)
        return total, option, steps

    def _bytes(self, role: Role, steps: int) -> Tensor:
        """Of deltas at 0, 1, 2, ... steps of the rank, float64 [steps]."""
        if len(self._tables.get(role, ())) < steps:
            sizes = [self.problem.rank_bytes(role, step * self.problem.rank_multiple) for step in range(steps)]
            self._tables[role] = torch.tensor(sizes, dtype=torch.float64)
        return self._tables[role][:steps]

    def payload(self, choices: Choices, ranks: Ranks) -> int:
        """Bytes of bases and deltas, headers left out."""
        bases = sum(self.base[role, choices[layer, SITES[role]]] for layer, role in ranks)
        return bases + self.problem.delta_bytes(ranks)


def solve_adaptive(problem: Problem, ratio: float, curves: Curves) -> Budget:
    """The allocation of least total error whose files are at most (1 - ratio) of the source's bytes.

    Raises InputError where even the cheapest choice is too large.
    """
    market = _Market(problem, curves)
    target = int((1 - ratio) * problem.draft.source.bytes)
    low, high = -60.0, 60.0  # natural logarithms of prices
    cheapest = problem.solve(*market.buy(math.exp(high)))
    if cheapest.nbytes > target:
        raise InputError(
            f"ratio {ratio:g} cannot be reached: with the smallest bases and ranks it is {cheapest.stored_ratio:.3f}; "
            "choose a lower ratio"
        )
    overhead = cheapest.nbytes - market.payload(*market.buy(math.exp(high)))
    while True:
        found = _lowest_price(market, target - overhead, low, high)
        budget = problem.solve(*found)
        if budget.nbytes <= target:
            break
        overhead += budget.nbytes - target
    choices, ranks = found

    def more(problem: Problem, ranks: Ranks, room: int) -> Ranks:
        return _greedy(problem, market, choices, ranks, room)

    return fill(problem, choices, ranks, target, more)


def _lowest_price(market: _Market, room: int, low: float, high: float) -> tuple[Choices, Ranks]:
    """What is bought at the lowest price that keeps bases and deltas within `room` bytes."""
    found = market.buy(math.exp(high))
    for _ in range(80):
        middle = (low + high) / 2
        attempt = market.buy(math.exp(middle))
        if market.payload(*attempt) <= room:
            found, high = attempt, middle
        else:
            low = middle
    return found


def _greedy(problem: Problem, market: _Market, choices: Choices, ranks: Ranks, room: int) -> Ranks:
    """Spends what is left, one step at a time, where a step saves most error per byte."""
    ranks = dict(ranks)
    left = room - problem.delta_bytes(ranks)
    while True:
        best: tuple[float, tuple[int, Role]] | None = None
        for (layer, role), rank in ranks.items():
            curve, step = market.curves[layer, choices[layer, SITES[role]], role], rank // problem.rank_multiple
            if step + 1 >= len(curve) or (more := problem.step_bytes(role, rank)) > left:
                continue
            gain = float(curve[step] - curve[step + 1]) / more
            if best is None or gain > best[0]:
                best = gain, (layer, role)
        if best is None:
            return ranks
        place = best[1]
        left -= problem.step_bytes(place[1], ranks[place])
        ranks[place] += problem.rank_multiple
