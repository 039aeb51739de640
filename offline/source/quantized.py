"""The number formats in which models are published besides plain floats, and what a stored weight stands for.

A quantized weight is a code for each number and a scale for each block of them:

    weight[r, c] = (code[r, c] - zero[block of r, c]) * scale[block of r, c]   (times, or over, one scale of the matrix)

A `Scheme` says how these lie on disk. Which of a checkpoint's weights are quantized its tensors tell: lists of
exceptions in config.json do not name everything that was left out. The product is computed in float32 and rounded to 16
bits once, which for integers, and for scales that are powers of two, is the number nearest to the exact one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from d2moe_vllm.format.config import QUANT_METHOD, CheckpointError
from d2moe_vllm.format.kinds import TensorSpec
from offline.errors import InputError

MODELOPT_FILE = "hf_quant_config.json"
"""Where older checkpoints of ModelOpt say what their config.json does not."""
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""By the lower three bits of a 4-bit float; the fourth is its sign (OCP Microscaling Formats 1.0, 5.3.3)."""
E8M0_BIAS = 127
"""A scale in one byte is 2 ** (byte - 127) (OCP Microscaling Formats 1.0, 5.4.1)."""
WHOLE = 0
"""As a block's height or width: all of the matrix."""
FLOATS = ("F32", "BF16", "F16")

Parts = Mapping[str, Tensor]
"""A weight's tensors by what its name is followed by in theirs."""


@dataclass(frozen=True)
class Scheme:
    """How weights of one kind lie on disk, each in several tensors, whose names are the weight's with something added.

    what: their numbers, for messages; dtype: safetensors' name of what codes are stored in; decode: of these codes,
    [..., rows, n] -> float32 [..., rows, n * numbers]; codes, scale: what is added to the weight's name; scales: dtypes
    that scales may have; block: rows and columns that share one; second: what is added for a scale of the matrix,
    which divides or multiplies the others; zero: for the codes that stand for 0, if it is not code 0, by block, packed
    like codes but down a column; order: for the block of each column, if blocks are not in order of columns: this one
    need not be there; shape: for rows and columns, of which padding is no part; named: how names of weights end;
    blocked: whether codes have a dimension for blocks, [..., rows, blocks, n of each].
    """

    what: str
    dtype: str
    decode: Callable[[Tensor], Tensor]
    numbers: int = 1
    codes: str = ""
    scale: str = "_scale"
    scales: tuple[str, ...] = FLOATS
    block: tuple[int, int] = (WHOLE, WHOLE)
    second: str | None = None
    divides: bool = False
    zero: str | None = None
    order: str | None = None
    shape: str | None = None
    named: str = "weight"
    blocked: bool = False

    def weight_of(self, name: str, spec: TensorSpec) -> str | None:
        """The weight whose codes a tensor may be."""
        if spec.dtype != self.dtype or len(spec.shape) < 1:
            return None
        if self.codes:
            return name.removesuffix(self.codes) if name.endswith(self.named + self.codes) else None
        return None if name.endswith(("_scale", "_scale_inv", "_zero_point")) else name

    def find(self, weight: str, specs: Mapping[str, TensorSpec]) -> Quantized | str:
        """A weight whose codes are there, or what is wrong with it."""
        stored_shape = specs[weight + self.codes].shape
        if self.blocked:
            if len(stored_shape) < 3:
                return f"{weight}{self.codes} is {list(stored_shape)}, expected rows of blocks"
            stored_shape = (*stored_shape[:-2], stored_shape[-2] * stored_shape[-1])
        *stack, rows, stored = stored_shape if len(stored_shape) > 1 else (1, *stored_shape)
        scales = specs.get(weight + self.scale)
        if scales is None:
            return f"no scales {weight}{self.scale} for a weight in {self.what}"
        height, width = self.block
        columns = stored * self.numbers
        if self.shape and width and scales.shape:  # what fills the last element up is no part of the matrix
            columns = min(columns, scales.shape[-1] * width)
        if -(-columns // self.numbers) != stored:
            return f"{weight}{self.scale} is {list(scales.shape)}, too few for {stored * self.numbers} columns"
        high, wide = (-(-size // side) if side else 1 for size, side in ((rows, height), (columns, width)))
        allowed: list[tuple[int, ...]] = [(*stack, high, wide)]
        if wide == 1:
            allowed += [(*stack, high)] if high > 1 else [tuple(stack), (*stack, 1)]
        if scales.shape not in allowed:
            return f"{weight}{self.scale} is {list(scales.shape)}, expected {list(allowed[0])}"
        if scales.dtype not in self.scales:
            return f"{weight}{self.scale} is stored as {scales.dtype}, expected {' or '.join(self.scales)}"
        needed = (self.second, self.zero, self.shape)
        if lacking := [added for added in needed if added and weight + added not in specs]:
            return f"no {weight}{lacking[0]} for a weight in {self.what}"
        further = (added for added in (*needed, self.order) if added and weight + added in specs)
        parts = (self.codes, self.scale, *further)
        return Quantized(weight, self, (*stored_shape[:-1], columns), parts)

    def dequantise(self, parts: Parts, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A weight of this shape, [..., rows, columns] or [columns], in `dtype`. Raises ValueError."""
        *stack, rows, columns = shape if len(shape) > 1 else (1, *shape)
        if self.shape and parts[self.shape].tolist() != [rows, columns]:
            raise ValueError(f"is {parts[self.shape].tolist()} by its own word, not {[rows, columns]}")
        order = parts.get(self.order) if self.order else None
        if order is not None and bool((order < 0).any()):  # llm-compressor's sign for none
            order = None

        def spread(values: Tensor) -> Tensor:
            """What blocks have over their rows and columns."""
            height, width = self.block
            values = values.reshape(*stack, -1, values.shape[-1] if width and values.dim() > 1 else 1)
            if height > 1:
                values = values.repeat_interleave(height, -2).narrow(-2, 0, rows)
            if order is not None:
                return values.index_select(-1, order.long())
            return values.repeat_interleave(width, -1).narrow(-1, 0, columns) if width > 1 else values

        codes = parts[self.codes]
        values = self.decode(codes.flatten(-2) if self.blocked else codes)[..., :columns]
        if self.zero is not None:
            zero = parts[self.zero]
            values = values - spread(self.decode(zero.T.contiguous()).T[:rows] if self.numbers > 1 else zero.float())
        scale = parts[self.scale]
        scale = torch.exp2(scale.float() - E8M0_BIAS) if scale.dtype == torch.uint8 else scale.float()
        if self.second is not None:
            second = parts[self.second].float().reshape(*stack, *(1,) * (scale.dim() - len(stack)))
            scale = scale / second if self.divides else scale * second
        return (values * spread(scale)).to(dtype).reshape(shape)


@dataclass(frozen=True)
class Quantized:
    """A weight that is stored by a scheme; shape: of what it stands for; parts: what is added in its tensors' names."""

    name: str
    scheme: Scheme
    shape: tuple[int, ...]
    parts: tuple[str, ...]

    @property
    def tensors(self) -> tuple[str, ...]:
        return tuple(self.name + part for part in self.parts)

    @property
    def meaning(self) -> tuple[object, ...]:
        """What its numbers depend on: of one row, a scale for each row is one for all."""
        sides = zip(self.scheme.block, (1, *self.shape)[-2:], strict=True)
        return self.scheme.what, self.parts, tuple(min(side, size) if side else size for side, size in sides)

    def dequantise(self, read: Callable[[str], Tensor], dtype: torch.dtype, at: int | None = None) -> Tensor:
        """read: a tensor by its name; at: which matrix of a stack, None for all that there is. Raises CheckpointError
        where the parts do not go together."""
        shape = self.shape if at is None else self.shape[1:]
        parts = {part: read(self.name + part) for part in self.parts}
        try:
            return self.scheme.dequantise(
                {part: tensor if at is None else tensor[at] for part, tensor in parts.items()}, shape, dtype
            )
        except ValueError as error:
            raise CheckpointError(f"{self.name} {error}; download it again") from None


def find_quantized(specs: Mapping[str, TensorSpec], schemes: tuple[Scheme, ...]) -> Iterator[Quantized]:
    """The quantized weights among a checkpoint's tensors. Raises CheckpointError for one whose parts do not fit."""
    for name, spec in specs.items():
        found = [
            scheme.find(weight, specs) for scheme in schemes if (weight := scheme.weight_of(name, spec)) is not None
        ]
        fitting = [one for one in found if isinstance(one, Quantized)]
        if len({one.meaning for one in fitting}) > 1:
            told = " or ".join(one.scheme.what for one in fitting)
            raise CheckpointError(f"{name} may be {told}, by config.json; give the original model")
        if found and not fitting:
            raise CheckpointError(f"{found[0]}; download it again")
        yield from fitting[:1]


def beside(name: str) -> tuple[str, ...]:
    """What may lie with a quantized weight and concerns activations alone."""
    module = name.removesuffix("weight")
    return tuple(module + added for added in ("input_scale", "input_zero_point", "input_global_scale"))


def _float(codes: Tensor) -> Tensor:
    return codes.float()


def _four_bit_floats(codes: Tensor) -> Tensor:
    """uint8 [..., n], the lower half first -> [..., 2 n]."""
    values = torch.tensor([*E2M1, *(-value for value in E2M1)])
    return values[torch.stack((codes & 15, codes >> 4), dim=-1).long().flatten(-2)]


def _integers(bits: int) -> Callable[[Tensor], Tensor]:
    """int32 [..., n], as many of `bits` in each as there is room for, the lowest first, an offset added that makes
    them positive -> [..., n * (32 // bits)]."""

    def decode(codes: Tensor) -> Tensor:
        shifts = torch.arange(32 // bits, dtype=torch.int32) * bits
        values = (codes[..., None] >> shifts) & ((1 << bits) - 1)
        return (values - (1 << (bits - 1))).flatten(-2).float()

    return decode


# What config.json says


def read_schemes(folder: Path, config: Mapping[str, Any]) -> tuple[Scheme, ...]:
    """How a model's weights may be stored besides plain floats, by its config.json; () for one that is not quantized.

    Raises InputError, without the model's name in front, for what is not read.
    """
    quantization = config.get("quantization_config") or _beside_config(folder)
    if not quantization:
        return ()
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if method == QUANT_METHOD:
        raise InputError("already compressed by d2moe; give the original model")
    reader = METHODS.get(str(method))
    if reader is None or not isinstance(quantization, dict):
        raise InputError(
            f"already compressed or quantized ({method}), and only {', '.join(METHODS)} are read; give the original"
        )
    return reader(quantization)


def _beside_config(folder: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((folder / MODELOPT_FILE).read_text(encoding="utf-8"))["quantization"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return {"quant_method": "modelopt", **found} if isinstance(found, dict) else None


def _size(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 65536 else None


def _fp8(quantization: Mapping[str, Any]) -> tuple[Scheme, ...]:
    """DeepSeek-V3's blocks; without any, one scale for each matrix or each of its rows (AutoFP8's and others')."""
    what = "fp8"
    block = quantization.get("weight_block_size")
    if block is None:
        return tuple(Scheme(what, "F8_E4M3", _float, block=(height, WHOLE)) for height in (WHOLE, 1))
    sizes = [_size(side) for side in block] if isinstance(block, list) else []
    if len(sizes) != 2 or sizes[0] is None or sizes[1] is None:
        raise InputError(f"quantized to fp8 with weight_block_size {block!r}, not two numbers; give the original model")
    return (Scheme(what, "F8_E4M3", _float, scale="_scale_inv", block=(sizes[0], sizes[1])),)


def _compressed_tensors(quantization: Mapping[str, Any]) -> tuple[Scheme, ...]:
    groups = quantization.get("config_groups")
    sparsity = (quantization.get("sparsity_config") or {}).get("format", "dense")
    if sparsity != "dense":
        raise InputError(f"stored by compressed-tensors as {sparsity}, which is not read; give the original model")
    found: dict[Scheme, None] = {}
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights")
        if weights:
            found[_compressed_group(str(group.get("format") or quantization.get("format")), weights)] = None
    if not found:
        raise InputError("quantized by compressed-tensors without config_groups; wrong config.json?")
    return tuple(found)


def _compressed_group(form: str, weights: Mapping[str, Any]) -> Scheme:
    bits, kind, strategy = (weights.get(key) for key in ("num_bits", "type", "strategy"))
    block = _block(strategy, weights)
    zero = None if weights.get("symmetric", True) else "_zero_point"
    if (
        form == "pack-quantized"
        and kind == "int"
        and isinstance(bits, int)
        and 2 <= bits <= 8
        and block
        and block[0] == 1
    ):
        return Scheme(
            f"{bits}-bit integers", "I32", _integers(bits), 32 // bits, "_packed", block=block, zero=zero,
            order="_g_idx", shape="_shape",
        )  # fmt: skip
    if form in ("naive-quantized", "float-quantized", "int-quantized") and bits == 8 and block:
        if kind == "float":
            return Scheme("fp8", "F8_E4M3", _float, block=block)
        return Scheme("8-bit integers", "I8", _float, block=block, zero=zero)
    if form == "nvfp4-pack-quantized" and block and zero is None:
        return Scheme(
            "nvfp4", "U8", _four_bit_floats, 2, "_packed", scales=("F8_E4M3",), block=block, second="_global_scale",
            divides=True,
        )  # fmt: skip
    if form == "mxfp4-pack-quantized" and block and zero is None:
        return Scheme("mxfp4", "U8", _four_bit_floats, 2, "_packed", scales=("U8", "F8_E8M0"), block=block)
    if form == "mxfp8-quantized" and block and zero is None:
        return Scheme("mxfp8", "F8_E4M3", _float, scales=("U8", "F8_E8M0"), block=block)
    told = f"{form}, {kind} of {bits} bits by {strategy}"
    raise InputError(f"stored by compressed-tensors as {told}, which is not read; give the original model")


def _block(strategy: object, weights: Mapping[str, Any]) -> tuple[int, int] | None:
    if strategy == "tensor":
        return WHOLE, WHOLE
    if strategy == "channel" or weights.get("group_size") == -1:
        return 1, WHOLE
    if strategy in ("group", "tensor_group") and (size := _size(weights.get("group_size"))):
        return 1, size
    structure = weights.get("block_structure")
    if strategy == "block" and isinstance(structure, list) and len(structure) == 2:
        height, width = (_size(side) for side in structure)
        return (height, width) if height and width else None
    return None


def _modelopt(quantization: Mapping[str, Any]) -> tuple[Scheme, ...]:
    algorithm = str(quantization.get("quant_algo")).upper()
    size = _size(quantization.get("group_size") or 16)
    nvfp4 = Scheme("nvfp4", "U8", _four_bit_floats, 2, scales=("F8_E4M3",), block=(1, size or 16), second="_scale_2")
    known = {"NVFP4": (nvfp4,), "FP8": _fp8({})}
    if algorithm not in known or size is None:
        raise InputError(
            f"quantized by ModelOpt as {algorithm}, and only {' and '.join(known)} are read; give the original model"
        )
    return known[algorithm]


def _mxfp4(quantization: Mapping[str, Any]) -> tuple[Scheme, ...]:
    """gpt-oss's stacks of experts."""
    return (
        Scheme(
            "mxfp4", "U8", _four_bit_floats, 2, "_blocks", "_scales", ("U8", "F8_E8M0"), (1, 32), named="_proj",
            blocked=True,
        ),
    )  # fmt: skip


METHODS: Mapping[str, Callable[[Mapping[str, Any]], tuple[Scheme, ...]]] = MappingProxyType(
    {"fp8": _fp8, "compressed-tensors": _compressed_tensors, "modelopt": _modelopt, "mxfp4": _mxfp4}
)
"""By config.json's `quant_method`."""
