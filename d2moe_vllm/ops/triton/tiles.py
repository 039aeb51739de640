"""Tile sizes by kernel, number of rows and device: a table that is looked up, nothing is tried out while serving.

What `d2moe tune` wrote for the device (`user_folder`), for kernels that it does not name tables/<device>.json, then
tables/default.json: {kernel: {rows: Tile's fields}}, rows powers of two. A kernel's rows are tokens; those of the
kernels in GROUPED are the pairs that an expert gets on average. They share one block_m, that of the first of them: rows
are sorted once. Values are for 16-bit types; see `tile` for float32.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch

TABLES = Path(__file__).with_name("tables")
FEW = "_few"
"""Ends the names of kernels whose weights are codes of few bits: they read less, and work more on it."""
GROUPED = (
    "shrink", "shrink_mixed", "expand_gate_up", "expand_down", "expand_columns",
    "shrink_few", "shrink_mixed_few", "expand_gate_up_few", "expand_down_few", "expand_columns_few",
)  # fmt: skip
TABLE_KERNELS = ("base", "base_few", *GROUPED, "mix", "combine", "gather")
INVARIANT_ROWS = 16
"""Where a row's bits may not depend on other rows, their number must not choose the tile: this one does."""
MAX_SPLITS = 8
SLOTS = 16
"""Pieces of blocks that one program of mixing.mixed_product works on, each with its own expert's V: as many rows as a
tensor core's product has at least, as the mix is one, of alphas [SLOTS, m] with bases [m, tile of V]."""
SLOT_ROWS = 32
"""Most rows of such a piece."""
MIXED_AT_ONCE = 32
"""Most bases that it reads at once; see `mixed_at_once`."""


@dataclass(frozen=True)
class Tile:
    """A program's output rows, columns and the step of its inputs; warps; stages of the software pipeline."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def user_folder() -> Path:
    """Where `d2moe tune` writes, beside what the CPU backend compiles."""
    return Path(os.path.expanduser(os.environ.get("D2MOE_CACHE") or "~/.cache/d2moe")) / "tiles"


def file_name(device_name: str) -> str:
    """A device's name as that of a file, with "_" for spaces."""
    return f"{device_name.replace(' ', '_').replace('/', '_')}.json"


@lru_cache
def table(device_name: str) -> dict[str, dict[int, Tile]]:
    """{kernel: {rows: Tile}}, rows ascending. Raises ValueError, in one line, for a file that is no table."""
    found = _read(TABLES / "default.json")
    for folder in (TABLES, user_folder()):
        if (own := folder / file_name(device_name)).exists():
            found = {**found, **_read(own)}
    return found


def _read(path: Path) -> dict[str, dict[int, Tile]]:
    try:
        content = json.loads(path.read_text())
        unknown = set(content) - set(TABLE_KERNELS)
        entries = {
            kernel: {int(rows): Tile(**entry) for rows, entry in sorted(by_rows.items(), key=lambda item: int(item[0]))}
            for kernel, by_rows in content.items()
        }
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no table of tiles ({error}); run `d2moe tune` again or delete it") from None
    if unknown or not all(entries.values()):
        empty = ", ".join(sorted(unknown)) or "a kernel without entries"
        raise ValueError(f"{path} is no table of tiles (it has {empty}); run `d2moe tune` again or delete it")
    return entries


_forced: Mapping[str, Mapping[int, Tile]] = {}


@contextmanager
def using(entries: Mapping[str, Mapping[int, Tile]]) -> Iterator[None]:
    """Puts the entries of these kernels in the place of a device's while it is entered: for tuning."""
    global _forced
    before, _forced = _forced, entries
    tile.cache_clear()
    try:
        yield
    finally:
        _forced = before
        tile.cache_clear()


@lru_cache(maxsize=4096)
def tile(kernel: str, rows: int, dtype: torch.dtype, device_name: str) -> Tile:
    """The entry with the most rows that are not more than `rows`, this rounded up to a power of two.

    float32 takes twice the shared memory and is multiplied without tensor cores: a quarter of the inputs at a time, and
    blocks of at most 64 x 64; of 32 x 32 where gate and up are expanded together by few warps, and of 8 columns, by
    eight warps, where V is mixed from bases, two steps at a time where these are packed: more do not fit into the
    registers.
    """
    bucket = 1 << max(rows - 1, 0).bit_length()
    found = _at(_entries(kernel, device_name), bucket)
    if kernel in GROUPED:
        found = replace(found, block_m=_at(_entries(GROUPED[0], device_name), bucket).block_m)
    return for_dtype(kernel, found, dtype)


def for_dtype(kernel: str, found: Tile, dtype: torch.dtype) -> Tile:
    """A table's entry as it is used for dtype."""
    if dtype != torch.float32 or found.block_k == 1:
        return found
    columns, warps = (8, 8) if kernel.startswith("shrink_mixed") else (64, found.num_warps)
    if kernel.startswith("expand_gate_up") and found.block_m == 32:
        columns = 32
    # Codes are widened by whole units.
    least = 32 if kernel.endswith(FEW) else 16
    stages = 2 if kernel == "shrink_mixed_few" else found.num_stages
    return Tile(min(found.block_m, 64), min(found.block_n, columns), max(found.block_k // 4, least), warps, stages)


def mixed_at_once(dtype: torch.dtype, packed: bool) -> int:
    """The most bases that one program mixes at once: twice as many of float32, whose tiles are smaller; half as many of
    float32 that are packed, whose tiles are whole units, and which lie in registers while they are widened."""
    if dtype != torch.float32:
        return MIXED_AT_ONCE
    return MIXED_AT_ONCE // 2 if packed else 2 * MIXED_AT_ONCE


def _entries(kernel: str, device_name: str) -> Mapping[int, Tile]:
    return _forced[kernel] if kernel in _forced else table(device_name)[kernel]


def _at(entries: Mapping[int, Tile], bucket: int) -> Tile:
    fitting = [rows for rows in entries if rows <= bucket]
    return entries[max(fitting) if fitting else min(entries)]


@lru_cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU. A CPU, where kernels are interpreted: enough that small layers are split, too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 16


@lru_cache
def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "default"


def splits(programs: int, depth: int, block_k: int, device: torch.device) -> int:
    """Into how many partial sums to split sums over `depth` inputs, a power of two, where there are `programs` without.

    Two programs per multiprocessor keep its memory busy; each should have four steps left. Only shapes decide.
    """
    wanted = min(2 * processors(device) // max(programs, 1), -(-depth // (4 * block_k)), MAX_SPLITS)
    return 1 << max(wanted, 1).bit_length() - 1
