"""What the Triton backend launches, on the meta device: how many kernels, with which tiles, all of them compiled."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import aot
import aot_report
import pytest
import torch
from few_cases import make, mixed_few
from layer_shapes import SHAPES
from mixed_cases import MIXED_SMALL, mixed_case
from moe_cases import CROWDED, crowd
from moe_oracle import kernel_arguments
from test_triton_few import LAYERS, PACKED_BASES
from triton.runtime.jit import JITFunction

from d2moe_vllm.ops.triton import layer, pack, tiles
from d2moe_vllm.ops.weights import HalfSpec, LayerSpec, Weights

FEW = (
    "4 and 2 bits", "unequal widths", "biases, on a base, unequal widths", "factors", "factors, unequal widths",
    "columns", "on a low-rank base", "no gate", "no gate, biases, unequal widths, not packed",
)  # fmt: skip
"""Of the layers of few bits and unequal widths, those with kernels of their own."""
OPTIONAL = ("padding", "inputs")
"""Leaving one of these out leaves instructions out, and makes no kernel of its own."""
TARGET = aot.TARGETS["sm_90"]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """Every launch, noted and not run: the kernel's name, its arguments by name."""
    launches: list[tuple[str, dict[str, Any]]] = []

    def note(kernel: Any, *args: Any, grid: object, warmup: bool, **constants: Any) -> None:
        launches.append((kernel.__name__, {**dict(zip(kernel.arg_names, args, strict=False)), **constants}))

    monkeypatch.setattr(JITFunction, "run", note)
    return launches


def on_meta(value: Any) -> Any:
    if isinstance(value, Weights):
        return Weights(*map(on_meta, value))
    return value.to("meta") if isinstance(value, torch.Tensor) else value


def run_on_meta(arguments: list[Any], spec: LayerSpec) -> None:
    """Shapes and launches only; tensors without memory, so that whoever waits for a value of theirs fails."""
    layer.fused_experts(*map(on_meta, arguments), spec)


@cache
def layer_of(variant: str, scope: str, dtype: torch.dtype) -> tuple[list[Any], LayerSpec]:
    """Of 67 tokens, on the meta device."""
    if variant in FEW:
        made = make(replace(LAYERS[variant], dtype=dtype, tokens=67))
        arguments, spec = [*made.arguments[:3], *pack(*made.arguments[3:5], made.spec), None], made.spec
    elif variant in PACKED_BASES:
        storage, sizes = PACKED_BASES[variant]
        arguments, spec, _ = mixed_few(0, dtype, storage, tokens=67, intermediate=40, rank=(19, 9), **sizes)
        arguments[3:5] = pack(*arguments[3:5], spec)
    elif variant in MIXED_SMALL:
        arguments, spec = mixed_case(0, dtype, **{**MIXED_SMALL[variant], "tokens": 67})
    else:
        arguments, spec = kernel_arguments(crowd(variant, scope), dtype)
    return [*map(on_meta, arguments)], spec


def recorded(variant: str, scope: str, dtype: torch.dtype, tokens: int) -> list[aot.Launch]:
    arguments, spec = layer_of(variant, scope, dtype)
    arguments = [*(tensor[:tokens] for tensor in arguments[:3]), *arguments[3:]]
    return aot.record(lambda: run_on_meta(arguments, spec), TARGET)


VARIANTS = [*itertools.product(CROWDED, layer.SCOPES)]
VARIANTS += [(variant, "off") for variant in (*MIXED_SMALL, *FEW, "3 bits, a last group that is short")]
"""With scopes."""


@pytest.mark.parametrize(
    ("variant", "scope", "dtype"),
    [(*case, dtype) for case, dtype in zip(VARIANTS, itertools.cycle((torch.float32, torch.bfloat16)), strict=False)],
)
def test_numbers_of_rows_make_no_kernel_of_their_own(variant: str, scope: str, dtype: torch.dtype) -> None:
    """Where they ask for the same tiles: a multiple of 16, of which triton would know, is like any other number."""
    # Of five experts 32 rows are a bucket more.
    for few, many in ((15, 16), (17, 20 if variant in FEW else 32)):
        assert recorded(variant, scope, dtype, few) == recorded(variant, scope, dtype, many)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_kernel_that_is_launched_is_compiled(dtype: torch.dtype) -> None:
    """By which pointers there are, of which types: what test_triton_aot compiles has them all."""

    def pointers(launch: aot.Launch) -> tuple[str, frozenset[tuple[str, str]]]:
        kinds = launch.signature.items()
        return launch.name, frozenset((n, kind) for n, kind in kinds if kind[0] == "*" and n not in OPTIONAL)

    compiled = {pointers(launch) for call in aot_report.calls(dtype, True) for launch in aot.record(call, TARGET)}
    for (variant, scope), tokens in itertools.product(VARIANTS, (1, 16, 67)):
        found = recorded(variant, scope, dtype, tokens)
        # Of whole deltas without a base there is no base's product.
        assert len(found) >= (4 if variant in FEW else 5)
        assert {*map(pointers, found)} <= compiled, (variant, scope, tokens)


def mixtral(tokens: int, experts: int = 8) -> list[Any]:
    """Meta tensors: Mixtral-8x7B's layer at ranks of 1504, its base pruned to 3840 and 13440 columns."""

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def half(inputs: int, outputs: int, parts: int, kept: int) -> Weights:
        return Weights(
            delta_u=empty(experts, outputs, 1504 * parts),
            delta_v=empty(experts, 1504 * parts, inputs),
            base=empty(kept, parts * outputs),
            base_columns=empty(kept, dtype=torch.int32),
            base_norms=empty(kept, dtype=torch.float32),
        )

    routing_inputs = [empty(tokens, 2, dtype=torch.float32), empty(tokens, 2, dtype=torch.int32)]
    return [empty(tokens, 4096), *routing_inputs, half(4096, 14336, 2, 3840), half(14336, 4096, 1, 13440), None]


MIXTRAL = LayerSpec(
    8, 14336, HalfSpec((1504, 1504), groups=8, used=1920), HalfSpec((1504,), groups=8, used=6720), "silu", "off"
)


@pytest.mark.parametrize(("scope", "tokens", "launches"), [("off", 1, 13), ("off", 64, 10), ("batch", 16, 11)])
def test_few_launches(seen: list[Any], scope: str, tokens: int, launches: int) -> None:
    run_on_meta(mixtral(tokens), MIXTRAL._replace(scope=scope))
    assert len(seen) <= launches, [name for name, *_ in seen]


@pytest.mark.parametrize(("tokens", "launches"), [(1, 7), (64, 6), (4096, 7)])
def test_few_launches_of_mixed_layers(seen: list[Any], tokens: int, launches: int) -> None:
    """Sorting, mixing, expanding, down and the sum; one to add up parts, and one to count where pairs are many."""
    aot_report.call(SHAPES["Qwen3-30B-A3B"], torch.bfloat16, "bases", "off", tokens, "silu")
    assert len(seen) <= launches, [name for name, *_ in seen]


@pytest.mark.parametrize(
    ("tokens", "invariant", "launches"),
    # Sorting, base, gate and up, mix, base, down, sum; three fewer where the base is added, one more to count pairs.
    [(16, False, 7), (128, False, 4), (1024, False, 5), (128, True, 7)],
)
def test_few_launches_of_few_bits(seen: list[Any], tokens: int, invariant: bool, launches: int) -> None:
    aot_report.call(SHAPES["Mixtral-8x7B"], torch.bfloat16, "2 bits on a base", "off", tokens, "silu", invariant)
    assert len(seen) == launches, [name for name, *_ in seen]


@pytest.mark.parametrize("tokens", [1, 2, 8, 64, 1024])
def test_every_row_is_computed_by_the_same_tiles_where_bits_must_not_depend_on_others(
    seen: list[Any], tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number of rows changes nothing but the grid and the numbers of rows; many pairs are counted in a launch more,
    which computes nothing of a row."""
    # So many that sums of few rows would be split.
    monkeypatch.setattr(tiles, "processors", lambda device: aot_report.PROCESSORS["sm_90"])

    def constants(count: int) -> list[Any]:
        seen.clear()
        run_on_meta(mixtral(count), MIXTRAL._replace(scope="token", batch_invariant=True))
        return [
            (name, {key: value for key, value in arguments.items() if key.isupper() or key.startswith("num_w")})
            for name, arguments in seen
            if name != "count_chunks"
        ]

    assert constants(tokens) == constants(300)


def test_tiles_are_looked_up_by_powers_of_two() -> None:
    table = tiles.table("default")["base"]
    for rows, bucket in ((0, 1), (1, 1), (2, 1), (16, 1), (17, 32), (32, 32), (33, 64), (65, 128), (10**6, 128)):
        assert tiles.tile("base", rows, torch.bfloat16, "no such device") == table[bucket], rows


def test_the_default_table_has_every_kernel() -> None:
    table = tiles.table("default")
    assert set(table) == set(tiles.TABLE_KERNELS)
    for kernel, entries in table.items():
        assert min(entries) == 1
        for rows, tile in entries.items():
            assert rows & (rows - 1) == 0
            sizes = (tile.block_m, tile.block_n, tile.block_k, tile.num_warps)
            assert all(size & (size - 1) == 0 for size in sizes)
            least = (16, 8 if kernel.startswith("shrink_mixed") else 16, 32 if kernel.endswith(tiles.FEW) else 16)
            if kernel in ("base", *tiles.GROUPED):
                assert all(size >= limit for size, limit in zip(sizes, least, strict=False)), "of a dot product"


@pytest.mark.parametrize("dtype", layer.DTYPES)
def test_grouped_kernels_share_their_rows(dtype: torch.dtype) -> None:
    for rows in (1, 5, 20, 50, 300, 5000):
        assert len({tiles.tile(kernel, rows, dtype, "default").block_m for kernel in tiles.GROUPED}) == 1


def test_a_devices_own_table_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels it does not name keep the default's tiles."""
    (tmp_path / "default.json").write_text((tiles.TABLES / "default.json").read_text())
    own = {"block_m": 16, "block_n": 256, "block_k": 32, "num_warps": 8, "num_stages": 2}
    (tmp_path / "NVIDIA_H100_80GB_HBM3.json").write_text(json.dumps({"base": {"1": own}}))
    monkeypatch.setattr(tiles, "TABLES", tmp_path)
    for cached in (tiles.table, tiles.tile):
        cached.cache_clear()
    try:
        assert tiles.tile("base", 9, torch.float16, "NVIDIA H100 80GB HBM3") == tiles.Tile(**own)
        shrink = [tiles.tile("shrink", 9, torch.float16, name) for name in ("NVIDIA H100 80GB HBM3", "other")]
        assert shrink[0] == shrink[1]
    finally:
        for cached in (tiles.table, tiles.tile):
            cached.cache_clear()


def test_splits_fill_the_device_and_no_more() -> None:
    cpu = torch.device("cpu")
    assert tiles.processors(cpu) == 16
    assert [tiles.splits(n, 14336, 128, cpu) for n in (1, 4, 8, 9, 16, 17, 1000)] == [8, 8, 4, 2, 2, 1, 1]
    assert [tiles.splits(1, depth, 128, cpu) for depth in (0, 100, 512, 513, 1024, 1500)] == [1, 1, 1, 2, 2, 2]
