"""The d2moe checkpoint format, version 1: configuration, tensor names, validation.

docs/checkpoint-format.md is the prose of this file. Both halves of the project use it, so it knows
neither vLLM nor any compression method, and reads safetensors headers only: nothing is allocated
for a tensor before its name, dtype and shape have been found right.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

FORMAT_VERSION = 1
QUANT_METHOD = "d2moe"
INDEX_FILE = "model.safetensors.index.json"
MANIFEST_FILE = "d2moe_manifest.json"
RECIPE_FILE = "d2moe_recipe.yaml"
STATS_FILE = "d2moe_stats.json"

Role = Literal["gate", "up", "down"]
ROLES: tuple[Role, ...] = ("gate", "up", "down")
Scope = Literal["batch", "token", "off"]
"""Who shares one dynamic selection of base columns: a forward pass, a token, or nobody (METHODS 1.5)."""

Dtype = Literal["bfloat16", "float16", "float32"]
DTYPES: dict[Dtype, str] = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
"""config.json's dtype names -> safetensors' names."""
DTYPE_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "BF16": 2, "F16": 2, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
}  # fmt: skip


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message is one line: what is wrong and how to mend it."""


class TensorSpec(NamedTuple):
    """dtype by safetensors' name ("BF16") and shape of one stored tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.numel * DTYPE_BYTES[self.dtype]

    @property
    def numel(self) -> int:
        total = 1
        for size in self.shape:
            total *= size
        return total

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Projection(_Model):
    """What is stored of one projection of one layer.

    rank: columns of each expert's U, rows of its V; 0 means no deltas.
    kept_columns: input columns of the base that survived static pruning; 0 means no base.
    used_columns: how many of these a forward pass uses under dynamic selection.
    """

    rank: int = Field(ge=0)
    kept_columns: int = Field(ge=0)
    used_columns: int = Field(ge=0)

    @model_validator(mode="after")
    def _consistent(self) -> Projection:
        if self.used_columns > self.kept_columns:
            raise ValueError(f"used_columns {self.used_columns} exceeds kept_columns {self.kept_columns}")
        if self.rank == 0 and self.kept_columns == 0:
            raise ValueError("a projection needs a base or a delta, rank and kept_columns are both 0")
        return self


class Layer(_Model):
    gate: Projection
    up: Projection
    down: Projection

    @model_validator(mode="after")
    def _shared_selection(self) -> Layer:
        gate, up = self.gate, self.up
        if (gate.kept_columns, gate.used_columns) != (up.kept_columns, up.used_columns):
            raise ValueError("gate and up share one selection of base columns, their column counts must agree")
        return self

    def __getitem__(self, role: Role) -> Projection:
        return getattr(self, role)


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


class CheckpointConfig(_Model):
    """`quantization_config` of a compressed checkpoint's config.json."""

    quant_method: Literal["d2moe"] = "d2moe"
    format_version: int = FORMAT_VERSION
    method: Literal["d2"] = "d2"
    family: str
    experts: str = Field(description="prefix of a layer's experts, with {layer}")
    projections: dict[Role, str]
    # Bounds far above any model, so that an absurd size is refused before anything of it is computed.
    num_experts: int = Field(ge=1, le=100_000)
    hidden_size: int = Field(ge=1, le=1_000_000)
    intermediate_size: int = Field(ge=1, le=1_000_000)
    dtype: Dtype
    pruning: Pruning = Pruning()
    layers: dict[int, Layer] = Field(min_length=1, max_length=10_000)
    source: Source

    @model_validator(mode="after")
    def _fits(self) -> CheckpointConfig:
        if set(self.projections) != set(ROLES) or len(set(self.projections.values())) != len(ROLES):
            raise ValueError("projections must name gate, up and down, each differently")
        if "{layer}" not in self.experts:
            raise ValueError(f"experts prefix {self.experts!r} lacks {{layer}}")
        for number, layer in self.layers.items():
            for role in ROLES:
                out_features, in_features = self.shape(role)
                if in_features % self.pruning.groups:
                    raise ValueError(f"{self.pruning.groups} groups do not divide {role}'s {in_features} columns")
                projection = layer[role]
                if projection.rank > min(out_features, in_features):
                    raise ValueError(f"layer {number} {role}: rank {projection.rank} exceeds the matrix")
                for columns in (projection.kept_columns, projection.used_columns):
                    if columns > in_features or columns % self.pruning.groups:
                        raise ValueError(f"layer {number} {role}: {columns} columns do not fit the groups")
        return self

    def shape(self, role: Role) -> tuple[int, int]:
        """(out, in) features of one expert's projection."""
        if role == "down":
            return self.hidden_size, self.intermediate_size
        return self.intermediate_size, self.hidden_size

    def experts_prefix(self, layer: int) -> str:
        """What every expert tensor of a layer begins with; {layer} is replaced literally."""
        return self.experts.replace("{layer}", str(layer))

    def tensor_name(self, layer: int, expert: int, role: Role, kind: str) -> str:
        """`P.{expert}.{projection}.{kind}`; what the experts share rides with expert 0."""
        return f"{self.experts_prefix(layer)}.{expert}.{self.projections[role]}.{kind}"

    def projection_tensors(self, layer: int, role: Role) -> dict[str, TensorSpec]:
        """Every tensor stored for one projection of one layer, by full name."""
        out_features, in_features = self.shape(role)
        projection = self.layers[layer][role]
        dtype = DTYPES[self.dtype]
        tensors: dict[str, TensorSpec] = {}
        if kept := projection.kept_columns:
            tensors[self.tensor_name(layer, 0, role, "base")] = TensorSpec(dtype, (out_features, kept))
            tensors[self.tensor_name(layer, 0, role, "base_columns")] = TensorSpec("I32", (kept,))
            tensors[self.tensor_name(layer, 0, role, "base_norms")] = TensorSpec("F32", (kept,))
        if rank := projection.rank:
            for expert in range(self.num_experts):
                tensors[self.tensor_name(layer, expert, role, "delta_u")] = TensorSpec(dtype, (out_features, rank))
                tensors[self.tensor_name(layer, expert, role, "delta_v")] = TensorSpec(dtype, (rank, in_features))
        return tensors

    def expert_tensors(self) -> dict[str, TensorSpec]:
        """Every expert tensor of the checkpoint, by full name."""
        return {
            name: spec
            for layer in self.layers
            for role in ROLES
            for name, spec in self.projection_tensors(layer, role).items()
        }


class FileEntry(_Model):
    bytes: int = Field(ge=8)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Manifest(_Model):
    """d2moe_manifest.json: what the configuration cannot tell about the checkpoint's files.

    other_tensors: all that is not an expert's, as [dtype, shape]; files: every weight file.
    """

    format_version: int = FORMAT_VERSION
    other_tensors: dict[str, tuple[str, tuple[int, ...]]]
    files: dict[str, FileEntry]


def _refuse_version(found: Any, where: str) -> None:
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
    _refuse_version(quantization_config["format_version"], where)
    try:
        # As JSON, where strictness tells a number from a string but takes the layers' numbers as keys.
        return CheckpointConfig.model_validate_json(json.dumps(dict(quantization_config)), strict=True)
    except ValidationError as error:
        raise CheckpointError(f"{where}: bad quantization_config: {first_error(error)}") from None


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent}: {path.name} is missing; copy the whole checkpoint again") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error}); copy the checkpoint again") from None


def read_config(folder: Path) -> CheckpointConfig:
    """The configuration of the compressed checkpoint in `folder`. Raises CheckpointError."""
    content = _read_json(folder / "config.json")
    config = content.get("quantization_config") if isinstance(content, dict) else None
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder}: config.json has no quantization_config: this is a dense checkpoint")
    return parse_config(config, str(folder / "config.json"))


def read_manifest(folder: Path) -> Manifest:
    """Raises CheckpointError."""
    content = _read_json(folder / MANIFEST_FILE)
    where = str(folder / MANIFEST_FILE)
    _refuse_version(content.get("format_version") if isinstance(content, dict) else None, where)
    try:
        return Manifest.model_validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        raise CheckpointError(f"{where}: {first_error(error)}") from None


def read_weight_map(folder: Path) -> dict[str, str]:
    """Tensor name -> file name, from the index, or from the headers where one file needs no index.

    Works on dense checkpoints too. Raises CheckpointError for file names that leave the folder.
    """
    index = folder / INDEX_FILE
    if index.exists():
        content = _read_json(index)
        weight_map = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{index}: no weight_map; copy the checkpoint again")
    elif (folder / "model.safetensors").exists():
        weight_map = dict.fromkeys(read_header(folder / "model.safetensors"), "model.safetensors")
    else:
        raise CheckpointError(f"{folder}: neither {INDEX_FILE} nor model.safetensors: no safetensors weights here")
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or not re.fullmatch(r"[\w][\w.\-]*\.safetensors", file):
            raise CheckpointError(f"{index}: {tensor} points at {file!r}, which is not a file name in this folder")
    return weight_map


def read_header(path: Path) -> dict[str, TensorSpec]:
    """Names, dtypes and shapes in one safetensors file; its data is not read.

    Raises CheckpointError for a missing, truncated or damaged file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            return {name: TensorSpec(s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent}: weight file {path.name} is missing; copy it again") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged or truncated ({error}); copy it again") from None


def _names(names: Iterable[str], limit: int = 3) -> str:
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def check_tensors(
    folder: Path, expected: Mapping[str, TensorSpec], files: Mapping[str, FileEntry] | None = None
) -> dict[str, str]:
    """Compare index and headers of every weight file with `expected`; returns the weight map.

    Raises CheckpointError, naming the first offenders, for a tensor that is missing, of the wrong dtype or
    shape, unexpected, or in another file than the index says, and for a file of the wrong size.
    """
    weight_map = read_weight_map(folder)
    if files is not None and (unlisted := set(weight_map.values()) ^ set(files)):
        raise CheckpointError(f"{folder}: {INDEX_FILE} and {MANIFEST_FILE} disagree about {_names(sorted(unlisted))}")
    found: dict[str, TensorSpec] = {}
    for file in sorted(set(weight_map.values())):
        for name, spec in read_header(folder / file).items():
            if weight_map.get(name) != file:
                raise CheckpointError(f"{folder / file}: tensor {name} is not where the index says; copy both again")
            found[name] = spec
    if missing := [name for name in expected if name not in found]:
        raise CheckpointError(f"{folder}: {len(missing)} tensors missing: {_names(missing)}; copy it again")
    if unknown := [name for name in found if name not in expected]:
        raise CheckpointError(f"{folder}: {len(unknown)} tensors do not belong here: {_names(unknown)}")
    for name, spec in expected.items():
        if found[name] != spec:
            raise CheckpointError(f"{folder / weight_map[name]}: {name} is {found[name]}, expected {spec}")
    # Last: a tensor's own name tells more than its file's size.
    for name, entry in (files or {}).items():
        size = (folder / name).stat().st_size
        if size != entry.bytes:
            raise CheckpointError(
                f"{folder / name}: truncated or replaced ({size} bytes, not {entry.bytes}); copy it again"
            )
    return weight_map


def check_checkpoint(folder: Path, config: CheckpointConfig | None = None) -> CheckpointConfig:
    """Refuse a damaged checkpoint before anything is allocated: config, manifest, index and all headers.

    Raises CheckpointError. Payloads are not read, but for the base columns: hashes are not compared.
    """
    config = config or read_config(folder)
    manifest = read_manifest(folder)
    others = {name: TensorSpec(dtype, shape) for name, (dtype, shape) in manifest.other_tensors.items()}
    experts = config.expert_tensors()
    if both := [name for name in others if name in experts]:
        raise CheckpointError(f"{folder}: {MANIFEST_FILE} lists expert tensors: {_names(both)}")
    weight_map = check_tensors(folder, others | experts, manifest.files)
    for layer, projections in config.layers.items():
        columns: dict[Role, list[int]] = {}
        names = {role: config.tensor_name(layer, 0, role, "base_columns") for role in ROLES}
        for role, name in names.items():
            if projections[role].kept_columns:
                columns[role] = _read_integers(folder / weight_map[name], name)
                check_columns(name, columns[role], config, role)
        if columns.get("gate") != columns.get("up"):
            raise CheckpointError(
                f"{names['gate']} and {names['up']} differ, gate and up share one selection; copy the checkpoint again"
            )
    return config


def _read_integers(path: Path, name: str) -> list[int]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return file.get_tensor(name).tolist()
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: {name} cannot be read ({error}); copy it again") from None


def check_columns(name: str, columns: list[int], config: CheckpointConfig, role: Role) -> None:
    """Raises CheckpointError unless base columns ascend, are in range and as many in every group."""
    groups, inputs = config.pruning.groups, config.shape(role)[1]
    ascending = all(left < right for left, right in itertools.pairwise(columns))
    per_group = len(columns) // groups
    expected = [group for group in range(groups) for _ in range(per_group)]
    if not ascending or [column // (inputs // groups) for column in columns] != expected:
        raise CheckpointError(
            f"{name}: columns must ascend, lie in 0..{inputs - 1} and be spread evenly over {groups} groups; "
            "copy the checkpoint again"
        )
