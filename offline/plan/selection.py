"""How many layers are compressed, of methods that leave some as they are, and after calibration which."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace

from offline.errors import InputError
from offline.methods.base import Choice
from offline.methods.selection import least_sensitive, sensitivities
from offline.plan.budget import Budget, Problem, solve_stored
from offline.plan.plan import Plan
from offline.source.dense import DenseModel
from offline.work.workdir import WorkDir


def restrict(problem: Problem, model: DenseModel, layers: tuple[int, ...]) -> Problem:
    """The same problem with only these layers to compress: the experts of the others are kept as they are."""
    others = dict(model.other_tensors)
    for layer in model.shape.layers:
        if layer not in layers:
            others |= model.kept_experts(layer)
    return replace(problem, shape=replace(model.shape, layers=layers), other_tensors=others)


def first_selection(problem: Problem, model: DenseModel, choice: Choice) -> Problem:
    """As few layers as reach the ratio when each gives up choice.layer_ratio of its bytes (METHODS 2); the last
    ones, as long as it is not known which. Raises InputError where not even all of them do.

    Fewer than that, where full ranks leave some of the budget over, as with few distinct U's. In few bits full ranks
    cost next to nothing, so one more layer at full ranks is taken rather than lower ones, and some budget is left.
    """
    ratio, layers = problem.recipe.ratio, model.shape.layers
    each = problem.draft.layer_bytes
    least = ratio * model.reader.nbytes / (choice.layer_ratio(problem.recipe) * each)

    def solved(count: int) -> tuple[Problem, Budget] | None:
        found = problem if count == len(layers) else restrict(problem, model, layers[-count:])
        with contextlib.suppress(InputError):
            return found, solve_stored(found, ratio)
        return None

    counts = range(min(math.ceil(least), len(layers)), len(layers) + 1)
    count, chosen = next(((count, found) for count in counts if (found := solved(count))), (0, None))
    if chosen is None:
        return problem
    packed = problem.recipe.bits != 16
    while count > 1 and chosen[0].full(chosen[1]) and (fewer := solved(count - 1)):
        if packed and not fewer[0].full(fewer[1]):
            break
        count, chosen = count - 1, fewer
    return chosen[0]


def settle_layers(plan: Plan, work: WorkDir) -> Plan:
    """The plan with the layers that calibration chose, and their exact ranks. Raises InputError where longer names
    leave no room for the smallest ranks."""
    found = sensitivities(work, plan.model.shape.layers)
    problem = restrict(plan.problem, plan.model, least_sensitive(found, len(plan.problem.shape.layers)))
    budget = solve_stored(problem, plan.recipe.ratio)
    return replace(plan, problem=problem, budget=budget, caps=budget.ranks, final=True)
