"""Ratio <-> ranks, and the accounting (D2-MoE "Parameter Compression Analysis", METHODS 1.4).

Two accountings of one number R: `stored` means the share of the source's bytes that is gone from disk,
file headers included; `paper` means the paper's nominal share of parameters, which also counts columns
that dynamic pruning merely skips.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from d2moe_vllm.checkpoint import ROLES, CheckpointConfig, Layer, Projection, Role, TensorSpec
from offline.errors import InputError
from offline.families import MoEShape
from offline.shards import SHARD_BYTES, Shard, plan_shards

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


@dataclass(frozen=True)
class Columns:
    """Base columns of one projection: kept on disk, and used per forward pass under dynamic selection."""

    kept: int
    used: int


def base_columns(in_features: int, sparsity: float, groups: int, multiple: int) -> Columns:
    """Columns left when `sparsity` of them is unused in total, half of it statically (METHODS 1.2, 1.5).

    Evenly over `groups`, rounded down to `multiple` per group. Raises InputError where groups do not
    divide the columns or nothing would be left.
    """
    if in_features % groups:
        raise InputError(f"{groups} groups do not divide {in_features} input columns; choose base.groups to divide")
    size = in_features // groups

    def per_group(share: float) -> int:
        # The small term keeps e.g. (1 - 0.9) * 10 from becoming 0 in floating point.
        return groups * (int(size * share + 1e-9) // multiple * multiple)

    kept = in_features if sparsity == 0 else per_group(1 - sparsity / 2)
    used = in_features if sparsity == 0 else per_group(1 - sparsity)
    if used == 0:
        raise InputError(
            f"base.sparsity {sparsity:g} leaves no column in groups of {size} at column_multiple {multiple}; "
            "lower the sparsity, the groups or the multiple"
        )
    return Columns(kept, used)


@dataclass(frozen=True)
class Budget:
    """A solved budget. shards: the exact files that will be written."""

    config: CheckpointConfig
    shards: list[Shard]
    kept_share: dict[Role, float]

    @property
    def nbytes(self) -> int:
        """Bytes of all weight files, exactly as they will lie on disk."""
        return sum(shard.nbytes for shard in self.shards)

    @property
    def parameters(self) -> int:
        return sum(spec.numel for shard in self.shards for spec in shard.tensors.values())

    @property
    def stored_ratio(self) -> float:
        """Share of the source's bytes that is gone from disk."""
        return 1 - self.nbytes / self.config.source.bytes


Ranks = dict[tuple[int, Role], int]


@dataclass(frozen=True)
class Problem:
    """What the ranks have to fit into.

    draft: the checkpoint's configuration, its ranks not yet decided; other_tensors: all that is kept as it is.
    """

    draft: CheckpointConfig
    shape: MoEShape
    other_tensors: Mapping[str, TensorSpec]
    rank_multiple: int
    shard_bytes: int = SHARD_BYTES

    def rank(self, role: Role, kept_share: float) -> int:
        """k = floor(rho m n / (m + n)), rounded down to the multiple, at least one multiple."""
        out_features, in_features = self.shape.projection(role)
        rank = int(kept_share * out_features * in_features / (out_features + in_features))
        rank = max(rank // self.rank_multiple, 1) * self.rank_multiple
        return min(rank, self.limit(role))

    def limit(self, role: Role) -> int:
        full = min(self.shape.projection(role))
        return full // self.rank_multiple * self.rank_multiple or full

    def uniform(self, kept_share: float) -> Ranks:
        return {(layer, role): self.rank(role, kept_share) for layer in self.shape.layers for role in ROLES}

    def solve(self, ranks: Ranks) -> Budget:
        layers = {
            number: Layer.model_validate(
                layer.model_dump()
                | {role: layer[role].model_copy(update={"rank": ranks[number, role]}) for role in ROLES}
            )
            for number, layer in self.draft.layers.items()
        }
        config = CheckpointConfig.model_validate(self.draft.model_dump() | {"layers": layers})
        shards = plan_shards({**self.other_tensors, **config.expert_tensors()}, self.shard_bytes)
        share = {}
        for role in ROLES:
            out_features, in_features = self.shape.projection(role)
            mean = sum(ranks[layer, role] for layer in self.shape.layers) / len(self.shape.layers)
            share[role] = mean * (out_features + in_features) / (out_features * in_features)
        return Budget(config, shards, share)

    def delta_bytes(self, ranks: Ranks) -> int:
        """Payload of all deltas, without building their names."""
        width = self.shape.num_experts * (4 if self.draft.dtype == "float32" else 2)
        return sum(rank * sum(self.shape.projection(role)) * width for (_, role), rank in ranks.items())


def solve_paper(problem: Problem, ratio: float, sparsity: float) -> Budget:
    """Ranks by the paper's nominal accounting."""
    share = paper_kept_share(problem.shape, problem.draft.source.parameters, ratio, sparsity)
    return problem.solve(problem.uniform(share))


def solve_stored(problem: Problem, ratio: float) -> Budget:
    """The largest ranks whose files are at most (1 - ratio) of the source's bytes.

    One kept share for all deltas, then the rest is handed out in steps of the rank multiple, last layers
    first, `down` before `up` before `gate`. Raises InputError where the smallest ranks are already too large.
    """
    target = int((1 - ratio) * problem.draft.source.bytes)
    smallest, largest = problem.solve(problem.uniform(0)), problem.solve(problem.uniform(FULL))
    if smallest.nbytes > target:
        raise InputError(
            f"ratio {ratio:g} cannot be reached: even at rank {problem.rank_multiple} the ratio is "
            f"{smallest.stored_ratio:.3f}; choose a lower ratio or a higher base.sparsity"
        )
    # Names and offsets take the most room at full rank, so this bound on everything but deltas is safe.
    fixed = largest.nbytes - problem.delta_bytes(problem.uniform(FULL))

    room = target - fixed
    share = _largest_share(lambda share: problem.delta_bytes(problem.uniform(share)) <= room)
    budget, ranks = problem.solve(problem.uniform(share)), problem.uniform(share)
    reserve = 0
    while True:
        # The headers' true size at these ranks, where the bound above was too careful.
        room = target - reserve - (budget.nbytes - problem.delta_bytes(ranks))
        fuller = _fill(problem, ranks, room)
        if fuller == ranks:
            return budget
        attempt = problem.solve(fuller)
        if attempt.nbytes > target:
            reserve += attempt.nbytes - target  # longer numbers in a header, or one more file
        else:
            budget, ranks = attempt, fuller


def _fill(problem: Problem, ranks: Ranks, room: int) -> Ranks:
    """One more step for every rank that still has one and for which deltas stay within `room` bytes."""
    ranks = dict(ranks)
    left = room - problem.delta_bytes(ranks)
    for layer in reversed(problem.shape.layers):
        for role in reversed(ROLES):
            step = problem.delta_bytes({(layer, role): problem.rank_multiple})
            if step <= left and ranks[layer, role] + problem.rank_multiple <= problem.limit(role):
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


def draft_layers(shape: MoEShape, sparsity: float | None, groups: int, multiple: int) -> dict[int, Layer]:
    """Layers with their base columns decided and ranks still 1; sparsity None means no base at all."""

    def projection(role: Role) -> Projection:
        if sparsity is None:
            return Projection(rank=1, kept_columns=0, used_columns=0)
        columns = base_columns(shape.projection(role)[1], sparsity, groups, multiple)
        return Projection(rank=1, kept_columns=columns.kept, used_columns=columns.used)

    layer = Layer(gate=projection("gate"), up=projection("up"), down=projection("down"))
    return dict.fromkeys(shape.layers, layer)
