"""What is to be done: a recipe for a model, with all that could be decided before any work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from d2moe_vllm.format.config import CheckpointConfig
from d2moe_vllm.format.kinds import DTYPES, Role
from offline.algebra.price import Settled
from offline.io.shards import TORCH_DTYPES
from offline.methods import METHODS
from offline.methods.base import Method
from offline.plan.budget import Budget, Problem
from offline.plan.recipe import Recipe
from offline.source.dense import DenseModel

BATCH_TOKENS = 4096
"""Tokens that run through a layer at once during calibration and evaluation, where memory allows."""


@dataclass(frozen=True)
class Resources:
    """batch_tokens: that run through a layer at once (at least one window); rows: of one expert at once; hold_layer:
    a layer's experts are all in memory while it runs, else each is read when it is needed."""

    batch_tokens: int = BATCH_TOKENS
    rows: int = BATCH_TOKENS
    hold_layer: bool = True
    processes: int = 1


@dataclass(frozen=True)
class Plan:
    """recipe: with every `auto` decided; budget: exact files, bytes and ranks, of the uniform allocation where they
    wait for what calibration tells; caps: by layer the largest rank that a projection may get, up to which errors are
    measured, and its rank once the budget is settled; resources: how much is in memory at once; final: whether the
    budget was settled by what calibration told; chosen: what the price chose for each layer, where there is one."""

    model: DenseModel
    recipe: Recipe
    problem: Problem
    budget: Budget
    caps: dict[tuple[int, Role], int]
    resources: Resources
    final: bool = False
    chosen: Mapping[int, Settled] = field(default_factory=dict)

    @property
    def config(self) -> CheckpointConfig:
        return self.budget.config

    @property
    def method(self) -> Method:
        return METHODS[self.recipe.method]

    @property
    def measures(self) -> bool:
        """Whether a first sweep, backwards, measures what errors would cost."""
        return self.method.measures(self.recipe)

    @property
    def needs_fisher(self) -> bool:
        """Whether bases are merged in a sweep backwards: their merge wants Fisher information, and there are any or may
        be."""
        chosen = any(option != "none" for option in self.budget.choices.values())
        return self.method.needs_fisher(self.recipe) and (chosen or not self.settled)

    @property
    def needs_gradient(self) -> bool:
        """Whether any sweep runs backwards."""
        return self.measures or self.needs_fisher

    @property
    def merges_apart(self) -> bool:
        """Whether bases are merged in a sweep backwards over the dense layers, before one forwards that follows the
        compressed ones."""
        return self.follows and self.needs_fisher

    @property
    def follows(self) -> bool:
        """Whether layers are calibrated on the activations of the compressed layers before them."""
        return self.recipe.calibration.inputs == "compressed"

    @property
    def settled(self) -> bool:
        """Whether the budget is final: before calibration, or by now."""
        return self.final or self._settled

    @property
    def priced(self) -> bool:
        """Whether one price decides over bits, channels and base."""
        return self.recipe.priced

    @property
    def _settled(self) -> bool:
        return self.recipe.allocation == "uniform" and not self.recipe.delta.trim and not self.selects

    @property
    def selects(self) -> bool:
        """Whether calibration chooses the layers that are compressed (METHODS 2)."""
        return self.method.choice is not None

    @property
    def hold_layer(self) -> bool:
        return self.resources.hold_layer

    @property
    def processes(self) -> int:
        return self.resources.processes

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of the experts as they are stored."""
        return TORCH_DTYPES[DTYPES[self.model.dtype]]

    @property
    def windows(self) -> tuple[int, int]:
        """Calibration windows and tokens in each."""
        return self.recipe.calibration.windows, int(self.recipe.calibration.seq_len)

    @property
    def tokens(self) -> int:
        return self.windows[0] * self.windows[1]
