"""The sections of a recipe that all methods have in common. A method's own section stands in the method's file."""

from __future__ import annotations

import math
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from d2moe_vllm.format.config import Scope
from d2moe_vllm.format.kinds import Role
from offline.methods.options import OPTIONS, Columns, Option, base_columns
from offline.source.families import MoEShape

Multiple = Annotated[int, Field(ge=1)] | Literal["auto"]


ENOUGH_ROWS = 4
"""Of an expert, on average, for each input of its widest matrix: more gain little (docs/quality.md)."""
FEWEST_WINDOWS = 128
"""Experts are not routed to alike, and what an error costs is measured on the same rows."""


class Section(BaseModel):
    """`key: value` lines of a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


Own = TypeVar("Own", bound=Section)


class Calibration(Section):
    """Which part of the calibration text is used, and what a layer sees of it.

    windows "auto": as many as are enough, ENOUGH_ROWS of an expert for each input of its widest matrix, at least
    FEWEST_WINDOWS. seq_len "auto": 2048, or the model's limit if that is less. inputs: a layer's activations come from
    the `dense` layers before it, or from these layers as they are after compression. products: what float32 numbers are
    rounded to before they are multiplied with rows, and while they wait on disk; "auto" is float32 for small models,
    for others bfloat16 on disk, and in products where the device has it.
    """

    windows: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    seq_len: Annotated[int, Field(ge=2)] | Literal["auto"] = "auto"
    seed: int = Field(default=0, ge=0, lt=2**63)
    inputs: Literal["dense", "compressed"] = "dense"
    products: Literal["auto", "float32", "bfloat16"] = "auto"


class Base(Section):
    """The shared base (METHODS 1.1, 1.2).

    kind: `semi-dynamic` prunes half of `sparsity` statically and leaves the other half to dynamic selection,
    `static` prunes all of it, `svd` is a low-rank base of the same size as `static`, `none` has no base, `auto`
    lets the budget decide per layer between none, semi-dynamic and a full base.
    """

    kind: Literal["semi-dynamic", "static", "svd", "none", "auto"] = "auto"
    merge: Literal["fisher", "mean", "frequency", "regmean", "ties"] = "fisher"
    fisher_epsilon: float = Field(default=1e-3, gt=0)
    frequency_power: float = Field(default=0.0, ge=0)
    regmean_shrinkage: float = Field(default=0.1, ge=0, le=1)
    ties_density: float = Field(default=0.2, gt=0, le=1)
    sparsity: float = Field(default=0.1, ge=0, lt=1)
    groups: int = Field(default=8, ge=1)
    column_multiple: Multiple = "auto"

    def columns(self, in_features: int, option: Option) -> Columns:
        """Columns of a base under an option; (0, 0) where it does not have some of them."""
        if option != "pruned":
            return Columns(0, 0)
        multiple, static = int(self.column_multiple), self.kind == "static"
        return base_columns(in_features, self.sparsity, self.groups, multiple, static=static)


class Delta(Section):
    """The deltas (METHODS 1.3, 1.7).

    gate_weighted: weigh tokens by their squared gate value; shrinkage: strength of the pull towards a plain SVD where
    an expert saw few tokens; trim: so many of a layer's least routed experts get no delta; share_v: one V for all
    experts of a projection; distinct_u: so many distinct U's per layer and projection, 0 for one per expert. method
    `dense` keeps deltas whole, in few bits and without the channels that cost least (METHODS 4); channel_multiple: of
    what an expert keeps of these.
    """

    method: Literal["whitened", "svd", "asvd", "prune", "dense"] = "whitened"
    gate_weighted: bool = True
    shrinkage: float = Field(default=0.1, ge=0)
    rank_multiple: Multiple = "auto"
    channel_multiple: Multiple = "auto"
    trim: int = Field(default=0, ge=0)
    share_v: bool = False
    distinct_u: int = Field(default=0, ge=0)

    @property
    def joint(self) -> bool:
        """Whether experts are factored together."""
        return self.share_v or self.distinct_u > 0

    @model_validator(mode="after")
    def _compatible(self) -> Delta:
        if self.joint and self.method != "whitened":
            raise ValueError(f"share_v and distinct_u need method whitened, not {self.method}")
        return self


class Settings(Section):
    """accounting: `stored` (share of the source's bytes gone from disk) or `paper` (Table 12's nominal share).
    allocation: `uniform` (one kept share for all) or `adaptive` (ranks where they save most error, METHODS 1.4);
    adaptive unless the paper's accounting is asked for. base.kind is auto where the allocation is adaptive, else
    semi-dynamic. scope: the dynamic column selection that the checkpoint asks to be served with. bits: of the numbers
    of base and deltas, whole or factored; `auto` lets the price choose, layer by layer, among whole ones; group_size:
    inputs that share a scale."""

    method: str = "d2"
    ratio: float = Field(gt=0, lt=1)
    bits: Literal["auto", 16, 8, 4, 3, 2] = 16
    group_size: Literal[32, 64, 128] = 64
    accounting: Literal["stored", "paper"] = "stored"
    allocation: Literal["uniform", "adaptive"] = "adaptive"
    scope: Scope = "off"
    calibration: Calibration = Calibration()
    base: Base = Base()
    delta: Delta = Delta()

    def own(self, section: type[Own]) -> Own:
        """A method's own section."""
        return next(one for one in (self.model_extra or {}).values() if isinstance(one, section))

    @property
    def priced(self) -> bool:
        """Whether one price decides over bits, channels and base (METHODS 4.3): deltas are whole then."""
        return self.delta.method == "dense"

    @property
    def options(self) -> tuple[Option, ...]:
        """The kinds of base to choose from; trimmed experts run on the base alone, so with them there is one."""
        options = OPTIONS[self.base.kind]
        return tuple(option for option in options if option != "none") if self.delta.trim else options

    @property
    def rank_multiple(self) -> int:
        """Ranks are multiples of it; deltas that are columns also spread evenly over the groups."""
        multiple = int(self.delta.rank_multiple)
        return math.lcm(multiple, self.base.groups) if self.delta.method == "prune" else multiple

    def base_rank(self, shape: MoEShape, role: Role) -> int:
        """Of a low-rank base: as many parameters as a statically pruned one has."""
        out_features, in_features = shape.projection(role)
        whole = (1 - self.base.sparsity) * out_features * in_features / (out_features + in_features)
        multiple = int(self.delta.rank_multiple)
        return max(int(whole) // multiple, 1) * multiple
