"""The d2moe checkpoint format, version 2: what config.json and the manifest say, and what tensors follow from it.

docs/checkpoint-format.md is the prose of this file, of kinds.py, which has the table of tensors, and of files.py, which
reads the files. Both halves of the project use it, so it knows neither vLLM nor any compression method.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from d2moe_vllm.format.familyrow import FamilyRow, fit_names
from d2moe_vllm.format.kinds import (
    DTYPE_BYTES,
    DTYPES,
    FORMAT_VERSION,
    GROUP_SIZE,
    KINDS,
    ROLES,
    STORAGES,
    Dtype,
    Role,
    Shape,
    Stored,
    TensorSpec,
    owners,
    roles_of,
    stored_tensors,
)

QUANT_METHOD = "d2moe"
INDEX_FILE = "model.safetensors.index.json"
MANIFEST_FILE = "d2moe_manifest.json"
RECIPE_FILE = "d2moe_recipe.yaml"
STATS_FILE = "d2moe_stats.json"

Scope = Literal["batch", "token", "off"]
"""Who shares one dynamic selection of base columns: a forward pass, a token, or nobody (METHODS 1.5)."""

Delta = Literal["factors", "columns", "bases", "dense"]
"""How an expert's delta is stored: a product of two factors, some of its columns as they are, a product with a factor
that is mixed from bases (MoBE, METHODS 3), or whole."""

Function = Literal["silu", "tanh"]
"""What is applied to each element of a mix of bases."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message is one line: what is wrong and how to mend it.

    It stays one line, and a readable one, whatever a damaged file puts into a name.
    """

    def __init__(self, message: str) -> None:
        line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in message)
        super().__init__(line if len(line) <= _LONGEST else f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 2 :]}")


_LONGEST = 2000
"""Characters of a message."""


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Storage(_Model):
    """How a matrix is stored. type: of kinds.STORAGES; group_size: inputs of a row that share a scale, where packed."""

    type: str
    group_size: int = Field(default=GROUP_SIZE, ge=1, le=1_000_000)

    @model_validator(mode="after")
    def _known(self) -> Storage:
        if self.type not in STORAGES:
            raise ValueError(f"storage type {self.type!r} is none of {', '.join(STORAGES)}")
        return self


class Projection(_Model):
    """What is stored of one projection of one layer.

    rank: columns of each expert's U, rows of its V; 0 means no deltas, but where delta is "dense".
    full_base: whether there is a base with all input columns.
    kept_columns: input columns of a base that survived static pruning; 0 means no such base.
    used_columns: how many of these a forward pass uses under dynamic selection; has to be said where there are any.
    base_rank: rank of a low-rank base; 0 means no such base. A projection has one base at most.
    delta: "factors" U V; "columns": U is the delta itself on `rank` of its input columns, else it is zero; "bases":
    A f(sum_j alpha_j B_j) with `rank` columns of A, of `bases` matrices B_j and f the `function`; "dense": the matrix
    itself, at rank 0.
    shared_v: one V for all experts (METHODS 1.7). distinct_u: how many U's are stored, shared by all experts; 0
    means that every expert has its own. base_storage, delta_storage: of the matrices of base and deltas; None: in the
    checkpoint's dtype. bias: whether every expert has a bias of this projection.
    """

    rank: int = Field(default=0, ge=0)
    full_base: bool = False
    kept_columns: int = Field(default=0, ge=0)
    used_columns: int = Field(default=0, ge=0)
    base_rank: int = Field(default=0, ge=0)
    delta: Delta = "factors"
    shared_v: bool = False
    distinct_u: int = Field(default=0, ge=0)
    bases: int = Field(default=0, ge=0, le=100_000)
    function: Function | None = None
    base_storage: Storage | None = None
    delta_storage: Storage | None = None
    bias: bool = False

    @property
    def has_base(self) -> bool:
        return bool(self.full_base or self.kept_columns or self.base_rank)

    @property
    def shares(self) -> bool:
        """Whether experts have factors in common."""
        return bool(self.rank and (self.shared_v or self.distinct_u))

    @property
    def shares_u(self) -> bool:
        """Whether a u_index is stored."""
        return bool(self.rank and self.distinct_u)

    @model_validator(mode="after")
    def _consistent(self) -> Projection:
        if self.kept_columns and "used_columns" not in self.model_fields_set:
            raise ValueError(f"kept_columns {self.kept_columns} needs used_columns: how many of them are used")
        if self.used_columns > self.kept_columns:
            raise ValueError(f"used_columns {self.used_columns} exceeds kept_columns {self.kept_columns}")
        if bool(self.kept_columns) + bool(self.base_rank) + self.full_base > 1:
            raise ValueError("a base is a full_base, or has kept_columns or a base_rank; leave one of them")
        if not self.rank and not self.has_base and self.delta != "dense":
            raise ValueError("a projection needs a base or a delta, rank, kept_columns and base_rank are all 0")
        if self.delta != "factors" and (self.shared_v or self.distinct_u):
            raise ValueError(f"shared_v and distinct_u need delta 'factors'; delta {self.delta!r} shares neither")
        if self.delta == "bases" and self.has_base:
            raise ValueError("delta 'bases' is a whole matrix and stands on no base; set kept_columns to 0")
        if self.delta == "dense" and self.rank:
            raise ValueError(f"delta 'dense' is stored whole; its rank must be 0, not {self.rank}")
        if self.delta == "bases":
            if not (self.rank and self.bases and self.function):
                raise ValueError("delta 'bases' needs a rank, a number of bases and a function")
        elif self.bases or self.function:
            raise ValueError(f"bases and function need delta 'bases', not {self.delta!r}")
        return self


class Channels(_Model):
    """Which intermediate channels are left, as counts in each of `pruning.groups` equal slices of them (METHODS 4.2).

    experts: of every expert; base: of the base, which has those that any expert has; None where there is no base.
    """

    experts: tuple[tuple[int, ...], ...] = Field(min_length=1)
    base: tuple[int, ...] | None = None


class Layer(_Model):
    """gate: None of experts that have none. trimmed: experts without any deltas, in ascending order; they run on the
    base alone (METHODS 1.7). channels: None where every expert keeps all of them."""

    gate: Projection | None = None
    up: Projection
    down: Projection
    trimmed: tuple[int, ...] = ()
    channels: Channels | None = None

    @model_validator(mode="after")
    def _agrees(self) -> Layer:
        if self.gate is None and self.up.delta == "bases":
            raise ValueError("delta 'bases' is for gate and up, and these experts have no gate")
        if self.gate is not None:
            self._alike(self.gate, self.up)
        if self.down.delta == "bases":
            raise ValueError("delta 'bases' is for gate and up alone")
        if any(left >= right for left, right in itertools.pairwise(self.trimmed)):
            raise ValueError("trimmed must list experts in ascending order, each once")
        if self.trimmed and (lacking := [role for role in self.roles if not self[role].has_base]):
            raise ValueError(f"trimmed experts run on the base alone, but {' and '.join(lacking)} have no base")
        return self if self.channels is None else self._ragged(self.channels)

    @staticmethod
    def _alike(gate: Projection, up: Projection) -> None:
        columns = [(one.full_base, one.kept_columns, one.used_columns) for one in (gate, up)]
        if columns[0] != columns[1]:
            raise ValueError("gate and up share one selection of base columns, their column counts must agree")
        for field in ("delta", "shared_v", "distinct_u", "bases", "function", "base_storage", "delta_storage", "bias"):
            if getattr(gate, field) != getattr(up, field):
                raise ValueError(f"gate and up have different {field}; they must agree")

    def _ragged(self, channels: Channels) -> Layer:
        """What may vary in width: bases by their inputs, deltas of an expert's own."""
        if lacking := [role for role in self.roles if self[role].shares or self[role].delta in ("columns", "bases")]:
            raise ValueError(f"channels need deltas of an expert's own, not those of {' and '.join(lacking)}")
        if lacking := [
            role for role in self.roles if self[role].base_rank or (role == "down" and self[role].kept_columns)
        ]:
            raise ValueError(f"channels need a full base, not that of {' and '.join(lacking)}")
        if any(self[role].has_base for role in self.roles) != (channels.base is not None):
            raise ValueError("channels.base must be there where there is a base, and only there")
        return self

    @property
    def roles(self) -> tuple[Role, ...]:
        """The projections that its experts have."""
        return ROLES if self.gate is not None else ROLES[1:]

    def __getitem__(self, role: Role) -> Projection:
        """Raises KeyError for the gate of experts that have none."""
        if (found := getattr(self, role)) is None:
            raise KeyError(role)
        return found


class Pruning(_Model):
    """scope: the dynamic selection to serve with; groups: equal slices of the input dimension that are
    pruned evenly, so that every tensor-parallel degree dividing `groups` gets rectangular slices."""

    scope: Scope = "off"
    groups: int = Field(default=8, ge=1)


class Source(_Model):
    """The dense model this was made from; bytes: total size of its weight files."""

    name: str
    revision: str | None = None
    parameters: int = Field(ge=1)
    bytes: int = Field(ge=1)


class Swiglu(_Model):
    """A clamped SwiGLU, in place of activation(gate) * up: with g = min(gate, limit) and u = up within -limit..limit,
    g * sigmoid(alpha * g) * (u + beta)."""

    limit: float = Field(gt=0, allow_inf_nan=False)
    alpha: float = Field(gt=0, allow_inf_nan=False)
    beta: float = Field(allow_inf_nan=False)


def swiglu_of(values: Sequence[float]) -> Swiglu | None:
    """Of limit, alpha and beta; None of ()."""
    return Swiglu(**dict(zip(Swiglu.model_fields, values, strict=True))) if values else None


class CheckpointConfig(_Model):
    """`quantization_config` of a compressed checkpoint's config.json."""

    quant_method: Literal["d2moe"] = "d2moe"
    format_version: int = FORMAT_VERSION
    method: str = Field(default="d2", pattern="^[a-z0-9][a-z0-9-]{0,63}$", description="what made it; nobody needs it")
    family: str
    family_row: FamilyRow | None = Field(default=None, description="of a family that d2moe has no row of itself")
    experts: str = Field(description="prefix of a layer's experts, with {layer}")
    projections: dict[Role, str]
    # Bounds far above any model, so that an absurd size is refused before anything of it is computed.
    num_experts: int = Field(ge=1, le=100_000)
    hidden_size: int = Field(ge=1, le=1_000_000)
    intermediate_size: int = Field(ge=1, le=1_000_000)
    dtype: Dtype
    pruning: Pruning = Pruning()
    swiglu: Swiglu | None = None
    layers: dict[int, Layer] = Field(min_length=1, max_length=10_000)
    source: Source

    @model_validator(mode="after")
    def _fits(self) -> CheckpointConfig:
        if not fit_names(self.projections):
            raise ValueError("projections must name gate, up and down, or up and down alone, each differently")
        if self.swiglu and "gate" not in self.projections:
            raise ValueError("swiglu needs a gate, and projections name none")
        if "{layer}" not in self.experts:
            raise ValueError(f"experts prefix {self.experts!r} lacks {{layer}}")
        if self.family_row and (self.family, self.experts, self.projections) != (
            self.family_row.model_type,
            self.family_row.experts,
            self.family_row.projections,
        ):
            raise ValueError("family_row is another family's: its model_type, experts or projections differ")
        for role in self.roles:
            if (inputs := self.shape(role)[1]) % self.pruning.groups:
                raise ValueError(f"{self.pruning.groups} groups do not divide {role}'s {inputs} columns")
        for number, layer in self.layers.items():
            if layer.roles != self.roles:
                raise ValueError(
                    f"layer {number} has {' and '.join(layer.roles)}, projections {' and '.join(self.roles)}"
                )
            if layer.trimmed and not 0 <= layer.trimmed[0] <= layer.trimmed[-1] < self.num_experts:
                raise ValueError(f"layer {number}: trimmed experts must lie in 0..{self.num_experts - 1}")
            for role in self.roles:
                if problem := self._misfit(layer, role):
                    raise ValueError(f"layer {number} {role}: {problem}")
            if layer.channels and (problem := self._uncountable(layer.channels)):
                raise ValueError(f"layer {number} channels: {problem}")
        return self

    def _uncountable(self, channels: Channels) -> str | None:
        """Why counts of channels cannot be, if they cannot."""
        groups, experts = self.pruning.groups, self.num_experts
        if len(channels.experts) != experts:
            return f"{len(channels.experts)} experts, not {experts}"
        every, most = channels.experts + (() if channels.base is None else (channels.base,)), self.intermediate_size
        if any(len(counts) != groups or min(counts) < 0 or max(counts) > most // groups for counts in every):
            return f"every expert, and the base, needs {groups} counts of 0..{most // groups}"
        if channels.base is not None:
            for base, *own in zip(channels.base, *channels.experts, strict=True):
                if not max(own) <= base <= sum(own):
                    return f"the base has {base} in a slice where its experts have {max(own)} to {sum(own)}"
        return None

    def _misfit(self, layer: Layer, role: Role) -> str | None:
        """Which of a projection's sizes does not fit the matrices, if any."""
        (out_features, in_features), groups = self.shape(role), self.pruning.groups
        projection = layer[role]
        # Many U's can make use of more shared rows, or columns, than one of them has outputs.
        whole = projection.delta == "columns" or projection.shared_v
        if projection.rank > (in_features if whole else min(out_features, in_features)):
            return f"rank {projection.rank} exceeds the matrix"
        if projection.base_rank > min(out_features, in_features):
            return f"base_rank {projection.base_rank} exceeds the matrix"
        delta_columns = projection.rank if projection.delta == "columns" else 0
        for columns in (projection.kept_columns, projection.used_columns, delta_columns):
            if columns > in_features or columns % groups:
                return f"{columns} columns do not fit the groups"
        if projection.bases > self.num_experts:
            return f"{projection.bases} bases exceed the {self.num_experts} experts"
        if projection.distinct_u > (untrimmed := self.num_experts - len(layer.trimmed)):
            return f"distinct_u {projection.distinct_u} exceeds the {untrimmed} experts that have deltas"
        return None

    @property
    def roles(self) -> tuple[Role, ...]:
        """The projections that experts have: without a gate up and down."""
        return roles_of(self.projections)

    @property
    def gating(self) -> tuple[float, ...]:
        """Limit, alpha and beta of the clamped SwiGLU; () where there is none."""
        return () if self.swiglu is None else (self.swiglu.limit, self.swiglu.alpha, self.swiglu.beta)

    @property
    def sizes(self) -> Shape:
        """What the table of kinds needs to know of the model."""
        return Shape(self.num_experts, self.hidden_size, self.intermediate_size, self.dtype)

    def shape(self, role: Role) -> tuple[int, int]:
        """(out, in) features of one expert's projection."""
        return self.sizes.matrix(role)

    def experts_prefix(self, layer: int) -> str:
        """What every expert tensor of a layer begins with; {layer} is replaced literally."""
        return self.experts.replace("{layer}", str(layer))

    def tensor_name(self, layer: int, expert: int, role: Role, kind: str) -> str:
        """`P.{expert}.{projection}.{kind}`; what the experts share rides with expert 0."""
        return f"{self.experts_prefix(layer)}.{expert}.{self.projections[role]}.{kind}"

    def stored(self, layer: int, *roles: Role) -> dict[str, Stored]:
        """Every tensor that is stored of some projections of a layer, all by default, by full name."""
        entry = self.layers[layer]
        return {
            self.tensor_name(layer, one.expert, role, one.name): one
            for role in roles or self.roles
            for one in stored_tensors(self.sizes, role, entry)
        }

    def projection_tensors(self, layer: int, role: Role) -> dict[str, TensorSpec]:
        """Every tensor stored for one projection of one layer, by full name."""
        return {name: one.spec for name, one in self.stored(layer, role).items()}

    def tensors_at_least(self, layer: int, role: Role) -> int:
        """A bound that is told without making any name: how many experts have a tensor of their own."""
        entry = self.layers[layer]
        owned = [kind for kind in KINDS if kind.present(entry, role) and kind.owner != "layer"]
        return max((len(owners(kind, role, entry, self.num_experts)) for kind in owned), default=0)

    def untrimmed(self, layer: int) -> list[int]:
        """The experts of a layer that have deltas, in ascending order."""
        trimmed = set(self.layers[layer].trimmed)
        return [expert for expert in range(self.num_experts) if expert not in trimmed]

    @property
    def expert_numbers(self) -> int:
        """Numbers that all expert tensors hold; of packed ones those that codes stand for."""
        return sum(one.numbers for layer in self.layers for one in self.stored(layer).values())

    def numbers(self, others: Iterable[Sequence[int]]) -> int:
        """Numbers that a whole checkpoint holds; others: the shapes of all tensors that are not the experts'."""
        return self.expert_numbers + sum(map(math.prod, others))

    def expert_tensors(self) -> dict[str, TensorSpec]:
        """Every expert tensor of the checkpoint, by full name."""
        return {name: one.spec for layer in self.layers for name, one in self.stored(layer).items()}

    @property
    def expert_bytes(self) -> int:
        """Of all expert tensors: codes, scales, sets of channels and all else that is stored; no files' headers."""
        return sum(spec.nbytes for spec in self.expert_tensors().values())

    @property
    def layer_numbers(self) -> int:
        """Weights of one layer's experts in the dense model."""
        return self.num_experts * len(self.roles) * self.hidden_size * self.intermediate_size

    @property
    def layer_bytes(self) -> int:
        """Of one layer's experts in the dense model, in the checkpoint's dtype."""
        return self.layer_numbers * DTYPE_BYTES[DTYPES[self.dtype]]


class FileEntry(_Model):
    bytes: int = Field(ge=8)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Manifest(_Model):
    """d2moe_manifest.json: what the configuration cannot tell about the checkpoint's files.

    other_tensors: all that is not an expert's, as [dtype, shape]; files: every weight file; modeling_sha256: of the
    code that plain transformers runs, None where its writer did not say.
    """

    format_version: int = FORMAT_VERSION
    other_tensors: dict[str, tuple[str, tuple[int, ...]]]
    files: dict[str, FileEntry]
    modeling_sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")


def refuse_version(found: Any, where: str) -> None:
    """Raises CheckpointError for any format version but ours."""
    if found != FORMAT_VERSION or not isinstance(found, int) or isinstance(found, bool):
        raise CheckpointError(
            f"{where}: d2moe format version {found!r} is not supported (this d2moe-vllm reads version "
            f"{FORMAT_VERSION}); install the version that wrote it, or compress again"
        )


def first_error(error: ValidationError) -> str:
    """The first of a pydantic error's findings, as `field: what is wrong`."""
    finding = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in finding["loc"])
    message = finding["msg"].removeprefix("Value error, ")
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{field + ': ' if field else ''}{message}{more}"


def parse_config(quantization_config: Mapping[str, Any], where: str = "config.json") -> CheckpointConfig:
    """Validate a `quantization_config` dict. Raises CheckpointError, in one line, for anything wrong."""
    method = quantization_config.get("quant_method")
    if method != QUANT_METHOD:
        raise CheckpointError(f"{where}: quant_method is {method!r}, not {QUANT_METHOD!r}: not a d2moe checkpoint")
    if "format_version" not in quantization_config:
        raise CheckpointError(f"{where}: quantization_config has no format_version; restore the original config.json")
    refuse_version(quantization_config["format_version"], where)
    layers = quantization_config.get("layers")
    for number in layers if isinstance(layers, Mapping) else ():
        # " 1" and "01" would be layer 1 too, and one of the two would be lost.
        if not re.fullmatch("0|[1-9][0-9]*", str(number), re.ASCII):
            raise CheckpointError(f"{where}: layers has {number!r}, which is no layer's number; restore the original")
    try:
        # As JSON, where strictness tells a number from a string but takes the layers' numbers as keys.
        return CheckpointConfig.model_validate_json(json.dumps(dict(quantization_config)), strict=True)
    except ValidationError as error:
        raise CheckpointError(f"{where}: bad quantization_config: {first_error(error)}; restore the original") from None
    except (ValueError, RecursionError) as error:  # what JSON cannot say, from a caller that did not read JSON
        raise CheckpointError(f"{where}: bad quantization_config: {error}; restore the original") from None
