"""What to do, as one validated model (YAML <-> pydantic). The resolved recipe travels in the checkpoint."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from d2moe_vllm.format.config import Function, Method, Scope, first_error
from offline.errors import InputError

REAL_MODEL_WIDTH = 1024
"""From this hidden size on, `auto` multiples are 16, which the GPU kernels want."""


Multiple = Annotated[int, Field(ge=1)] | Literal["auto"]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Calibration(_Section):
    """Which part of the calibration text is used, and what a layer sees of it.

    seq_len "auto": 2048, or the model's limit if that is less. inputs: a layer's activations come from the `dense`
    layers before it, or from these layers as they are after compression.
    """

    windows: int = Field(default=128, ge=1)
    seq_len: Annotated[int, Field(ge=2)] | Literal["auto"] = "auto"
    seed: int = Field(default=0, ge=0, lt=2**63)
    inputs: Literal["dense", "compressed"] = "dense"


class Base(_Section):
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


class Delta(_Section):
    """The deltas (METHODS 1.3, 1.7).

    gate_weighted: weigh tokens by their squared gate value; shrinkage: strength of the pull towards a plain SVD where
    an expert saw few tokens; trim: so many of a layer's least routed experts get no delta; share_v: one V for all
    experts of a projection; distinct_u: so many distinct U's per layer and projection, 0 for one per expert.
    """

    method: Literal["whitened", "svd", "asvd", "prune"] = "whitened"
    gate_weighted: bool = True
    shrinkage: float = Field(default=0.1, ge=0)
    rank_multiple: Multiple = "auto"
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


class MoESVD(_Section):
    """MoE-SVD (METHODS 2). Its U's are trimmed by `delta.distinct_u`.

    share_v: where the V that all experts share comes from and what U's go with it: that of the most routed expert with
    every expert's own U (`most_routed`, the paper's) or with U's fitted to it (`refit`), or the best for all experts
    together, also with fitted U's (`joint`). layer_ratio: share of its bytes that a decomposed layer gives up at
    least: so few layers are decomposed, the others stay dense. rank_threshold, outlier_threshold: a singular value
    counts from this share of the largest on, an activation from this many times the mean magnitude on.
    """

    share_v: Literal["most_routed", "refit", "joint"] = "joint"
    layer_ratio: float = Field(default=0.5, gt=0, lt=1)
    rank_threshold: float = Field(default=0.2, gt=0, lt=1)
    outlier_threshold: float = Field(default=3.0, gt=0)


class MoBE(_Section):
    """MoBE (METHODS 3). bases: matrices per layer and projection that experts mix from; `auto` is a quarter of the
    experts, at least two. groups: experts mix from the bases of their own group only, of so many. weighting: what the
    error is measured by: each expert's `own` second moment of inputs, one `pooled` over all experts, or `none`.

    learning_rate: Adam's, relative to the size of what it changes. A fit ends after max_steps, or where `window` steps
    lowered the squared error by less than this `tolerance`, relative.
    """

    bases: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    function: Function = "silu"
    groups: int = Field(default=1, ge=1)
    weighting: Literal["own", "pooled", "none"] = "own"
    learning_rate: float = Field(default=0.07, gt=0)
    max_steps: int = Field(default=400, ge=0)
    window: int = Field(default=25, ge=1)
    tolerance: float = Field(default=1e-3, ge=0)


class Recipe(_Section):
    """accounting: `stored` (share of the source's bytes gone from disk) or `paper` (Table 12's nominal share).
    allocation: `uniform` (one kept share for all) or `adaptive` (ranks where they save most error, METHODS 1.4);
    adaptive unless the paper's accounting is asked for. base.kind is auto where the allocation is adaptive, else
    semi-dynamic. scope: the dynamic column selection that the checkpoint asks to be served
    with. moe_svd, mobe: for these methods, which have no base and uniform ranks."""

    method: Method = "d2"
    ratio: float = Field(gt=0, lt=1)
    accounting: Literal["stored", "paper"] = "stored"
    allocation: Literal["uniform", "adaptive"] = "adaptive"
    scope: Scope = "off"
    calibration: Calibration = Calibration()
    base: Base = Base()
    delta: Delta = Delta()
    moe_svd: MoESVD = MoESVD()
    mobe: MoBE = MoBE()

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, content: Any) -> Any:
        """Defaults that depend on what else is asked for."""
        if not isinstance(content, dict):
            return content
        sister = content.get("method") in ("moe-svd", "mobe")
        allocation = "uniform" if sister or content.get("accounting") == "paper" else "adaptive"
        content = {"allocation": allocation, **content}
        if isinstance(base := content.get("base", {}), dict):
            kind = "none" if sister else "auto" if content["allocation"] == "adaptive" else "semi-dynamic"
            content["base"] = {"kind": kind, **base}
        if content.get("method") == "moe-svd" and isinstance(delta := content.get("delta", {}), dict):
            content["delta"] = {"share_v": True, **delta}
        return content

    @model_validator(mode="after")
    def _compatible(self) -> Recipe:
        if self.method != "d2":
            self._check_sister()
        if self.allocation == "adaptive" and self.accounting == "paper":
            raise ValueError("allocation adaptive needs accounting stored")
        if self.accounting == "paper" and (self.delta.trim or self.delta.joint):
            raise ValueError(
                "accounting paper counts a delta for every expert: delta.trim, share_v and distinct_u need "
                "accounting stored"
            )
        if self.base.kind == "auto" and self.allocation != "adaptive":
            raise ValueError("base.kind auto needs allocation adaptive")
        if self.delta.trim and self.base.kind == "none":
            raise ValueError("delta.trim needs a base: trimmed experts run on it alone")
        return self

    def _check_sister(self) -> None:
        """What MoE-SVD and MoBE do not have."""
        needed: dict[str, tuple[Any, Any]] = {
            "base.kind": (self.base.kind, "none"),
            "allocation": (self.allocation, "uniform"),
            "accounting": (self.accounting, "stored"),
            "calibration.inputs": (self.calibration.inputs, "dense"),
            "delta.method": (self.delta.method, "whitened"),
            "delta.share_v": (self.delta.share_v, self.method == "moe-svd"),
        }
        if self.method == "mobe":
            needed["delta.distinct_u"] = (self.delta.distinct_u, 0)
        for field, (found, value) in needed.items():
            if found != value:
                raise ValueError(f"method {self.method} needs {field} {value}, not {found}; leave it out")

    @property
    def joint(self) -> bool:
        """Whether experts are factored together."""
        return self.delta.joint or self.method == "mobe"

    def resolve(self, hidden_size: int, max_positions: int | None, experts: int) -> Recipe:
        """This recipe with every `auto` decided for one model."""
        multiple = 16 if hidden_size >= REAL_MODEL_WIDTH else 1
        seq_len = self.calibration.seq_len
        if seq_len == "auto":
            seq_len = min(2048, max_positions or 2048)
        elif max_positions and seq_len > max_positions:
            raise InputError(f"calibration.seq_len {seq_len} exceeds the model's {max_positions} positions")
        mobe = self.mobe
        if self.method == "mobe":
            mobe = mobe.model_copy(update={"bases": _decide(mobe.bases, max(experts // 4, 2))})
        return self.model_copy(
            update={
                "calibration": self.calibration.model_copy(update={"seq_len": seq_len}),
                "base": self.base.model_copy(update={"column_multiple": _decide(self.base.column_multiple, multiple)}),
                "delta": self.delta.model_copy(update={"rank_multiple": _decide(self.delta.rank_multiple, multiple)}),
                "mobe": mobe,
            }
        )

    def dump(self) -> str:
        """As YAML, in the order of the fields."""
        return yaml.safe_dump(self.to_json(), sort_keys=False)

    def to_json(self) -> dict[str, Any]:
        """Its fields, but for the sections of other methods."""
        return self.model_dump(exclude={"moe_svd", "mobe"} - {self.method.replace("-", "_")})


def _decide(value: int | str, automatic: int) -> int:
    return automatic if value == "auto" else int(value)


def load_recipe(path: Path | None, overrides: Mapping[str, Any]) -> Recipe:
    """A recipe file (or the defaults) with command-line values on top.

    overrides: field -> value, of a section a mapping of its fields; None means not given. Raises InputError, naming
    the nearest valid key for an unknown one.
    """
    content: Any = {}
    if path is not None:
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except Exception as error:  # YAML's tags make its reader raise nearly everything there is
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(f"recipe {path} cannot be read: {reason}") from None
        if not isinstance(content, dict):
            raise InputError(f"recipe {path}: expected `key: value` lines, found {type(content).__name__}")
    _override(content, overrides, f"recipe {path}: ")
    where = f"recipe {path}: " if path else ""
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise InputError(where + _explain(error)) from None


def _override(content: dict[str, Any], overrides: Mapping[str, Any], where: str) -> None:
    for key, value in overrides.items():
        if isinstance(value, Mapping):
            if not isinstance(section := content.setdefault(key, {}), dict):
                raise InputError(f"{where}{key} must be a section of `key: value` lines")
            _override(section, value, where)
        elif value is not None:
            content[key] = value


def _explain(error: ValidationError) -> str:
    # A misspelt key comes first: it is often why another one is missing.
    findings = sorted(error.errors(include_url=False), key=lambda one: one["type"] != "extra_forbidden")
    finding = findings[0]
    location = [str(part) for part in finding["loc"]]
    if finding["type"] == "missing" and location == ["ratio"]:
        return "no ratio given; add --ratio 0.4 (or `ratio: 0.4` to the recipe)"
    if finding["type"] != "extra_forbidden":
        return first_error(error)
    section: Any = Recipe
    for part in location[:-1]:
        section = section.model_fields[part].annotation
    valid = list(section.model_fields)
    near = difflib.get_close_matches(location[-1], valid, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"valid keys: {', '.join(valid)}"
    return f"unknown key {'.'.join(location)!r}; {hint}"
