"""The tensors of an original checkpoint, read as plain matrices whatever layout and number format they lie in."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2moe_vllm.format.config import CheckpointError
from d2moe_vllm.format.kinds import ROLES, Role, TensorSpec
from offline.errors import InputError
from offline.io.shards import Reader
from offline.source.families import MoEShape
from offline.source.family import Family, Layout
from offline.source.missing import remedy

SCALE = "_scale_inv"
"""What an fp8 weight's name is followed by in its scales' name."""


def read_fp8_blocks(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns that share one scale in a config.json's fp8 weights; None for an unquantized model.

    Raises InputError for any other quantization.
    """
    quantization = config.get("quantization_config")
    if not quantization:
        return None
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if method != "fp8":
        raise InputError(f"already compressed or quantized ({method}); give the original model")
    block = quantization.get("weight_block_size")
    if (
        not isinstance(block, list)
        or len(block) != 2
        or not all(isinstance(size, int) and 1 <= size <= 65536 for size in block)
    ):
        raise InputError(f"quantized to fp8 with weight_block_size {block!r}, not two numbers; give the original model")
    return block[0], block[1]


class SourceReader(Reader):
    """A checkpoint's files with fp8 weights dequantised to bfloat16 while reading, as in DeepSeek-V3.

    An fp8 weight is [..., rows, columns] float8_e4m3fn; its scales, by the same name and SCALE, are
    [..., ceil(rows/block), ceil(columns/block)]: weight = fp8 * scale of its block, computed in float32.
    specs are those of the dequantised weights, without any scales. ours: tensors of a compressed checkpoint, which
    stay as they are stored. Raises CheckpointError.
    """

    def __init__(
        self, folder: Path, fp8_blocks: tuple[int, int] | None = None, ours: Collection[str] = frozenset()
    ) -> None:
        super().__init__(folder)
        self._blocks = fp8_blocks
        self._scales: dict[str, str] = {}
        for name, spec in list(self.specs.items()):
            if spec.dtype == "F8_E4M3" and fp8_blocks is not None:
                self._scales[name] = self._check_scale(name, spec, fp8_blocks)
                self.specs[name] = TensorSpec("BF16", spec.shape)
            elif spec.dtype.startswith("F8_") and not name.endswith(SCALE) and name not in ours:
                raise CheckpointError(f"{folder}: {name} is stored as {spec.dtype}; give the model in bfloat16")
        for name in self._scales.values():
            del self.specs[name]

    def _check_scale(self, name: str, spec: TensorSpec, blocks: tuple[int, int]) -> str:
        scale = self.specs.get(name + SCALE)
        if scale is None:
            raise CheckpointError(f"{self.folder}: no scales {name}{SCALE} for an fp8 weight; download it again")
        *stack, rows, columns = spec.shape if len(spec.shape) > 1 else (1, *spec.shape)
        expected = (*stack, -(-rows // blocks[0]), -(-columns // blocks[1]))
        if scale.shape != expected:
            raise CheckpointError(f"{self.folder}: {name}{SCALE} is {list(scale.shape)}, expected {list(expected)}")
        return name + SCALE

    def tensor(self, name: str) -> Tensor:
        """One tensor, dequantised where it is fp8. Raises CheckpointError where the file is damaged."""
        stored = super().tensor(name)
        return self._dequantise(stored, super().tensor(self._scales[name])) if name in self._scales else stored

    def part(self, name: str, where: tuple[int | slice, ...]) -> Tensor:
        """tensor(name)[where] without reading the rest; `where` starts with a number only in a stack of matrices.

        Raises CheckpointError where it holds a NaN or infinity.
        """
        stored = super().tensor(name)
        if name in self._scales:
            stack = where[:1] if isinstance(where[0], int) else (slice(None),)
            matrix = self._dequantise(stored[stack], super().tensor(self._scales[name])[stack])
            part = matrix[where[1:] if isinstance(where[0], int) else where]
        else:
            part = stored[where]
        if not torch.isfinite(part).all():
            path = self.folder / self.weight_map[name]
            raise CheckpointError(f"{path}: {name} holds NaN or infinite values; download the file again")
        return part

    def _dequantise(self, weight: Tensor, scale: Tensor) -> Tensor:
        assert self._blocks is not None
        wide = scale.float()
        for dim, block in ((-2, self._blocks[0]), (-1, self._blocks[1])):
            wide = wide.repeat_interleave(block, dim).narrow(dim, 0, weight.shape[dim])
        return wide.mul_(weight.float()).to(torch.bfloat16)


@dataclass(frozen=True)
class StoredExperts:
    """Where a checkpoint's dense expert weights lie, and how to read one.

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
        rows = slice(None)
        if self.layout.fused and role != "down":
            size = self.shape.intermediate_size
            rows = slice(0, size) if role == "gate" else slice(size, 2 * size)
        name = self.layout.name(layer, expert, role)
        if not self.layout.stacked:
            return self.reader.part(name, (rows,))
        if self.transposed:
            return self.reader.part(name, (expert, slice(None), rows)).T.contiguous()
        return self.reader.part(name, (expert, rows))

    def held(self, layer: int, device: torch.device) -> Callable[[int, Role], Tensor]:
        """`weight` of one layer from memory: all of it is read now."""
        found = {(e, role): self.weight(layer, e, role).to(device) for e in range(self.shape.num_experts)
                 for role in ROLES}  # fmt: skip
        return lambda expert, role: found[expert, role]

    def fetched(self, layer: int, device: torch.device) -> Callable[[int, Role], Tensor]:
        """`weight` of one layer from disk, read each time."""
        return lambda expert, role: self.weight(layer, expert, role).to(device)


@dataclass(frozen=True)
class ExpertTensor:
    """A tensor of a layout: the matrices of these experts, which lie in a stack, or of one, which does not; the output
    rows of the first role first. shape: [experts,] rows, in; transposed: [experts,] in, rows."""

    layer: int
    experts: range
    roles: tuple[Role, ...]
    shape: tuple[int, ...]
    transposed: bool

    def assemble(self, weight: Callable[[int, int, Role], Tensor], dtype: torch.dtype) -> Tensor:
        """Of (layer, expert, role) -> [out, in], rounded to `dtype`; one matrix in memory beside the result."""
        tensor, row = torch.empty(self.shape, dtype=dtype), 0
        rows_first = tensor.mT if self.transposed else tensor
        # Role by role: what the experts share is then read once.
        for role in self.roles:
            for expert in self.experts:
                matrix = weight(self.layer, expert, role)
                (rows_first[expert] if len(self.shape) == 3 else rows_first)[row : row + len(matrix)] = matrix
            row += len(matrix)
        return tensor


def expert_tensors(shape: MoEShape, layout: Layout, layers: Iterable[int]) -> Iterator[tuple[str, ExpertTensor]]:
    """Every tensor that holds expert weights in this layout, by its name."""
    every = range(shape.num_experts)
    for layer in layers:
        for experts in (every,) if layout.stacked else (range(expert, expert + 1) for expert in every):
            held: dict[str, tuple[Role, ...]] = {}
            for role in ROLES:
                name = layout.name(layer, experts[0], role)
                held[name] = (*held.get(name, ()), role)
            for name, roles in held.items():
                matrix = (sum(shape.projection(role)[0] for role in roles), shape.projection(roles[0])[1])
                matrix = matrix[::-1] if layout.transposed else matrix
                size = (len(experts), *matrix) if layout.stacked else matrix
                yield name, ExpertTensor(layer, experts, roles, size, layout.transposed)


def find_experts(family: Family, shape: MoEShape, reader: SourceReader, layers: Iterable[int]) -> StoredExperts:
    """The expert weights of some layers.

    Raises InputError where one is missing, has another shape than config.json says, is of another dtype than
    the rest or of none that can be computed with, where experts have biases, or a tensor among them is strange.
    """
    layers, specs = tuple(layers), reader.specs
    layout = next((one for one in family.layouts if one.name(layers[0], 0, "gate") in specs), family.layouts[0])
    expected: dict[str, tuple[int, ...]] = {}
    for name, tensor in expert_tensors(shape, layout, layers):
        if name not in specs:  # at once: absurd sizes in config.json must not fill the memory
            raise InputError(f"the source has no tensor {name}; {remedy(reader, name)}")
        expected[name] = tensor.shape
    _refuse_strangers(family, reader, expected, layers)
    shapes = {name: specs[name].shape for name in expected}
    flipped = False
    if layout.stacked and shapes != expected:
        flipped = shapes == {name: (count, last, second) for name, (count, second, last) in expected.items()}
    for name, size in expected.items():
        if shapes[name] != size and not flipped:
            raise InputError(f"{name} is {list(shapes[name])}, config.json says {list(size)}; wrong config.json?")
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


def _refuse_strangers(family: Family, reader: SourceReader, known: Mapping[str, Any], layers: Iterable[int]) -> None:
    """Raises InputError for a tensor that lies among the experts but is no weight of theirs."""
    modules = (family.experts_path, family.experts)
    prefixes = tuple(module.replace("{layer}", str(layer)) + "." for layer in layers for module in modules)
    for name in reader.specs:
        if name in known or not name.startswith(prefixes):
            continue
        if name.endswith("bias"):
            raise InputError(f"{reader.folder.name}: experts with biases ({name}) are not supported; serve it as it is")
        raise InputError(f"{reader.folder.name}: expert tensor {name} does not fit config.json; wrong config.json?")
