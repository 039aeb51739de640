"""Searches the fastest tiles for a device (`d2moe tune`): one kernel's after the other's, timing a whole layer.

A whole layer, because a tile decides more than its own kernel's time: into how many parts sums are split, and how the
pairs of tokens and experts are padded.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from d2moe_vllm.format.config import CheckpointConfig
from d2moe_vllm.ops.triton import tiles
from d2moe_vllm.ops.triton.tiles import Tile

TOKENS = (1, 16, 64, 256, 1024, 4096)
"""Numbers of tokens that are tuned for."""
PLAIN = ("mix", "combine", "gather")
"""Kernels without a matrix product."""
ACCUMULATORS = 128
"""Of a thread; with more, registers spill."""

Table = dict[str, dict[int, Tile]]


class Steps(Protocol):
    """offline.io.progress.Steps."""

    def label(self, text: str) -> None: ...
    def advance(self, work: float) -> None: ...


class Timing(NamedTuple):
    """Milliseconds of a layer with the tiles that were in force, and with those found."""

    tokens: int
    before_ms: float
    after_ms: float


def tunable(tokens: int, top_k: int, num_experts: int) -> dict[str, int]:
    """Each kernel's entry of the table, its number of rows, for a batch of so many tokens."""
    pairs = -(-tokens * top_k // num_experts)
    return {
        kernel: 1 << max((pairs if kernel in tiles.GROUPED else tokens) - 1, 0).bit_length()
        for kernel in tiles.TABLE_KERNELS
    }


def candidates(kernel: str, rows: int, block_m: int | None, shared_limit: int) -> list[Tile]:
    """Tiles worth timing, without those that would not fit. block_m: given by another kernel, or None.

    shared_limit: bytes of shared memory that a block may have. Weights of two bytes.
    """
    if kernel in PLAIN:
        return [Tile(m, n, 1, 4, 1) for m in (1, 2, 4, 8) if m <= rows for n in (256, 512, 1024)]
    blocks_m = (block_m,) if block_m else [m for m in (16, 32, 64, 128) if max(rows // 4, 16) <= m <= max(2 * rows, 16)]
    columns, inputs = [32, 64, 128], [32, 64, 128]
    if kernel.startswith("shrink_mixed"):
        # Codes are widened by whole units of 32 inputs.
        columns, inputs = [8, 16, 32], [32, 64] if kernel.endswith(tiles.FEW) else [16, 32, 64]
    found = []
    for m, n, k in itertools.product(blocks_m or [128], columns, inputs):
        accumulators, values = _footprint(kernel, m, n, k)
        for warps, stages in itertools.product((4, 8), (2, 3, 4, 5)):
            fits = stages * values * 2 <= shared_limit and accumulators <= ACCUMULATORS * 32 * warps
            if fits and (warps == 4 or accumulators >= 4096):
                found.append(Tile(m, n, k, warps, stages))
    return found


def _footprint(kernel: str, m: int, n: int, k: int) -> tuple[int, int]:
    """(sums, values that are read in one step) of a program with such a tile."""
    if kernel.startswith("shrink_mixed"):
        rows = tiles.SLOTS * min(m, tiles.SLOT_ROWS)
        return rows * n + tiles.SLOTS * n * k, (rows + tiles.MIXED_AT_ONCE * n) * k
    # Gate and up are two sums.
    return m * n * (2 if kernel.startswith("expand_gate_up") else 1), (m + n) * k


def search(
    measure: Callable[[int, Table], float],
    kernels: Callable[[int], Collection[str]],
    tokens: Sequence[int],
    *,
    top_k: int,
    num_experts: int,
    start: Callable[[str, int], Tile],
    shared_limit: int,
    steps: Steps,
) -> tuple[Table, list[Timing]]:
    """The fastest table for these numbers of tokens, and what it gains.

    measure(tokens, table): milliseconds of a layer; infinite where it cannot run so. kernels(tokens): those that it
    launches, the only ones to be in the table. start(kernel, rows): what to begin with. A candidate has to be faster
    than what it replaces. Raises RuntimeError where not even that runs.
    """
    table: Table = {}
    timings = []
    for count in sorted(tokens):
        rows = tunable(count, top_k, num_experts)
        launched = kernels(count)
        fresh = [k for k in tiles.TABLE_KERNELS if k in launched and rows[k] not in table.get(k, {})]
        for kernel in fresh:
            table[kernel] = {**table.get(kernel, {}), rows[kernel]: start(kernel, rows[kernel])}
        best = before = measure(count, table)
        if not math.isfinite(best):
            raise RuntimeError(f"the layer does not run with {count} tokens and the tiles to begin with")
        for kernel in fresh:
            # Pairs are sorted once, into blocks of the first grouped kernel's block_m.
            first = tiles.GROUPED[0]
            shared = table[first][rows[first]].block_m if kernel in tiles.GROUPED[1:] else None
            choices = candidates(kernel, rows[kernel], shared, shared_limit)
            steps.label(f"{count} tokens, {kernel}: {len(choices)} tiles")
            for tile in choices:
                trial = {**table, kernel: {**table[kernel], rows[kernel]: tile}}
                if (taken := measure(count, trial)) < best:
                    best, table = taken, trial
                steps.advance(1 / len(choices) / len(fresh))
        steps.advance(0 if fresh else 1)
        timings.append(Timing(count, before, best))
    return _with_common_blocks(table), timings


def _with_common_blocks(table: Table) -> Table:
    """Says in the table what holds anyway: grouped kernels have the block_m of the first of them."""
    first = table[tiles.GROUPED[0]]
    return {
        kernel: {
            rows: replace(tile, block_m=first[rows].block_m) if kernel in tiles.GROUPED else tile
            for rows, tile in sorted(entries.items())
        }
        for kernel, entries in table.items()
    }


def write(table: Table, path: Path) -> None:
    """As tiles.table reads it; the file appears whole or not at all."""
    content = {kernel: {str(rows): asdict(tile) for rows, tile in entries.items()} for kernel, entries in table.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.rename(path)


def tune(
    config: CheckpointConfig, top_k: int, folder: Path, steps: Callable[[float], AbstractContextManager[Steps]]
) -> dict[str, Any]:
    """Writes the table of the current CUDA device into `folder`. steps: makes a progress display for a total.

    Returns what was written, where to, and what it gains.
    """
    from d2moe_vllm.tuning.workload import GraphTimer, Workload, typical_layer

    device = torch.device("cuda", torch.cuda.current_device())
    properties = torch.cuda.get_device_properties(device)
    limit = getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)
    workload = Workload(config, typical_layer(config), top_k, device, GraphTimer())
    with steps(len(TOKENS)) as progress:
        table, timings = search(
            workload,
            workload.kernels,
            TOKENS,
            top_k=top_k,
            num_experts=config.num_experts,
            start=lambda kernel, rows: tiles.tile(kernel, rows, workload.dtype, properties.name),
            shared_limit=limit,
            steps=progress,
        )
    path = folder / tiles.file_name(properties.name)
    write(table, path)
    return {
        "device": properties.name,
        "path": str(path),
        "in_force": path.parent.resolve() == tiles.user_folder().resolve(),
        "layer": [timing._asdict() for timing in timings],
        "table": {kernel: {rows: asdict(tile) for rows, tile in entries.items()} for kernel, entries in table.items()},
    }
