"""What the Triton backend launches: tiles from tables, and the catalogue that others compile and measure by."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_cases import CROWDED, crowd
from moe_oracle import kernel_arguments

from d2moe_vllm.ops.reference import Weights
from d2moe_vllm.ops.triton import catalogue, layer, products, routing, selection, sums, tiles

OPTIONAL = ("padding", "inputs", "places", "column_places")
"""Leaving one of these out leaves instructions out, and makes no kernel of its own."""


class Launches:
    """In place of a kernel: notes how it is launched and runs nothing."""

    def __init__(self, name: str, function: Any, seen: list[tuple[str, tuple[int, ...], dict[str, Any]]]) -> None:
        self.name, self.function, self.seen = name, function, seen

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **constants: Any) -> None:
            names = self.function.arg_names
            self.seen.append((self.name, grid, {**dict(zip(names, args, strict=False)), **constants}))

        return launch


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, tuple[int, ...], dict[str, Any]]]]:
    launches: list[tuple[str, tuple[int, ...], dict[str, Any]]] = []
    for name, kernel in catalogue.KERNELS.items():
        module = next(m for m in (products, routing, selection, sums) if hasattr(m, name))
        monkeypatch.setattr(module, name, Launches(name, kernel.function, launches))
    return launches


def run_on_meta(arguments: list[Any], options: dict[str, Any]) -> None:
    """Shapes and launches only; tensors without memory."""

    def move(value: Any) -> Any:
        if isinstance(value, Weights):
            return Weights(*map(move, value))
        return value.to("meta") if isinstance(value, torch.Tensor) else value

    layer.fused_experts(*map(move, arguments), **{"batch_invariant": False, **options})


def test_the_catalogue_names_every_argument() -> None:
    blocks = {"BLOCK_M", "BLOCK_N", "BLOCK_K"}
    for name, kernel in catalogue.KERNELS.items():
        arguments = set(kernel.function.arg_names)
        named = {*kernel.pointers, *kernel.integers, *kernel.constants}
        assert named <= arguments <= named | blocks, name
        assert set(kernel.varying) <= set(kernel.integers)
        varying = {p.name for p in kernel.function.params if p.do_not_specialize}
        assert varying == set(kernel.varying), name


@pytest.mark.parametrize("dtype", list(catalogue.TYPES))
def test_every_compilation_is_complete(dtype: torch.dtype) -> None:
    names = set()
    for compilation in catalogue.compilations(dtype):
        assert list(compilation.signature) == compilation.function.arg_names
        assert {name for name, kind in compilation.signature.items() if kind == "constexpr"} == set(
            compilation.constexprs
        )
        names.add(compilation.name)
    assert {name.split(" ")[0] for name in names} == set(catalogue.KERNELS)
    assert len(names) == len(list(catalogue.compilations(dtype)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scope", ["off", "token", "batch"])
@pytest.mark.parametrize("variant", CROWDED)
def test_the_catalogue_has_every_launch(seen: list[Any], variant: str, scope: str, dtype: torch.dtype) -> None:
    """By which pointers there are, of which types, and which blocks."""
    known = list(catalogue.variants())
    for tokens in (1, 16, 67):
        arguments, options = kernel_arguments(crowd(variant, scope), dtype)
        run_on_meta([*(t[:tokens] for t in arguments[:3]), *arguments[3:]], options)
    assert len(seen) > 12
    for name, _, arguments in seen:
        kernel = catalogue.KERNELS[name]
        used = {pointer: arguments[pointer] for pointer in kernel.pointers}
        assert any(fits(kernel, v, used, dtype) for v in known if v.kernel == name), (name, used)
        assert {*kernel.constants, "BLOCK_M", "num_warps"} - {*arguments} <= {"BLOCK_M", "num_warps"}


def fits(kernel: catalogue.Kernel, variant: catalogue.Variant, used: dict[str, Any], dtype: torch.dtype) -> bool:
    types = {**kernel.pointers, **variant.types}
    names = {torch.int32: "i32", torch.uint8: "u8", **catalogue.TYPES}
    for pointer, tensor in used.items():
        wanted = catalogue.TYPES[dtype] if types[pointer] == catalogue.WEIGHT else types[pointer]
        given = None if tensor is None else names[tensor.dtype]
        if given != wanted and not (given is None and pointer in OPTIONAL):
            return False
    return True


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


MIXTRAL = {
    "num_experts": 8,
    "intermediate_size": 14336,
    "ranks": [1504] * 3,
    "base_ranks": [0] * 3,
    "groups": [8, 8],
    "used": [1920, 6720],
    "activation": "silu",
}


@pytest.mark.parametrize(("scope", "tokens", "launches"), [("off", 1, 13), ("off", 64, 10), ("batch", 16, 11)])
def test_few_launches(seen: list[Any], scope: str, tokens: int, launches: int) -> None:
    run_on_meta(mixtral(tokens), {**MIXTRAL, "scope": scope})
    assert len(seen) <= launches, [name for name, *_ in seen]


@pytest.mark.parametrize("tokens", [1, 2, 8, 64, 1024])
def test_every_row_is_computed_by_the_same_tiles_where_bits_must_not_depend_on_others(
    seen: list[Any], tokens: int
) -> None:
    """The number of rows changes nothing but the grid and the numbers of rows."""

    def constants(count: int) -> list[Any]:
        seen.clear()
        run_on_meta(mixtral(count), {**MIXTRAL, "scope": "token", "batch_invariant": True})
        return [
            (name, {key: value for key, value in arguments.items() if key.isupper() or key.startswith("num_w")})
            for name, _, arguments in seen
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
            assert kernel not in ("base", *tiles.GROUPED) or min(sizes[:3]) >= 16, "a dot product takes 16 at least"


@pytest.mark.parametrize("dtype", list(catalogue.TYPES))
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
