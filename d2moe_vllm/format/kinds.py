"""What a layer of a d2moe checkpoint may store: one table of kinds, one of storages, from which all else is derived.

The format's checks, the order of what is written, reconstruction, vLLM's parameters and their loading, transformers'
modules, `inspect` and the table in docs/checkpoint-format.md follow them. Standard library only: this file travels
inside every checkpoint, for plain transformers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

FORMAT_VERSION = 2

Role = Literal["gate", "up", "down"]
ROLES: tuple[Role, ...] = ("gate", "up", "down")
HALVES: Mapping[str, tuple[Role, ...]] = {"w13": ("gate", "up"), "w2": ("down",)}
"""Projections whose parameters lie side by side at run time, by the name of these parameters' prefix."""

Dtype = Literal["bfloat16", "float16", "float32"]
DTYPES: Mapping[Dtype, str] = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
"""config.json's dtype names -> safetensors' names."""
DTYPE_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "BF16": 2, "F16": 2, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
}  # fmt: skip


class TensorSpec(NamedTuple):
    """dtype by safetensors' name ("BF16") and shape of one stored tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.numel * DTYPE_BYTES[self.dtype]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


class StorageType(NamedTuple):
    """dtype: safetensors' name of the tensor that holds the numbers, or their codes. bits: of a code that is packed
    along the input, least significant bits first, beside one 16-bit scale for every group of inputs; 0: not packed."""

    dtype: str
    bits: int = 0


STORAGES: Mapping[str, StorageType] = {
    **{name: StorageType(dtype) for name, dtype in DTYPES.items()},
    **{f"int{bits}": StorageType("U8", bits) for bits in (8, 4, 3, 2)},
}
"""Type of a matrix's storage -> how it lies in the file."""
READABLE = tuple(name for name, storage in STORAGES.items() if not storage.bits)
"""Types that this release computes with. The sizes of the others are defined, and readers refuse them by name."""
GROUP_SIZE = 64
"""Of a packed matrix whose storage does not say another."""
SCALES = "_scales"
"""What a packed matrix's name is followed by in its scales' name."""


def storage_tensors(storage: str, group_size: int, shape: tuple[int, ...], dtype: Dtype) -> dict[str, TensorSpec]:
    """What holds a matrix of `shape` [..., out, in], by what its name is followed by.

    dtype: of the scales. Rows of codes are padded to whole bytes; a last group may be short.
    """
    how, (*rows, inputs) = STORAGES[storage], shape
    if not how.bits:
        return {"": TensorSpec(how.dtype, shape)}
    return {
        "": TensorSpec(how.dtype, (*rows, -(-inputs * how.bits // 8))),
        SCALES: TensorSpec(DTYPES[dtype], (*rows, -(-inputs // group_size))),
    }


Owner = Literal["layer", "expert", "slot"]
"""Who has a tensor: the layer, once; every expert with a delta; one of `distinct_u` slots, or, where there are none,
every expert with a delta. The layer's ride with expert 0, a slot's with the expert of its number."""
Content = Literal["matrix", "plain", "norms", "inputs", "slots"]
"""What is in it: a matrix in its part's storage; numbers in the checkpoint's dtype; float32 norms; int32 numbers of
input columns; int32 numbers of slots."""


class Kind(NamedTuple):
    """One kind of tensor, `P.{e}.{p}.{name}`.

    part: of the base or of the deltas: whose storage it has. sizes: what its dimensions count, by the names of
    `size_of`. where: fields of a projection and what they have to be for it to be there; True: not 0 and not false.
    joined: the dimension along which gate's and up's lie side by side at run time, None where they have one for both.
    input_major: whether the last two dimensions are exchanged at run time, so that skipped inputs are skipped rows.
    """

    name: str
    part: Literal["base", "delta"]
    owner: Owner
    sizes: tuple[str, ...]
    where: Mapping[str, Any]
    content: Content = "matrix"
    joined: str | None = None
    input_major: bool = False

    @property
    def is_index(self) -> bool:
        return self.content in ("inputs", "slots")

    @property
    def axis(self) -> int | None:
        """The number of the dimension `joined`, at rest."""
        return None if self.joined is None else self.sizes.index(self.joined)

    def storage(self, projection: Any) -> Any:
        """How a matrix is stored, with `type` and `group_size`; None: in the checkpoint's dtype, as all else is."""
        if self.content != "matrix":
            return None
        return projection.base_storage if self.part == "base" else projection.delta_storage

    def present(self, projection: Any) -> bool:
        values = ((getattr(projection, field), wanted) for field, wanted in self.where.items())
        return all(bool(value) == wanted if isinstance(wanted, bool) else value == wanted for value, wanted in values)


_FACTORS = {"rank": True, "delta": "factors"}
_COLUMNS = {"rank": True, "delta": "columns"}
KINDS: tuple[Kind, ...] = (
    Kind("base", "base", "layer", ("out", "kept"), {"kept_columns": True}, joined="out", input_major=True),
    Kind("base_columns", "base", "layer", ("kept",), {"kept_columns": True}, "inputs"),
    Kind("base_norms", "base", "layer", ("kept",), {"kept_columns": True}, "norms"),
    Kind("base_u", "base", "layer", ("out", "base_rank"), {"base_rank": True}, joined="base_rank"),
    Kind("base_v", "base", "layer", ("base_rank", "in"), {"base_rank": True}, joined="base_rank"),
    Kind("delta_u", "delta", "slot", ("out", "rank"), _FACTORS, joined="rank"),
    Kind("u_index", "delta", "layer", ("experts",), {**_FACTORS, "distinct_u": True}, "slots"),
    Kind("delta_v", "delta", "expert", ("rank", "in"), {**_FACTORS, "shared_v": False}, joined="rank"),
    Kind("shared_v", "delta", "layer", ("rank", "in"), {**_FACTORS, "shared_v": True}, joined="rank"),
    Kind("delta_u", "delta", "expert", ("out", "columns"), _COLUMNS, joined="columns"),
    Kind("delta_columns", "delta", "expert", ("columns",), _COLUMNS, "inputs", joined="columns"),
    Kind("bases", "delta", "layer", ("bases", "rank", "in"), {"delta": "bases"}, joined="rank"),
    Kind("a", "delta", "expert", ("out", "rank"), {"delta": "bases"}, joined="rank"),
    Kind("alpha", "delta", "expert", ("bases",), {"delta": "bases"}, "plain", joined="bases"),
    Kind("dense", "delta", "expert", ("out", "in"), {"delta": "dense"}, joined="out"),
)
BASE_NAMES = frozenset(kind.name for kind in KINDS if kind.part == "base")

_CUT: Mapping[str, frozenset[str]] = {
    "gate": frozenset({"out"}),
    "up": frozenset({"out"}),
    "down": frozenset({"in", "kept", "columns"}),
}


def is_cut(role: str, size: str) -> bool:
    """Whether tensor-parallel ranks share out a dimension of a projection: what counts intermediate channels."""
    return size in _CUT[role]


PROJECTION_DEFAULTS: Mapping[str, Any] = {
    "rank": 0, "kept_columns": 0, "used_columns": 0, "base_rank": 0, "delta": "factors", "shared_v": False,
    "distinct_u": 0, "bases": 0, "function": None, "base_storage": None, "delta_storage": None,
}  # fmt: skip
"""A projection's fields in config.json, and what an absent one means."""


def projection_of(fields: Mapping[str, Any]) -> Any:
    """config.json's entry of a projection with its fields as attributes, absent ones by default.

    Raises ValueError where there are base columns and nothing says how many are used.
    """
    if fields.get("kept_columns") and "used_columns" not in fields:
        raise ValueError(f"kept_columns {fields['kept_columns']} needs used_columns; restore the original config.json")
    storages = {
        name: SimpleNamespace(**{"group_size": GROUP_SIZE, **fields[name]})
        for name in ("base_storage", "delta_storage")
        if fields.get(name) is not None
    }
    return SimpleNamespace(**{**PROJECTION_DEFAULTS, **fields, **storages})


class Shape(NamedTuple):
    """Of a checkpoint's MoE layers; dtype: of what has no storage of its own."""

    num_experts: int
    hidden_size: int
    intermediate_size: int
    dtype: Dtype

    def matrix(self, role: str) -> tuple[int, int]:
        """(out, in) features of one expert's projection."""
        sizes = (self.intermediate_size, self.hidden_size)
        return (sizes[1], sizes[0]) if role == "down" else sizes

    def size_of(self, size: str, role: str, projection: Any) -> int:
        """What a name of Kind.sizes counts in one projection."""
        out_features, in_features = self.matrix(role)
        return {
            "out": out_features,
            "in": in_features,
            "kept": projection.kept_columns,
            "rank": projection.rank,
            "columns": projection.rank,
            "base_rank": projection.base_rank,
            "bases": projection.bases,
            "experts": self.num_experts,
        }[size]

    def tensors(self, kind: Kind, role: str, projection: Any) -> dict[str, TensorSpec]:
        """What is stored of a kind by one owner, by what its name is followed by: scales have a tensor of their own."""
        shape = tuple(self.size_of(size, role, projection) for size in kind.sizes)
        if (storage := kind.storage(projection)) is not None:
            return storage_tensors(storage.type, storage.group_size, shape, self.dtype)
        fixed = "F32" if kind.content == "norms" else "I32" if kind.is_index else DTYPES[self.dtype]
        return {"": TensorSpec(fixed, shape)}


class Stored(NamedTuple):
    """One tensor of a layer: expert is the number that it rides with, name its kind's, with SCALES for scales."""

    role: Role
    expert: int
    kind: Kind
    name: str
    spec: TensorSpec


def owners(kind: Kind, projection: Any, num_experts: int, trimmed: Sequence[int]) -> list[int]:
    """The numbers that a kind's tensors ride with, in ascending order."""
    if kind.owner == "layer":
        return [0]
    if kind.owner == "slot" and projection.distinct_u:
        return list(range(projection.distinct_u))
    without = set(trimmed)
    return [expert for expert in range(num_experts) if expert not in without]


def stored_tensors(shape: Shape, role: Role, projection: Any, trimmed: Sequence[int]) -> Iterator[Stored]:
    """Everything that is stored of one projection of one layer; projection: with the fields of PROJECTION_DEFAULTS."""
    for kind in KINDS:
        if kind.present(projection):
            tensors = shape.tensors(kind, role, projection)
            for expert in owners(kind, projection, shape.num_experts, trimmed):
                for suffix, spec in tensors.items():
                    yield Stored(role, expert, kind, kind.name + suffix, spec)


def index_problem(
    kind: Kind, values: Sequence[int], projection: Any, inputs: int, groups: int, trimmed: Sequence[int]
) -> str | None:
    """What is wrong with an index tensor's values, if anything.

    Input columns ascend, lie in 0..inputs-1 and are spread evenly over `groups` equal slices of them; slots are those
    of stored U's, and -1 for trimmed experts and for these alone.
    """
    if kind.content == "inputs":
        ascending = all(left < right for left, right in itertools.pairwise(values))
        spread = [group for group in range(groups) for _ in range(len(values) // groups)]
        if ascending and [value // (inputs // groups) for value in values] == spread:
            return None
        return f"columns must ascend, lie in 0..{inputs - 1} and be spread evenly over {groups} groups"
    without = set(trimmed)
    for expert, slot in enumerate(values):
        if expert in without and slot != -1:
            return f"expert {expert} is trimmed and needs -1, not {slot}"
        if expert not in without and not 0 <= slot < projection.distinct_u:
            return f"expert {expert} has U {slot}, but 0..{projection.distinct_u - 1} are stored"
    return None
