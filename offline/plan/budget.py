"""Ratio <-> ranks, and the accounting (D2-MoE "Parameter Compression Analysis", METHODS 1.4).

Two accountings of one number R: `stored` means the share of the source's bytes that is gone from disk,
file headers included; `paper` means the paper's nominal share of parameters, which also counts columns
that dynamic pruning merely skips.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any

from d2moe_vllm.format.config import CheckpointConfig, Layer, Projection
from d2moe_vllm.format.kinds import KINDS, Role, TensorSpec, owners
from offline.errors import InputError, UnreachableError
from offline.io.shards import SHARD_BYTES, Shard, plan_shards
from offline.methods import METHODS
from offline.methods.base import Method
from offline.methods.options import Option
from offline.plan.recipe import Recipe
from offline.source.families import MoEShape
from offline.source.sites import SITES, Site

FULL = 1e9
"""A kept share so large that every rank is full."""


def paper_kept_share(shape: MoEShape, parameters: int, ratio: float, sparsity: float) -> float:
    """rho, the kept share of every delta, under the paper's accounting (Table 12).

    A layer keeps E*rho + (1 - s) expert-sizes; all that is not an expert is kept whole.
    parameters: of the whole source. Raises InputError where no rho > 0 reaches the ratio.
    """
    per_layer = len(shape.layers) * shape.expert_parameters
    others = parameters - shape.num_experts * per_layer
    kept = ((1 - ratio) * parameters - others) / per_layer
    rho = (kept - (1 - sparsity)) / shape.num_experts
    if rho <= 0:
        reachable = 1 - (others + (1 - sparsity) * per_layer) / parameters
        raise InputError(f"ratio {ratio:g} cannot be reached: even without deltas it is {max(reachable, 0):.3f}")
    return rho


Ranks = dict[tuple[int, Role], int]
Choices = dict[tuple[int, Site], Option]


@dataclass(frozen=True)
class Budget:
    """A solved budget. shards: the exact files that will be written; choices: each selection's kind of base."""

    config: CheckpointConfig
    shards: list[Shard]
    kept_share: dict[Role, float]
    choices: Choices

    @property
    def ranks(self) -> Ranks:
        return {
            (number, role): layer[role].rank for number, layer in self.config.layers.items() for role in layer.roles
        }

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all weight files, exactly as they will lie on disk."""
        return sum(shard.nbytes for shard in self.shards)

    @property
    def parameters(self) -> int:
        """Of packed matrices the numbers that codes stand for."""
        experts = self.config.expert_tensors()
        tensors = (pair for shard in self.shards for pair in shard.tensors.items())
        return self.config.numbers(spec.shape for name, spec in tensors if name not in experts)

    @property
    def stored_ratio(self) -> float:
        """Share of the source's bytes that is gone from disk."""
        return 1 - self.nbytes / self.config.source.bytes


@dataclass(frozen=True)
class Problem:
    """What the ranks have to fit into.

    draft: the checkpoint's configuration but for its layers; other_tensors: all that is kept as it is; trimmed: per
    layer the experts without deltas (their number decides sizes, which ones they are is known after calibration).
    """

    draft: CheckpointConfig
    shape: MoEShape
    other_tensors: Mapping[str, TensorSpec]
    recipe: Recipe
    trimmed: Mapping[int, tuple[int, ...]]
    shard_bytes: int = SHARD_BYTES

    @property
    def method(self) -> Method:
        return METHODS[self.recipe.method]

    @property
    def options(self) -> tuple[Option, ...]:
        return self.recipe.options

    @property
    def rank_multiple(self) -> int:
        return self.recipe.rank_multiple

    def rank(self, role: Role, kept_share: float) -> int:
        """k = floor(rho m n / (m + n)), or floor(rho n) columns, rounded down to the multiple, at least one."""
        out_features, in_features = self.shape.projection(role)
        full = out_features * in_features / (out_features + in_features)
        rank = int(kept_share * (in_features if self.recipe.delta.method == "prune" else full))
        return min(max(rank // self.rank_multiple, 1) * self.rank_multiple, self.limit(role))

    def limit(self, role: Role) -> int:
        if self.whole(role):
            return 0
        out_features, in_features = self.shape.projection(role)
        full = in_features if self.recipe.delta.method == "prune" else min(out_features, in_features)
        return full // self.rank_multiple * self.rank_multiple or full

    def whole(self, role: Role) -> bool:
        """Whether a projection is not factored."""
        return self.method.whole(self.recipe, self.shape, role)

    def uniform(self, kept_share: float) -> Ranks:
        return {(layer, role): self.rank(role, kept_share) for layer in self.shape.layers for role in self.shape.roles}

    def same(self, option: Option) -> Choices:
        """One kind of base everywhere."""
        return {(layer, site): option for layer in self.shape.layers for site in ("input", "middle")}

    def projection(self, role: Role, option: Option, rank: int) -> Projection:
        """What would be stored of one projection."""
        return self.method.projection(self.recipe, self.shape, role, option, rank)

    def layers(self, choices: Choices, ranks: Ranks) -> dict[int, Layer]:
        def projections(layer: int) -> dict[str, Any]:
            return {
                role: self.projection(role, choices[layer, SITES[role]], ranks[layer, role])
                for role in self.shape.roles
            }

        return {layer: Layer(**projections(layer), trimmed=self.trimmed[layer]) for layer in self.shape.layers}

    def solve(self, choices: Choices, ranks: Ranks) -> Budget:
        layers = self.layers(choices, ranks)
        config = CheckpointConfig.model_validate(self.draft.model_dump() | {"layers": layers})
        shards = plan_shards({**self.other_tensors, **config.expert_tensors()}, self.shard_bytes)
        share = {}
        for role in self.shape.roles:
            mean = sum(ranks[layer, role] for layer in self.shape.layers) / len(self.shape.layers)
            share[role] = self.kept_share(role, mean)
        return Budget(config, shards, share, choices)

    def full(self, budget: Budget) -> bool:
        """Whether no rank could be higher."""
        return all(rank >= self.limit(role) for (_, role), rank in budget.ranks.items())

    def kept_share(self, role: Role, rank: float) -> float:
        """Of the deltas' parameters, at a mean rank; with bases METHODS 3's gamma, they included."""
        out_features, in_features = self.shape.projection(role)
        experts = self.shape.num_experts
        if self.whole(role):
            return 1.0
        if bases := self.projection(role, self.options[0], self.rank_multiple).bases:
            stored = experts * out_features * rank + bases * (rank * in_features + experts)
            return stored / (experts * out_features * in_features)
        return rank * (out_features + in_features) / (out_features * in_features)

    def step_bytes(self, role: Role, rank: int) -> int:
        """Payload that one more step costs a projection of one layer at a rank. Of packed factors steps differ: rows
        fill whole bytes, and now and then one more scale is needed."""
        return self.rank_bytes(role, rank + self.rank_multiple) - self.rank_bytes(role, rank)

    def rank_bytes(self, role: Role, rank: int) -> int:
        """Payload of a projection's deltas in one layer, but for what does not grow with the rank."""
        if (role, rank) not in self._sizes:
            grows = {"rank", "columns"}
            self._sizes[role, rank] = self._payload(role, "none", rank, grows) if rank else 0
        return self._sizes[role, rank]

    @cached_property
    def _sizes(self) -> dict[tuple[Role, int], int]:
        return {}

    def base_bytes(self, role: Role, option: Option) -> int:
        """Payload of a projection's base in one layer."""
        return self._payload(role, option, self.rank_multiple) - self._payload(role, "none", self.rank_multiple)

    def _payload(self, role: Role, option: Option, rank: int, among: Collection[str] = ()) -> int:
        """By the table of kinds, so that no formula for sizes stands twice; among: only of kinds of which a dimension
        counts one of these."""
        sizes, trimmed = self.draft.sizes, self.trimmed[self.shape.layers[0]]
        layer = SimpleNamespace(**{role: self.projection(role, option, rank)}, trimmed=trimmed, channels=None)
        return sum(
            len(owners(kind, role, layer, sizes.num_experts)) * spec.nbytes
            for kind in KINDS
            if kind.present(layer, role) and (not among or set(among) & set(kind.sizes))
            for spec in sizes.tensors(kind, role, layer).values()
        )

    def delta_bytes(self, ranks: Ranks) -> int:
        """Payload of all deltas but their indices, without building their names."""
        return sum(self.rank_bytes(role, rank) for (_, role), rank in ranks.items())


def solve_paper(problem: Problem, ratio: float) -> Budget:
    """Ranks by the paper's nominal accounting."""
    base = problem.recipe.base
    sparsity = 1.0 if base.kind == "none" else base.sparsity  # without a base, all of it is saved
    share = paper_kept_share(problem.shape, problem.draft.source.parameters, ratio, sparsity)
    return problem.solve(problem.same(problem.options[0]), problem.uniform(share))


def solve_stored(problem: Problem, ratio: float, option: Option | None = None) -> Budget:
    """The largest ranks whose files are at most (1 - ratio) of the source's bytes, with one kind of base.

    One kept share for all deltas, then the rest is handed out in steps of the rank multiple, last layers
    first, `down` before `up` before `gate`. Raises InputError where the smallest ranks are already too large.
    """
    choices = problem.same(option or problem.options[0])
    target = int((1 - ratio) * problem.draft.source.bytes)
    smallest = problem.solve(choices, problem.uniform(0))
    largest = problem.solve(choices, problem.uniform(FULL))
    if smallest.nbytes > target:
        raise UnreachableError(
            f"ratio {ratio:g} cannot be reached: even at rank {problem.rank_multiple} the ratio is "
            f"{smallest.stored_ratio:.3f}; choose a lower ratio{problem.method.hint}",
            smallest.stored_ratio,
        )
    # Names and offsets take the most room at full rank, so this bound on everything but deltas is safe.
    fixed = largest.nbytes - problem.delta_bytes(problem.uniform(FULL))

    room = target - fixed
    share = _largest_share(lambda share: problem.delta_bytes(problem.uniform(share)) <= room)
    return fill(problem, choices, problem.uniform(share), target, _one_more_each)


Filler = Callable[[Problem, Ranks, int], Ranks]
"""(problem, ranks, bytes that deltas may take) -> ranks that fill more of them."""


def fill(problem: Problem, choices: Choices, ranks: Ranks, target: int, more: Filler) -> Budget:
    """The budget of `ranks` that fit into `target` bytes, filled up by `more` as far as headers let it."""
    budget = problem.solve(choices, ranks)
    reserve = 0
    while True:
        # The headers' true size at these ranks, where an earlier bound was too careful.
        room = target - reserve - (budget.nbytes - problem.delta_bytes(ranks))
        fuller = more(problem, ranks, room)
        if fuller == ranks:
            return budget
        attempt = problem.solve(choices, fuller)
        if attempt.nbytes > target:
            reserve += attempt.nbytes - target  # longer numbers in a header, or one more file
        else:
            budget, ranks = attempt, fuller


def _one_more_each(problem: Problem, ranks: Ranks, room: int) -> Ranks:
    """One more step for every rank that still has one and for which deltas stay within `room` bytes."""
    ranks = dict(ranks)
    left = room - problem.delta_bytes(ranks)
    for layer in reversed(problem.shape.layers):
        for role in reversed(problem.shape.roles):
            rank = ranks[layer, role]
            if rank + problem.rank_multiple > problem.limit(role):
                continue
            if (step := problem.step_bytes(role, rank)) <= left:
                ranks[layer, role] += problem.rank_multiple
                left -= step
    return ranks


def _largest_share(fits: Callable[[float], bool]) -> float:
    low, high = 0.0, 2.0
    while fits(high) and high < 1e6:
        low, high = high, high * 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
