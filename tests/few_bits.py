"""Checkpoints of few bits and unequal widths for tests, written without offline/ and without the package's own code: an
independent reading of the format, by strings of bits.

A synthetic checkpoint (synthetic.py) is cut to some channels of each expert and packed; what it stands for then is
handed back in float64.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from synthetic import NAMES, NO_BASE, PREFIX, Synthetic, write_checkpoint, write_files
from torch import Tensor

ZERO = {8: 128, 4: 8, 3: 3.5, 2: 1.5}
HIGHEST = {8: 255, 4: 15, 3: 7, 2: 3}
EXPERTS, CHANNELS, GROUPS = 8, 256, 8
BASE = {"base", "base_u", "base_v"}
DELTA = {"delta_u", "delta_v", "shared_v", "bases", "a", "dense"}

Storage = tuple[int, int]
"""Bits and group size."""


@dataclass(frozen=True)
class Few:
    """Of one layer: how base and deltas are packed, and how many channels each expert keeps, None for all."""

    base: Storage | None = None
    delta: Storage | None = None
    down_delta: Storage | None = None
    widths: tuple[int, ...] | None = None


DENSE = dict.fromkeys(NAMES, "dense")
NONE = {"rank": NO_BASE, "kept": NO_BASE, "used": NO_BASE}
UNEQUAL = (256, 100, 0, 37, 150, 200, 1, 128)
NARROW = (60, 30, 0, 37, 50, 20, 1, 28)
"""Of 256 channels; the narrow ones leave some to no expert, and so not to the base either."""

LAYERS = {
    # A base and dense deltas, unequal widths; one expert keeps nothing, one all.
    "based": ({**NONE, "full_base": tuple(NAMES), "delta": DENSE}, Few((4, 64), (2, 64), widths=NARROW)),
    # Plain rounding, bits differ between gate and up, and down.
    "plain": ({**NONE, "delta": DENSE}, Few(delta=(3, 32), down_delta=(4, 64), widths=UNEQUAL)),
    "columns": ({"trimmed": (1,), "special": {}}, Few((8, 64), (4, 32))),
    "low rank": (
        {"kept": NO_BASE, "used": NO_BASE, "base_rank": {"gate": 40, "up": 24, "down": 48},
         "delta": dict.fromkeys(NAMES, "columns")},
        Few((4, 32), (8, 64)),
    ),
    "shared": (
        {"rank": {"gate": 40, "up": 32, "down": 136}, "shared_v": tuple(NAMES), "trimmed": (0, 6),
         "distinct_u": {"gate": 3, "up": 3, "down": 5}},
        Few((2, 64), (8, 128)),
    ),
    "mobe": (
        {**NONE, "rank": {"gate": 40, "up": 24, "down": 0}, "bases": {"gate": 3, "up": 3},
         "delta": {"gate": "bases", "up": "bases", "down": "dense"}},
        Few(delta=(8, 64), down_delta=(4, 64)),
    ),
    # Not packed: widths and trimming alone; experts without deltas run on the base.
    "trimmed": ({**NONE, "full_base": tuple(NAMES), "delta": DENSE, "trimmed": (0, 5)}, Few(widths=NARROW)),
    "factors": ({"kept": NO_BASE, "used": NO_BASE}, Few(delta=(8, 64), widths=UNEQUAL)),
}  # fmt: skip
SETS = (("based", "plain", "columns", "low rank"), ("shared", "mobe", "trimmed", "factors"))


def write_few(
    folder: Path, names: tuple[str, ...], dtype: torch.dtype = torch.float32, **changes: Any
) -> dict[str, Tensor]:
    """Writes a checkpoint whose four layers are those of LAYERS; returns what it stands for, for dense_expert."""
    special = {number: LAYERS[name][0] for number, name in enumerate(names)}
    write_checkpoint(folder, Synthetic(special=special, dtype=dtype, **changes))
    config = json.loads((folder / "config.json").read_text())
    others = load_file(folder / "model-00001-of-00002.safetensors")
    stored = load_file(folder / "model-00002-of-00002.safetensors")
    meaning: dict[str, Tensor] = {}
    tensors: dict[str, Tensor] = {}
    for number, name in enumerate(names):
        few = LAYERS[name][1]
        entry = config["quantization_config"]["layers"][str(number)]
        own = {n: t for n, t in stored.items() if n.startswith(PREFIX.format(layer=number) + ".")}
        kept, base = None, None
        if few.widths is not None:
            kept = _channels(own, number, few.widths)
            has_base = any(".base" in name for name in own)
            base = torch.stack(kept).any(dim=0) if has_base else None
            entry["channels"] = {"experts": [_counts(one) for one in kept]}
            entry["channels"]["base"] = None if base is None else _counts(base)
        for role in NAMES:
            entry[role] |= _storages(few, role)
        for full, tensor in own.items():
            cut, whole = _packed(full, tensor, few, kept, base)
            tensors |= cut
            meaning[full] = whole
        for expert, mask in enumerate(kept or ()):
            tensors[f"{PREFIX.format(layer=number)}.{expert}.w2.channels"] = _bytes(mask.int(), 1)
            meaning[f"{PREFIX.format(layer=number)}.{expert}.kept"] = mask
        if base is not None:
            tensors[f"{PREFIX.format(layer=number)}.0.w2.base_channels"] = _bytes(base.int(), 1)
    norms = [name for name in tensors if name.endswith(".base_norms")]
    for name in norms:
        tensors[name] = meaning[name.removesuffix("_norms")].norm(dim=0).float()
    write_files(folder, config, others, tensors)
    return meaning


def _storages(few: Few, role: str) -> dict[str, Any]:
    delta = few.down_delta if role == "down" and few.down_delta else few.delta
    found = {"base_storage": few.base, "delta_storage": delta}
    return {name: {"type": f"int{how[0]}", "group_size": how[1]} for name, how in found.items() if how}


def _channels(tensors: dict[str, Tensor], layer: int, widths: tuple[int, ...]) -> list[Tensor]:
    """Those of the largest weights, which are elsewhere in every expert."""
    masks = []
    for expert, count in enumerate(widths):
        own = [t for n, t in tensors.items() if f".experts.{expert}.w1." in n and t.shape[:1] == (CHANNELS,)]
        scores = own[0].float().norm(dim=1) if own else torch.arange(CHANNELS, 0, -1).float()
        mask = torch.zeros(CHANNELS, dtype=torch.bool)
        mask[scores.argsort(descending=True)[:count]] = True
        masks.append(mask)
    return masks


def _counts(mask: Tensor) -> list[int]:
    return mask.view(GROUPS, -1).sum(dim=1).tolist()


def _packed(
    full: str, tensor: Tensor, few: Few, kept: list[Tensor] | None, base: Tensor | None
) -> tuple[dict[str, Tensor], Tensor]:
    """A tensor as it is stored, under its names, and what it stands for, in its old size."""
    *_, expert, projection, kind = full.split(".")
    part = "base" if kind in BASE else "delta" if kind in DELTA else None
    if part is None:
        return {full: tensor}, tensor
    down = projection == "w2"
    mask = None if kept is None else base if part == "base" else kept[int(expert)]
    axis = tensor.dim() - 1 if down else tensor.dim() - 2
    if mask is None or kind == ("delta_u" if down else "delta_v"):
        mask = torch.ones(tensor.shape[axis], dtype=torch.bool)
    cut = tensor.index_select(axis, mask.nonzero()[:, 0])
    how = few.base if part == "base" else few.down_delta if down and few.down_delta else few.delta
    if how is None:
        stored, value = {full: cut.contiguous()}, cut.double()
    else:
        codes, scales, value = encode(cut, *how)
        stored = {full: codes, f"{full}_scales": scales}
    whole = torch.zeros(tensor.shape, dtype=torch.float64).index_copy_(axis, mask.nonzero()[:, 0], value)
    return stored, whole


def encode(matrix: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes in bytes, scales and what both stand for in float64; every group by its largest magnitude."""
    if matrix.shape[-1] == 0:
        empty = (*matrix.shape[:-1], 0)
        return torch.zeros(empty, dtype=torch.uint8), torch.zeros(empty, dtype=torch.bfloat16), matrix.double()
    groups = matrix.double().split(group, dim=-1)
    top = HIGHEST[bits] - ZERO[bits]
    scales = [(one.abs().amax(dim=-1, keepdim=True) / top).bfloat16().double() for one in groups]
    codes = [
        (one / scale.clamp(min=1e-30) + ZERO[bits]).round().clamp(int(bits in (4, 8)), HIGHEST[bits])
        for one, scale in zip(groups, scales, strict=True)
    ]
    value = [(code - ZERO[bits]) * scale for code, scale in zip(codes, scales, strict=True)]
    return _bytes(torch.cat(codes, dim=-1).int(), bits), torch.cat(scales, dim=-1).bfloat16(), torch.cat(value, dim=-1)


def _bytes(codes: Tensor, bits: int) -> Tensor:
    """Each row as one long number whose lowest bits are the first code's, written out byte by byte."""
    width, rows = -(-codes.shape[-1] * bits // 8), []
    for row in codes.reshape(-1, codes.shape[-1]).tolist():
        number = sum(code << bits * place for place, code in enumerate(row))
        rows.append(list(number.to_bytes(width, "little")))
    return torch.tensor(rows, dtype=torch.uint8).view(*codes.shape[:-1], width)
