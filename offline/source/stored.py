"""The tensors of an original checkpoint, read as plain matrices whatever layout and number format they lie in."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2moe_vllm.format.config import CheckpointError
from d2moe_vllm.format.kinds import Role, TensorSpec
from offline.errors import InputError
from offline.io.shards import TORCH_DTYPES, Reader
from offline.source.families import MoEShape, unequal
from offline.source.family import Family, Layout
from offline.source.missing import remedy
from offline.source.quantized import Quantized, Scheme, beside, find_quantized


class SourceReader(Reader):
    """A checkpoint's files, whose quantized weights are dequantised while reading.

    schemes: how weights may be stored besides plain floats; dtype: safetensors' name of what they are read as. specs
    are those of the dequantised weights, without what belongs to them. ours: tensors of a compressed checkpoint, which
    stay as they are stored. Raises CheckpointError.
    """

    def __init__(
        self, folder: Path, schemes: tuple[Scheme, ...] = (), ours: Collection[str] = frozenset(), dtype: str = "BF16"
    ) -> None:
        super().__init__(folder)
        self._dtype = TORCH_DTYPES[dtype]
        try:
            self.quantized: Mapping[str, Quantized] = {one.name: one for one in find_quantized(self.specs, schemes)}
        except CheckpointError as error:
            raise CheckpointError(f"{folder}: {error}") from None
        if schemes and not self.quantized:
            told = " or ".join(dict.fromkeys(scheme.what for scheme in schemes))
            raise CheckpointError(f"{folder}: config.json says that weights are {told}; none is; wrong config.json?")
        for weight in self.quantized.values():
            for name in (*weight.tensors, *beside(weight.name)):
                self.specs.pop(name, None)
        self.weight_map |= {weight.name: self.weight_map[weight.tensors[0]] for weight in self.quantized.values()}
        self.specs |= {weight.name: TensorSpec(dtype, weight.shape) for weight in self.quantized.values()}
        for name, spec in self.specs.items():
            if spec.dtype.startswith("F8_") and name not in ours:
                raise CheckpointError(f"{folder}: {name} is stored as {spec.dtype}; give the model in bfloat16")

    def tensor(self, name: str) -> Tensor:
        """One tensor, dequantised where it is quantized. Raises CheckpointError where the file is damaged."""
        weight = self.quantized.get(name)
        return super().tensor(name) if weight is None else weight.dequantise(super().tensor, self._dtype)

    def part(self, name: str, where: tuple[int | slice, ...]) -> Tensor:
        """tensor(name)[where] without reading the rest; `where` starts with a number only in a stack of matrices.

        Raises CheckpointError where it holds a NaN or infinity.
        """
        weight = self.quantized.get(name)
        if weight is None:
            part = super().tensor(name)[where]
        elif isinstance(where[0], int):
            part = weight.dequantise(super().tensor, self._dtype, where[0])[where[1:]]
        else:
            part = weight.dequantise(super().tensor, self._dtype)[where]
        if not torch.isfinite(part).all():
            path = self.folder / self.weight_map[name]
            raise CheckpointError(f"{path}: {name} holds NaN or infinite values; download the file again")
        return part


@dataclass(frozen=True)
class StoredExperts:
    """Where a checkpoint's dense expert weights lie, and biases with them, and how to read one.

    transposed: stacks are [experts, in, out], whatever the layout says of them. dtype: safetensors' name of what they
    are read as. names: the tensors that hold them.
    """

    reader: SourceReader
    shape: MoEShape
    layout: Layout
    transposed: bool
    dtype: str
    names: frozenset[str]

    def weight(self, layer: int, expert: int, role: Role) -> Tensor:
        """[out, in], contiguous. Raises CheckpointError where it holds a NaN or infinity."""
        rows, name = self._outputs(role), self.layout.name(layer, expert, role)
        if not self.layout.stacked:
            return self.reader.part(name, (rows,))
        if self.transposed:
            return self.reader.part(name, (expert, slice(None), rows)).T.contiguous()
        return self.reader.part(name, (expert, rows)).contiguous()

    def bias(self, layer: int, expert: int, role: Role) -> Tensor | None:
        """[out]; None where experts have none. Raises CheckpointError where it holds a NaN or infinity."""
        if not self.layout.bias:
            return None
        name, rows = self.layout.name(layer, expert, role) + self.layout.bias, self._outputs(role)
        return self.reader.part(name, (expert, rows) if self.layout.stacked else (rows,)).contiguous()

    def biases(self, layer: int, device: torch.device) -> Callable[[int], dict[Role, Tensor]]:
        """Of an expert of one layer, those that it has."""

        def of(expert: int) -> dict[Role, Tensor]:
            found = ((role, self.bias(layer, expert, role)) for role in self.shape.roles)
            return {role: bias.to(device) for role, bias in found if bias is not None}

        return of

    def _outputs(self, role: Role) -> slice:
        return self.layout.outputs(role, self.shape.projection(role)[0])

    def held(self, layer: int, device: torch.device) -> Callable[[int, Role], Tensor]:
        """`weight` of one layer from memory: all of it is read now."""
        found = {(e, role): self.weight(layer, e, role).to(device) for e in range(self.shape.num_experts)
                 for role in self.shape.roles}  # fmt: skip
        return lambda expert, role: found[expert, role]

    def fetched(self, layer: int, device: torch.device) -> Callable[[int, Role], Tensor]:
        """`weight` of one layer from disk, read each time."""
        return lambda expert, role: self.weight(layer, expert, role).to(device)


@dataclass(frozen=True)
class ExpertTensor:
    """A tensor of a layout: the matrices of these experts, which lie in a stack, or of one, which does not, or their
    biases. shape: [experts,] rows, in; transposed: [experts,] in, rows; of biases [experts,] rows."""

    layer: int
    experts: range
    roles: tuple[Role, ...]
    shape: tuple[int, ...]
    layout: Layout
    bias: bool = False

    @property
    def turned(self) -> tuple[int, ...]:
        """Its shape where matrices lie the other way round."""
        return self.shape if self.bias else (*self.shape[:-2], *self.shape[:-3:-1])

    def assemble(
        self,
        weight: Callable[[int, int, Role], Tensor],
        bias: Callable[[int, int, Role], Tensor | None],
        dtype: torch.dtype,
    ) -> Tensor:
        """Of (layer, expert, role) -> [out, in], or [out], rounded to `dtype`; one in memory beside the result."""
        tensor = torch.empty(self.shape, dtype=dtype)
        rows_first = tensor.mT if self.layout.transposed and not self.bias else tensor
        # Role by role: what the experts share is then read once.
        for role in self.roles:
            for expert in self.experts:
                found = (bias if self.bias else weight)(self.layer, expert, role)
                if found is None:
                    raise ValueError(f"layer {self.layer}, expert {expert}, {role}: no bias for a layout that has them")
                own = rows_first[expert] if self.layout.stacked else rows_first
                own[self.layout.outputs(role, len(found))] = found
        return tensor


def expert_tensors(shape: MoEShape, layout: Layout, layers: Iterable[int]) -> Iterator[tuple[str, ExpertTensor]]:
    """Every tensor that holds expert weights in this layout, or biases, by its name."""
    every = range(shape.num_experts)
    for layer in layers:
        for experts in (every,) if layout.stacked else (range(expert, expert + 1) for expert in every):
            held: dict[str, tuple[Role, ...]] = {}
            for role in shape.roles:
                name = layout.name(layer, experts[0], role)
                held[name] = (*held.get(name, ()), role)
            for name, roles in held.items():
                rows = sum(shape.projection(role)[0] for role in roles)
                matrix = (rows, shape.projection(roles[0])[1])
                matrix = matrix[::-1] if layout.transposed else matrix
                lead = (len(experts),) if layout.stacked else ()
                yield name, ExpertTensor(layer, experts, roles, (*lead, *matrix), layout)
                if layout.bias:
                    yield name + layout.bias, ExpertTensor(layer, experts, roles, (*lead, rows), layout, bias=True)


def find_experts(family: Family, shape: MoEShape, reader: SourceReader, layers: Iterable[int]) -> StoredExperts:
    """The expert weights of some layers.

    Raises InputError where one is missing, has another shape than config.json says, is of another dtype than
    the rest or of none that can be computed with, where layers have experts of different numbers, where experts have
    biases, or a tensor among them is strange.
    """
    layers, specs = tuple(layers), reader.specs
    layout = next((one for one in family.layouts if one.name(layers[0], 0, "up") in specs), family.layouts[0])
    _refuse_unequal(family, reader, layout, layers)
    expected: dict[str, ExpertTensor] = {}
    for name, tensor in expert_tensors(shape, layout, layers):
        if name not in specs:  # at once: absurd sizes in config.json must not fill the memory
            raise InputError(f"the source has no tensor {name}; {remedy(reader, name)}")
        expected[name] = tensor
    _refuse_strangers(family, reader, expected, layers)
    shapes = {name: specs[name].shape for name in expected}
    strange = [name for name, tensor in expected.items() if shapes[name] != tensor.shape]
    flipped = layout.stacked and bool(strange) and all(shapes[name] == one.turned for name, one in expected.items())
    if strange and not flipped:
        name = strange[0]
        raise InputError(
            f"{name} is {list(shapes[name])}, config.json says {list(expected[name].shape)}; wrong config.json?"
        )
    dtypes: dict[str, str] = {}
    for name in expected:
        dtypes.setdefault(specs[name].dtype, name)
    if len(dtypes) > 1:
        found = ", ".join(f"{dtype} ({name})" for dtype, name in dtypes.items())
        raise InputError(f"experts of several dtypes are not supported: {found}; save the model in one dtype")
    (dtype,) = dtypes
    if dtype not in ("BF16", "F16", "F32"):
        raise InputError(f"experts stored as {dtype} are not supported; save the model in bfloat16 first")
    transposed = layout.transposed != flipped
    return StoredExperts(reader, shape, layout, transposed, dtype, frozenset(expected))


def _refuse_unequal(family: Family, reader: SourceReader, layout: Layout, layers: Iterable[int]) -> None:
    """Raises InputError where layers have experts of different numbers, each of them from the first one on."""
    before, single, _ = layout.down.partition("{expert}")
    layer, number = r"(?P<layer>\d+)", r"(?P<expert>\d+)\."
    pattern = re.compile(re.escape(before).replace(re.escape("{layer}"), layer) + (number if single else "$"))
    found: dict[int, set[int]] = {number: set() for number in layers}
    for name, spec in reader.specs.items():
        if (match := pattern.match(name)) is not None and int(match["layer"]) in found and spec.shape:
            found[int(match["layer"])] |= {int(match["expert"])} if single else set(range(min(spec.shape[0], 100_000)))
    there = {layer: len(experts) for layer, experts in found.items() if experts == set(range(len(experts))) != set()}
    if len(set(there.values())) > 1:
        few, many = min(there, key=lambda one: there[one]), max(there, key=lambda one: there[one])
        raise InputError(
            f"{reader.folder.name}: layer {few} has {there[few]} experts and layer {many} {there[many]}: "
            f"{unequal(family.model_type)}, or download what is missing"
        )


def _refuse_strangers(family: Family, reader: SourceReader, known: Mapping[str, Any], layers: Iterable[int]) -> None:
    """Raises InputError for a tensor that lies among the experts but is no weight of theirs."""
    modules = (family.experts_path, family.experts)
    prefixes = tuple(module.replace("{layer}", str(layer)) + "." for layer in layers for module in modules)
    for name in reader.specs:
        if name in known or not name.startswith(prefixes) or not family.module_name(name).startswith(prefixes):
            continue  # transformers has it elsewhere, as Laguna's biases by which experts are chosen
        if name.endswith("bias"):
            raise InputError(f"{reader.folder.name}: experts with biases ({name}) are not supported; serve it as it is")
        raise InputError(f"{reader.folder.name}: expert tensor {name} does not fit config.json; wrong config.json?")
