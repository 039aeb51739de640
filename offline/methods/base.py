"""What a method of compression declares. A new one is a file beside this with a `Method`, and its row in METHODS."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from d2moe_vllm.format.config import Projection
from d2moe_vllm.format.kinds import Role, Stored
from offline.algebra.merging import MERGES
from offline.methods.factors import Factors, OwnFactors
from offline.methods.joint import SHARED_PART, JointFactors
from offline.methods.layer import BASE_PART, LayerJob, Plan, expert_part
from offline.methods.options import Option
from offline.methods.settings import Section, Settings
from offline.methods.storing import storage_of
from offline.source.families import MoEShape
from offline.work.workdir import WorkDir

Asked = TypeVar("Asked", bound=Settings)

WITHOUT_BASE: Mapping[str, Any] = {
    "base": {"kind": "none"},
    "allocation": "uniform",
    "accounting": "stored",
    "calibration": {"inputs": "dense"},
    "delta": {"method": "whitened"},
}
"""`fixed` of methods that store whole experts at uniform ranks."""


@dataclass(frozen=True)
class Choice:
    """Of methods that compress some layers only. layer_ratio: share of its bytes that one of these gives up at least;
    sensitivity: how much a layer matters, summed over this process's experts: those that matter least are taken."""

    layer_ratio: Callable[[Settings], float]
    sensitivity: Callable[[LayerJob], float]


@dataclass(frozen=True)
class Method:
    """A method: by default D2-MoE's, a base and deltas or whole experts as deltas from nothing.

    name: in recipes and checkpoints; title: as people write it; made: what it makes of a model, for the card ({dense}
    of {layers} MoE layers are left as they were; {down}: what became of a down that is not factored). settings: its
    own section of a recipe; fixed: fields of the other sections -> the only value that goes with the method, which is
    their default then. hint: what else helps where a ratio cannot be reached; until: what a plan cannot know before
    calibration; needs_gate: why experts have to have one, in a few words. choice: None, all layers are compressed.
    """

    name: str
    title: str
    made: str
    settings: type[Section] | None = None
    fixed: Mapping[str, Any] = field(default_factory=dict)
    hint: str = ""
    until: str = ""
    needs_gate: str = ""
    choice: Choice | None = None

    @property
    def section(self) -> str:
        """The key of its section in a recipe."""
        return self.name.replace("-", "_")

    @property
    def has_base(self) -> bool:
        """Whether a recipe may ask for a shared base, from which the experts differ by deltas."""
        return self.fixed.get("base", {}).get("kind") != "none"

    # Before calibration

    def resolve(self, recipe: Asked, experts: int) -> Asked:
        """The recipe with every `auto` of the method's own section decided."""
        return recipe

    def check(self, recipe: Settings, experts: int) -> None:
        """Raises InputError for a resolved recipe whose counts do not fit so many experts."""

    def measures(self, recipe: Settings) -> bool:
        """Whether the budget is settled by what errors cost: then a sweep backwards measures them first."""
        return recipe.allocation == "adaptive"

    def needs_fisher(self, recipe: Settings) -> bool:
        """Whether bases are merged by Fisher information, in a sweep backwards."""
        return recipe.base.kind != "none" and MERGES[recipe.base.merge].needs_fisher

    def joint(self, recipe: Settings) -> bool:
        """Whether experts are factored together."""
        return recipe.delta.joint

    def projection(self, recipe: Settings, shape: MoEShape, role: Role, option: Option, rank: int) -> Projection:
        """What is stored of one projection; of one that is not factored a `dense` delta of rank 0."""
        columns, delta = recipe.base.columns(shape.projection(role)[1], option), recipe.delta
        storage = storage_of(int(recipe.bits), recipe.group_size)
        return Projection(
            rank=rank,
            full_base=option == "full",
            kept_columns=columns.kept,
            used_columns=columns.used,
            base_rank=recipe.base_rank(shape, role) if option == "svd" else 0,
            delta="columns" if delta.method == "prune" else "factors",
            shared_v=delta.share_v,
            distinct_u=delta.distinct_u,
            base_storage=None if option == "none" else storage,
            delta_storage=storage if rank else None,
            bias=shape.biased,
        )

    def whole(self, recipe: Settings, shape: MoEShape, role: Role) -> bool:
        """Whether a projection is not factored, but stored as it is, or rounded."""
        return self.projection(recipe, shape, role, recipe.options[0], recipe.rank_multiple).delta == "dense"

    def keeps(self, recipe: Settings, shape: MoEShape, role: Role) -> bool:
        """Whether a projection is stored as it is."""
        return self.whole(recipe, shape, role) and recipe.bits == 16

    def phases(self, plan: Plan) -> dict[str, int]:
        """Bytes that its own phases hold at their worst moment, by name, besides some rows of one expert."""
        return {}

    def operations(self, plan: Plan) -> float:
        """Floating-point operations per layer, as float32 ones, besides one factorization per matrix."""
        return 0.0

    # One layer

    def factors(self, job: LayerJob) -> Factors:
        """How a layer's experts are factored."""
        return JointFactors(job) if job.plan.recipe.delta.joint else OwnFactors(job)

    # The result

    def place(self, stored: Projection, one: Stored) -> tuple[str, str] | None:
        """(part, key) of a stored tensor among the layer's parts, where it lies as it is stored; None for a projection
        that is stored as it is in the source."""
        kind, name = one.kind.name, f"{one.role}.{one.name}"
        if kind == "dense" and stored.delta_storage is None:
            return None
        if one.kind.part == "base":
            return BASE_PART, name
        if kind == "delta_u" and stored.shares_u:
            return SHARED_PART, f"{one.role}.{kind}.{one.expert}{one.name.removeprefix(kind)}"
        if kind in ("shared_v", "u_index"):
            return SHARED_PART, name
        return expert_part(one.expert), f"{one.role}.{one.name.removeprefix('delta_')}"

    def report(self, work: WorkDir, layer: int) -> dict[str, Any]:
        """What d2moe_stats.json tells of a layer besides tokens and errors."""
        return {}
