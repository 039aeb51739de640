"""What a device that serves a compressed model holds, and ratios as they are told."""

from __future__ import annotations

import math
from dataclasses import dataclass

from offline.errors import UnreachableError
from offline.plan.budget import Budget, Problem
from offline.plan.kv_cache import KVCache
from offline.plan.make import first_budget
from offline.plan.recipe import Recipe
from offline.plan.resident import check_parallel, expert_bytes, other_bytes
from offline.plan.serving import Resolved, activation_bytes, graph_bytes
from offline.source.dense import DenseModel

STEP = 1_000_000
"""Ratios are found to so many parts of the whole, rounded up: a ratio that is read off a card gives the same files."""


def ratio_of(target: int, source: int) -> float:
    """The smallest ratio, of those that are told, whose files are at most `target` of `source` bytes."""
    parts = math.ceil((source - target) * STEP / source)
    return min(max(parts, 1), STEP - 1) / STEP


def told(ratio: float) -> float:
    """The highest ratio, of those that are told, that is no higher."""
    return math.floor(ratio * STEP) / STEP


def highest_ratio(model: DenseModel, recipe: Recipe) -> float:
    """That a method can reach, of those that are told."""
    try:
        first_budget(model, recipe.model_copy(update={"ratio": (STEP - 1) / STEP}))
    except UnreachableError as error:
        return told(error.most)
    return (STEP - 1) / STEP


@dataclass(frozen=True)
class Needs:
    """Bytes of one device besides weights."""

    serving: Resolved
    cache: KVCache
    kv_cache: int
    activations: int
    graphs: int

    @property
    def weights(self) -> int:
        """What is left for weights; negative where the rest alone is too much."""
        return self.serving.usable_bytes - self.kv_cache - self.activations - self.graphs


def needs(model: DenseModel, recipe: Recipe, serving: Resolved) -> Needs:
    """Raises InputError where the cache is not known, or the ranks do not divide the model."""
    config, family = model.settings, model.family
    cache = serving.cache(family, config)
    ranks, whole = serving.tensor_parallel_size, serving.expert_parallel
    check_parallel(config, family, recipe.base.groups, ranks, expert_parallel=whole)
    step = serving.max_num_batched_tokens
    return Needs(
        serving,
        cache,
        serving.kv_cache_bytes(cache),
        activation_bytes(serving, family, config, model.shape, recipe, step),
        graph_bytes(serving, family, config, model.shape, recipe),
    )


@dataclass(frozen=True)
class Held:
    """Bytes of weights. files: on disk; others, experts: on the rank that holds most, what is not compressed and what
    is."""

    files: int
    others: int
    experts: int

    @property
    def weights(self) -> int:
        return self.others + self.experts


def held(model: DenseModel, problem: Problem, budget: Budget, serving: Resolved) -> Held:
    """What a budget's files become on one device."""
    ranks, whole = serving.tensor_parallel_size, serving.expert_parallel
    others = other_bytes(problem.other_tensors, model.settings, model.family, ranks)
    return Held(budget.nbytes, others, expert_bytes(budget.config, ranks, expert_parallel=whole))


def beside(model: DenseModel) -> int:
    """Of files what is no compressed expert, where all layers are compressed."""
    return sum(spec.nbytes for spec in model.other_tensors.values())


def uncompressed(model: DenseModel, ranks: int) -> int:
    """Bytes of the original's weights on one device; of an fp8 original about."""
    others = other_bytes(model.other_tensors, model.settings, model.family, ranks)
    return others - (-min(model.expert_bytes, model.reader.nbytes - beside(model)) // ranks)
