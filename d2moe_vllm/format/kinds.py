"""What a layer of a d2moe checkpoint may store: one table of kinds, one of storages, from which all else is derived.

The format's checks, the order of what is written, reconstruction, vLLM's parameters and their loading, transformers'
modules, `inspect` and the table in docs/checkpoint-format.md follow them. Standard library only: this file travels
inside every checkpoint, for plain transformers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Container, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

FORMAT_VERSION = 2

Role = Literal["gate", "up", "down"]
ROLES: tuple[Role, ...] = ("gate", "up", "down")
"""Of an expert's projections. Experts without a gate have up and down alone."""
HALVES: Mapping[str, tuple[Role, ...]] = {"w13": ("gate", "up"), "w2": ("down",)}
"""Projections whose parameters lie side by side at run time, by the name of these parameters' prefix; of experts
without a gate up's are there alone."""


def roles_of(named: Container[str]) -> tuple[Role, ...]:
    """Which roles are among those named, gate before up before down."""
    return tuple(role for role in ROLES if role in named)


def halves_of(named: Container[str]) -> dict[str, tuple[Role, ...]]:
    """HALVES, of the roles among those named."""
    return {half: tuple(role for role in roles if role in named) for half, roles in HALVES.items()}


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
    along the input, least significant bits first, beside one 16-bit scale for every group of inputs; 0: not packed.
    zero: a code c stands for scale * (c - zero)."""

    dtype: str
    bits: int = 0
    zero: float = 0.0


STORAGES: Mapping[str, StorageType] = {
    **{name: StorageType(dtype) for name, dtype in DTYPES.items()},
    "int8": StorageType("U8", 8, 128),
    "int4": StorageType("U8", 4, 8),
    # Half-integers: a level at zero would waste one of few.
    "int3": StorageType("U8", 3, 3.5),
    "int2": StorageType("U8", 2, 1.5),
}
"""Type of a matrix's storage -> how it lies in the file."""
GROUP_SIZE = 64
"""Of a packed matrix whose storage does not say another."""
SCALES = "_scales"
"""What a packed matrix's name is followed by in its scales' name."""
SCALE_DTYPE = "BF16"
"""Of scales, whatever the checkpoint's dtype: as wide a range as float32's, so that none underflows."""


def storage_tensors(storage: str, group_size: int, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
    """What holds a matrix of `shape` [..., out, in], by what its name is followed by.

    Rows of codes are padded to whole bytes; a last group may be short.
    """
    how, (*rows, inputs) = STORAGES[storage], shape
    if not how.bits:
        return {"": TensorSpec(how.dtype, shape)}
    return {
        "": TensorSpec(how.dtype, (*rows, -(-inputs * how.bits // 8))),
        SCALES: TensorSpec(SCALE_DTYPE, (*rows, -(-inputs // group_size))),
    }


Owner = Literal["layer", "expert", "slot", "every"]
"""Who has a tensor: the layer, once; every expert with a delta; one of `distinct_u` slots, or, where there are none,
every expert with a delta; every expert. The layer's ride with expert 0, a slot's with the expert of its number."""
Content = Literal["matrix", "plain", "norms", "inputs", "slots", "mask"]
"""What is in it: a matrix in its part's storage; numbers in the checkpoint's dtype; float32 norms; int32 numbers of
input columns; int32 numbers of slots; a bit for every intermediate channel, least significant bits first."""


class Kind(NamedTuple):
    """One kind of tensor, `P.{e}.{p}.{name}`.

    part: of the base or of the deltas: whose storage it has. sizes: what its dimensions count, by the names of
    `size_of`. where: fields of a projection and what they have to be for it to be there; True: not 0 and not false.
    joined: the dimension along which gate's and up's lie side by side at run time, None where they have one for both.
    input_major: whether the last two dimensions are exchanged at run time, so that skipped inputs are skipped rows;
    never where it is packed. ragged: there only where experts keep some of the channels, and with "base" only where
    these have a base; roles: of the projections that have it.
    """

    name: str
    part: Literal["base", "delta"]
    owner: Owner
    sizes: tuple[str, ...]
    where: Mapping[str, Any]
    content: Content = "matrix"
    joined: str | None = None
    input_major: bool = False
    ragged: Literal["", "experts", "base"] = ""
    roles: tuple[Role, ...] = ROLES

    @property
    def is_index(self) -> bool:
        return self.content in ("inputs", "slots", "mask")

    @property
    def axis(self) -> int | None:
        """The number of the dimension `joined`, at rest."""
        return None if self.joined is None else self.sizes.index(self.joined)

    def storage(self, projection: Any) -> Any:
        """How a matrix is stored, with `type` and `group_size`; None: in the checkpoint's dtype, as all else is."""
        if self.content != "matrix":
            return None
        return projection.base_storage if self.part == "base" else projection.delta_storage

    def packed(self, projection: Any) -> Any:
        """Its storage where that is packed, else None."""
        storage = self.storage(projection)
        return storage if storage is not None and STORAGES[storage.type].bits else None

    def present(self, layer: Any, role: Role) -> bool:
        """Whether a projection of a layer has it; layer: with the fields of config.json's entry."""
        if role not in self.roles or (self.ragged and not getattr(layer.channels, self.ragged, None)):
            return False
        if (projection := getattr(layer, role)) is None:  # the gate, of experts that have none
            return False
        values = ((getattr(projection, field), wanted) for field, wanted in self.where.items())
        return all(bool(value) == wanted if isinstance(wanted, bool) else value == wanted for value, wanted in values)


_FACTORS = {"rank": True, "delta": "factors"}
_COLUMNS = {"rank": True, "delta": "columns"}
KINDS: tuple[Kind, ...] = (
    Kind("base", "base", "layer", ("out", "in"), {"full_base": True}, joined="out", input_major=True),
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
    Kind("bias", "delta", "every", ("out",), {"bias": True}, "plain", joined="out"),
    Kind("channels", "delta", "every", ("mask",), {}, "mask", ragged="experts", roles=("down",)),
    Kind("base_channels", "base", "layer", ("mask",), {}, "mask", ragged="base", roles=("down",)),
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
    "rank": 0, "full_base": False, "kept_columns": 0, "used_columns": 0, "base_rank": 0, "delta": "factors",
    "shared_v": False, "distinct_u": 0, "bases": 0, "function": None, "base_storage": None, "delta_storage": None,
    "bias": False,
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


def layer_of(fields: Mapping[str, Any]) -> Any:
    """config.json's entry of a layer with its fields as attributes: gate, up, down, trimmed and channels; gate is None
    of experts that have none.

    Raises ValueError as `projection_of` does.
    """
    channels, gated = fields.get("channels"), fields.get("gate") is not None
    return SimpleNamespace(
        **{role: projection_of(fields[role]) if gated or role != "gate" else None for role in ROLES},
        trimmed=tuple(fields.get("trimmed") or ()),
        channels=None if channels is None else SimpleNamespace(**{"base": None, **channels}),
    )


def width(layer: Any, expert: int | None, whole: int) -> int:
    """Intermediate channels that an expert keeps, or, for None, that the base does; `whole` where all are kept."""
    if layer.channels is None:
        return whole
    return sum((layer.channels.base or ()) if expert is None else layer.channels.experts[expert])


class Shape(NamedTuple):
    """Of a checkpoint's MoE layers. hidden_size: of what experts read and give, which is the model's own hidden size
    but where a layer projects what it hands to them; dtype: of what has no storage of its own."""

    num_experts: int
    hidden_size: int
    intermediate_size: int
    dtype: Dtype

    def matrix(self, role: str) -> tuple[int, int]:
        """(out, in) features of one expert's projection."""
        sizes = (self.intermediate_size, self.hidden_size)
        return (sizes[1], sizes[0]) if role == "down" else sizes

    def size_of(self, size: str, role: Role, layer: Any, expert: int | None = None) -> int:
        """What a name of Kind.sizes counts in one projection of a layer; expert: whose tensor it is, None: the
        layer's."""
        projection, channels = getattr(layer, role), self.intermediate_size
        out_features, in_features = self.matrix(role)
        if size in ("out", "in") and is_cut(role, size):
            return width(layer, expert, channels)
        return {
            "out": out_features,
            "in": in_features,
            "kept": projection.kept_columns,
            "rank": projection.rank,
            "columns": projection.rank,
            "base_rank": projection.base_rank,
            "bases": projection.bases,
            "experts": self.num_experts,
            "mask": -(-channels // 8),
        }[size]

    def tensors(self, kind: Kind, role: Role, layer: Any, expert: int | None = None) -> dict[str, TensorSpec]:
        """What is stored of a kind by one owner, by what its name is followed by: scales have a tensor of their own.

        expert: the owner, where experts own it; only where these keep different channels does it matter.
        """
        shape = tuple(self.size_of(size, role, layer, expert) for size in kind.sizes)
        if (storage := kind.storage(getattr(layer, role))) is not None:
            return storage_tensors(storage.type, storage.group_size, shape)
        fixed = {"norms": "F32", "inputs": "I32", "slots": "I32", "mask": "U8"}
        return {"": TensorSpec(fixed.get(kind.content, DTYPES[self.dtype]), shape)}


class Stored(NamedTuple):
    """One tensor of a layer: expert is the number that it rides with, name its kind's, with SCALES for scales; numbers:
    how many of the model's it holds, of a packed matrix those that its codes stand for; scales and masks are none."""

    role: Role
    expert: int
    kind: Kind
    name: str
    spec: TensorSpec
    numbers: int

    @property
    def is_scales(self) -> bool:
        return self.name != self.kind.name


def owners(kind: Kind, role: Role, layer: Any, num_experts: int) -> list[int]:
    """The numbers that a kind's tensors ride with, in ascending order."""
    if kind.owner == "layer":
        return [0]
    if kind.owner == "slot" and (distinct := getattr(layer, role).distinct_u):
        return list(range(distinct))
    without = set() if kind.owner == "every" else set(layer.trimmed)
    return [expert for expert in range(num_experts) if expert not in without]


def stored_tensors(shape: Shape, role: Role, layer: Any) -> Iterator[Stored]:
    """Everything that is stored of one projection of one layer; layer: with the fields of config.json's entry."""
    for kind in KINDS:
        if not kind.present(layer, role):
            continue
        tensors, numbers, masks = None, 0, kind.content == "mask"
        for expert in owners(kind, role, layer, shape.num_experts):
            if tensors is None or layer.channels is not None:
                owner = None if kind.owner == "layer" else expert
                tensors = shape.tensors(kind, role, layer, owner)
                numbers = math.prod(shape.size_of(size, role, layer, owner) for size in kind.sizes)
            for suffix, spec in tensors.items():
                yield Stored(role, expert, kind, kind.name + suffix, spec, 0 if suffix or masks else numbers)


def index_problem(one: Stored, values: Sequence[int], layer: Any, shape: Shape, groups: int) -> str | None:
    """What is wrong with an index tensor's values, if anything.

    Input columns ascend, lie in 0..inputs-1 and are spread evenly over `groups` equal slices of them; slots are those
    of stored U's, and -1 for trimmed experts and for these alone; of a mask each of `groups` equal slices of the
    channels has as many bits as config.json says, and there are no others.
    """
    if one.kind.content == "mask":
        counts = layer.channels.base if one.kind.owner == "layer" else layer.channels.experts[one.expert]
        bits, slices = sum(byte << 8 * place for place, byte in enumerate(values)), shape.intermediate_size // groups
        found = [(bits >> slices * group & (1 << slices) - 1).bit_count() for group in range(groups)]
        if found == list(counts) and not bits >> shape.intermediate_size:
            return None
        return f"not as many channels in every one of {groups} slices as config.json says"
    if one.kind.content == "inputs":
        inputs = shape.matrix(one.role)[1]
        ascending = all(left < right for left, right in itertools.pairwise(values))
        spread = [group for group in range(groups) for _ in range(len(values) // groups)]
        if ascending and [value // (inputs // groups) for value in values] == spread:
            return None
        return f"columns must ascend, lie in 0..{inputs - 1} and be spread evenly over {groups} groups"
    without, slots = set(layer.trimmed), getattr(layer, one.role).distinct_u
    for expert, slot in enumerate(values):
        if expert in without and slot != -1:
            return f"expert {expert} is trimmed and needs -1, not {slot}"
        if expert not in without and not 0 <= slot < slots:
            return f"expert {expert} has U {slot}, but 0..{slots - 1} are stored"
    return None


def first_index_problem(
    tensors: Mapping[str, tuple[Stored, Sequence[int]]], layer: Any, shape: Shape, groups: int
) -> str | None:
    """What is wrong with the first of a layer's index tensors, by full name, that is not what it has to be, if any.

    What has no side of its own at run time gate and up share; a base has the channels that any expert has.
    """
    both: dict[str, tuple[str, Sequence[int]]] = {}
    every, base = [0] * -(-shape.intermediate_size // 8), None
    for name, (one, values) in tensors.items():
        if problem := index_problem(one, values, layer, shape, groups):
            return f"{name}: {problem}"
        if one.kind.content == "mask":
            if one.kind.owner == "layer":
                base = name, values
            else:
                every = [one | other for one, other in zip(every, values, strict=True)]
        elif one.role != "down" and one.kind.joined is None:
            other, values_there = both.setdefault(one.name, (name, values))
            if values_there != values:
                return differ_message(other, name)
    if base is not None and list(base[1]) != every:
        return f"{base[0]}: its channels are not those that any expert keeps"
    return None


def differ_message(gate: str, up: str) -> str:
    return f"{gate} and {up} differ, gate and up share one"
