"""Sizes as people say them: of files, or of the device that has to hold the model; and the plan that comes of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from offline.errors import InputError, UnreachableError
from offline.io.units import size_above
from offline.plan.fit import Fit, solve_fit
from offline.plan.make import make_plan
from offline.plan.needs import highest_ratio, ratio_of
from offline.plan.plan import Plan
from offline.plan.recipe import Recipe
from offline.plan.serving import Serving
from offline.source.dense import DenseModel


@dataclass(frozen=True)
class Asked:
    """One of the two. files: bytes of the result's weight files at most; serving: what a device is to do."""

    files: int | None = None
    serving: Serving | None = None


def plan_asked(model: DenseModel, recipe: Recipe, asked: Asked | None, **options: Any) -> tuple[Plan, Fit | None]:
    """`make_plan` with the ratio that `asked` takes, the recipe's own where nothing is; with `--fit` its arithmetic.

    Raises InputError where what is asked cannot be, and says what can.
    """
    if asked is None:
        return make_plan(model, recipe, **options), None
    if recipe.accounting == "paper":
        raise InputError("--size and --fit count bytes, and accounting paper does not; leave it out")
    if asked.serving is not None:
        fit, first = solve_fit(model, recipe, asked.serving)
        return make_plan(model, first.problem.recipe, first=first, **options), fit
    return _plan_files(model, recipe, int(asked.files or 0), options), None


def _plan_files(model: DenseModel, recipe: Recipe, files: int, options: dict[str, Any]) -> Plan:
    source = model.reader.nbytes
    if files >= source:
        raise InputError(
            f"--size {files:,} bytes is no less than the {source:,} that {model.name} has already; choose a smaller one"
        )
    try:
        return make_plan(model, recipe.model_copy(update={"ratio": ratio_of(files, source)}), **options)
    except UnreachableError:
        least = math.ceil((1 - highest_ratio(model, recipe)) * source)
        raise InputError(
            f"--size {files:,} bytes is less than this method can reach; choose --size {size_above(least)} or more"
        ) from None
