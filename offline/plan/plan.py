"""What is to be done: a recipe for a model, with all that could be decided before any work."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch

from d2moe_vllm.format.config import CheckpointConfig
from d2moe_vllm.format.kinds import DTYPES, Role, Stored
from offline.algebra.price import Settled
from offline.algebra.products import Products
from offline.io.shards import TORCH_DTYPES
from offline.io.units import FLOAT32
from offline.methods import METHODS
from offline.methods.base import Method
from offline.methods.layer import LayerJob, Progress
from offline.plan.budget import Budget, Problem, Ranks
from offline.plan.rates import Work
from offline.plan.recipe import Recipe
from offline.plan.states import States
from offline.source.dense import DenseModel
from offline.source.sites import SELECTIONS, Site
from offline.work.workdir import WorkDir

BATCH_TOKENS = 4096
"""Tokens that run through a layer at once during calibration and evaluation, where memory allows."""


@dataclass(frozen=True)
class Resources:
    """batch_tokens: that run through a layer at once (at least one window); rows: of one expert at once; hold_layer:
    a layer's experts are all in memory while it runs, else each is read when it is needed; products: how they are
    multiplied; every: of the layers' inputs a sweep backwards keeps one of so many, by 0 as few as make sense."""

    batch_tokens: int = BATCH_TOKENS
    rows: int = BATCH_TOKENS
    hold_layer: bool = True
    processes: int = 1
    products: Products = "float32"
    every: int = 0


@dataclass(frozen=True)
class Plan:
    """recipe: with every `auto` decided; budget: exact files, bytes and ranks, of the uniform allocation where they
    wait for what calibration tells; caps: by layer the largest rank that a projection may get, up to which errors are
    measured, and its rank once the budget is settled; layers: what these are made of, and how; resources: how much is
    in memory at once; final: whether the budget was settled by what calibration told; chosen: what the price chose for
    each layer, where there is one."""

    model: DenseModel
    recipe: Recipe
    problem: Problem
    budget: Budget
    caps: Ranks
    layers: Layers
    resources: Resources = Resources()
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
        return self.method.needs_fisher(self.recipe) and self.has_bases

    @property
    def has_bases(self) -> bool:
        """Whether any layer has a base, or may get one."""
        if self.settled:
            return any(option != "none" for option in self.budget.choices.values())
        return self.recipe.base.kind != "none"

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

    def keeps(self, site: Site) -> bool:
        """Whether an expert's Gram at a site, once made, waits in the working folder for its next use: where it is less
        to write and to read than the rows that it would be made of again."""
        shape = self.model.shape
        size = shape.projection(SELECTIONS[site][0])[1]
        return 2 * size * shape.num_experts <= self.tokens * shape.experts_per_token

    @property
    def rows_bytes(self) -> int:
        """Of some of one expert's rows on their way through it and back: what gate and up give, silu of the one, their
        product, its gradient, and three more while that goes back (work/statistics.py, `gradients`)."""
        shape = self.model.shape
        return FLOAT32 * self.resources.rows * (8 * shape.intermediate_size + 4 * shape.hidden_size)

    @property
    def states(self) -> States:
        """Which layers' inputs a sweep backwards keeps."""
        return States(self.model.num_layers, self.resources.every)

    @property
    def activations_dtype(self) -> torch.dtype:
        """Of hidden states, of gradients and of what reaches experts, in the working folder."""
        return torch.float32 if self.recipe.calibration.products == "float32" else torch.bfloat16

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of the experts as they are stored."""
        return TORCH_DTYPES[DTYPES[self.model.dtype]]

    @property
    def windows(self) -> tuple[int, int]:
        """Calibration windows and tokens in each."""
        return int(self.recipe.calibration.windows), int(self.recipe.calibration.seq_len)

    @property
    def tokens(self) -> int:
        return self.windows[0] * self.windows[1]


class LayerWork(NamedTuple):
    """At one layer, besides running it: merging its experts where that is a step of its own, measuring, writing."""

    merge: Work
    measure: Work
    write: Work


class Layers(ABC):
    """What compressed layers are made of, and all that depends on it: low-rank factors (factored.py) or whole deltas
    under one price (priced.py). `make_plan` chooses by the recipe; nothing else asks which of them it is.

    parts: in the working folder of an expert's final tensors.
    """

    parts: ClassVar[int]

    # Before calibration, and between the sweeps

    @abstractmethod
    def first(self, problem: Problem) -> tuple[Budget, Ranks]:
        """The budget, as far as it is known before calibration, and the caps (see `Plan`). Raises InputError where the
        ratio cannot be reached."""

    @abstractmethod
    def settle(self, plan: Plan, work: WorkDir) -> Plan:
        """The plan with its final budget, of what every layer's measuring left in the folder. Raises InputError where
        the ratio cannot be reached after all."""

    def saves_nothing(self, plan: Plan) -> bool:
        """Whether the result is smaller than asked because more bytes would save nothing."""
        return False

    # One layer, in a sweep

    @abstractmethod
    def measure(self, job: LayerJob, plan: Plan, progress: Progress) -> None:
        """Writes the parts that settling the budget needs."""

    @abstractmethod
    def write(self, job: LayerJob, plan: Plan, progress: Progress) -> None:
        """Writes the parts with the final tensors."""

    # What lies in the folder

    @abstractmethod
    def place(self, plan: Plan, layer: int, one: Stored) -> tuple[str, str] | None:
        """(part, key) of a stored tensor, where it lies as it is stored; None where it is stored as in the source."""

    @abstractmethod
    def figures_part(self, expert: int, role: Role) -> str:
        """The part that holds `<role>.error` and `<role>.energy` of an expert."""

    @abstractmethod
    def report(self, plan: Plan, work: WorkDir, layer: int) -> dict[str, Any]:
        """What d2moe_stats.json tells of a layer besides tokens, errors and kinds of base."""

    # Resources

    @abstractmethod
    def phases(self, plan: Plan) -> Mapping[str, int]:
        """Bytes at the worst moment of each phase of work on a layer."""

    @abstractmethod
    def work(self, plan: Plan) -> LayerWork:
        """What is done with one layer's experts, whatever will be settled: what is planned has to stay so."""

    @abstractmethod
    def measured_bytes(self, plan: Plan) -> int:
        """Of what measuring leaves of one expert, besides a part's header."""

    def waiting_bytes(self, plan: Plan) -> tuple[int, int]:
        """Of moments that wait in the folder for their second use, while a layer is measured and while written."""
        return 0, 0

    # In words

    @abstractmethod
    def made(self, plan: Plan) -> str:
        """What it makes of a model, for the card."""

    @abstractmethod
    def recipe_line(self, plan: Plan) -> str:
        """What else the card says of the recipe after the ratio."""
