"""Every kernel with the ways it is launched, for those who compile or measure without launching."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from d2moe_vllm.ops.triton import products, routing, selection, sums, tiles
from d2moe_vllm.ops.triton.launch import ADD_BLOCK, SQUARES_ROWS, align_blocks, select_block

TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
"""Triton's names."""
WEIGHT = "weight"
"""In place of an element type: that of the weights."""


class Kernel(NamedTuple):
    """A jitted function and its arguments.

    function: the triton.jit object. pointers: {argument: element type}, WEIGHT where it is the weights'. integers:
    int32 arguments. varying: those that differ from batch to batch, so that nothing may be known of them. constants:
    tl.constexpr arguments besides a tile's blocks.
    """

    function: Any
    pointers: dict[str, str]
    integers: tuple[str, ...]
    varying: tuple[str, ...]
    constants: tuple[str, ...] = ()


Types = dict[str, "str | None"]


class Variant(NamedTuple):
    """One way in which a kernel is launched.

    kernel: its name in KERNELS. tables: kernels of the tile table whose tiles it is launched with, none: `constants`
    holds its blocks and num_warps. types: what differs from the kernel's own pointers, None for an argument that is
    None. constants: values of its constants.
    """

    kernel: str
    name: str
    tables: tuple[str, ...]
    types: Types
    constants: dict[str, Any]


class Compilation(NamedTuple):
    """What triton.compiler.ASTSource wants: signature by argument, constexprs by name, attrs by argument's place."""

    name: str
    function: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    attrs: dict[tuple[int], list[list[Any]]]
    num_warps: int
    num_stages: int


ROUTED = {"pairs": "i32", "block_experts": "i32", "places": "i32", "columns": "i32", "column_places": "i32"}
CHOICES = {"gates": "fp32", "ids": "i32"}

KERNELS: dict[str, Kernel] = {
    "align": Kernel(
        routing.align,
        {"ids": "i32", "pairs": "i32", "block_experts": "i32"},
        ("count", "num_experts", "max_blocks"),
        ("count", "max_blocks"),
        ("BLOCK_M", "BLOCK_E", "BLOCK_P"),
    ),
    "column_squares": Kernel(
        selection.column_squares,
        {"x": WEIGHT, "padding": "u8", "squares": "fp32"},
        ("rows", "width"),
        ("rows",),
        ("PROGRAM_ROWS",),
    ),
    "select_for_batch": Kernel(
        selection.select_for_batch,
        {
            "x": WEIGHT,
            "padding": "u8",
            "inputs": "i32",
            "norms": "fp32",
            "chosen": "i32",
            "chosen_inputs": "i32",
            "packed": WEIGHT,
        },
        ("rows", "width", "group_size", "group_used"),
        ("rows",),
        ("SQUARED", "BLOCK_M", "BLOCK_G"),
    ),
    "select_for_token": Kernel(
        selection.select_for_token,
        {"x": WEIGHT, "inputs": "i32", "norms": "fp32", "packed": WEIGHT},
        ("width", "group_size", "group_used"),
        (),
        ("BLOCK_G",),
    ),
    "gather": Kernel(
        selection.gather, {"x": WEIGHT, "inputs": "i32", "packed": WEIGHT}, ("rows", "width", "count"), ("rows",)
    ),
    "base_product": Kernel(
        products.base_product,
        {"x": WEIGHT, "base": WEIGHT, "chosen": "i32", "out": WEIGHT},
        ("rows", "depth", "width"),
        ("rows",),
        ("SPLITS",),
    ),
    "factor_product": Kernel(
        products.factor_product,
        {"a": WEIGHT, "b": WEIGHT, "out": WEIGHT, **ROUTED},
        (
            *("rows", "depth", "width"),
            *("a_stride", "b_stride", "out_stride", "columns_stride", "a_divisor"),
        ),
        ("rows",),
        ("SPLITS",),
    ),
    "expand_and_activate": Kernel(
        products.expand_and_activate,
        {"s": WEIGHT, "u": WEIGHT, "z": WEIGHT, "h": WEIGHT, **ROUTED},
        (
            *("z_rows", "gate_rank", "up_rank", "width"),
            *("s_stride", "u_stride", "columns_stride", "s_divisor", "top_k"),
        ),
        ("z_rows",),
        ("ACTIVATION", "Z_PARTS"),
    ),
    "mix": Kernel(
        sums.mix,
        {"h": WEIGHT, **CHOICES, "inputs": "i32", "out": WEIGHT},
        ("rows", "width", "count", "num_experts"),
        ("rows",),
        ("TOP_K",),
    ),
    "combine": Kernel(
        sums.combine,
        {"base": "fp32", "deltas": "fp32", **CHOICES, "y": WEIGHT},
        ("rows", "width", "num_experts"),
        ("rows",),
        ("TOP_K", "BASE_PARTS", "DELTA_PARTS"),
    ),
    "add_parts": Kernel(sums.add_parts, {"parts": "fp32", "out": WEIGHT}, ("count",), ("count",), ("PARTS", "BLOCK_N")),
}
"""All kernels by name; tests compare this with the functions' own arguments."""

UNALIGNED = ("group_size", "group_used", "num_experts", "top_k", "s_divisor", "a_divisor")
"""Integers that are no multiples of 16, even in models whose sizes and ranks are."""


def variants(
    device_name: str = "default", *, num_experts: int = 8, top_k: int = 2, group_size: int = 512
) -> Iterator[Variant]:
    """The ways in which served models launch the kernels, for a model with these sizes and a device's table.

    group_size: of the columns of a base, kept / groups. Masks and indices are given everywhere: a launch without one
    is the same with instructions left out.
    """
    block_e, block_p = align_blocks(num_experts)
    for block_m in sorted({t.block_m for t in tiles.table(device_name)[tiles.GROUPED[0]].values()}):
        constants = {"BLOCK_M": block_m, "BLOCK_E": block_e, "BLOCK_P": block_p, "num_warps": 4}
        yield Variant("align", f"{block_m}", (), {}, constants)
    yield from _selections(group_size)
    yield Variant("gather", "gate, up", ("gather",), {}, {})
    yield Variant("gather", "down", ("gather",), {"x": "fp32"}, {})
    for chosen in ("i32", None):
        for splits, out in ((1, WEIGHT), (1, "fp32"), (tiles.MAX_SPLITS, "fp32")):
            words = f"{'chosen' if chosen else 'all'}, {splits} parts, {'rounded' if out == WEIGHT else 'exact'}"
            types: Types = {"chosen": chosen, "out": out}
            yield Variant("base_product", words, ("base",), types, {"SPLITS": splits})
    yield from _factor_products()
    for inputs in ("i32", None):
        for out in (WEIGHT, "fp32"):
            words = f"{'kept' if inputs else 'all'} columns, {'exact' if out == 'fp32' else 'rounded'}"
            yield Variant("mix", words, ("mix",), {"inputs": inputs, "out": out}, {"TOP_K": top_k})
    parts = {"PARTS": tiles.MAX_SPLITS, "BLOCK_N": ADD_BLOCK, "num_warps": 4}
    yield Variant("add_parts", f"{tiles.MAX_SPLITS} parts", (), {}, parts)
    for absent in ((), ("base",), ("deltas",)):
        for splits in (1, tiles.MAX_SPLITS):
            constants = {"TOP_K": top_k, "BASE_PARTS": splits, "DELTA_PARTS": splits}
            words = f"without {absent[0]}, {splits} parts" if absent else f"{splits} parts"
            yield Variant("combine", words, ("combine",), dict.fromkeys(absent), constants)


def _selections(group_size: int) -> Iterator[Variant]:
    block_g, block_m, warps = select_block(group_size)
    blocks = {"BLOCK_G": block_g, "num_warps": warps}
    for half, types in (("gate, up", {}), ("down", {"x": "fp32", "inputs": None})):
        x: Types = {key: value for key, value in types.items() if key == "x"}
        squares = {"PROGRAM_ROWS": SQUARES_ROWS, "BLOCK_M": 16, "BLOCK_N": 128, "num_warps": 4}
        yield Variant("column_squares", half, (), x, squares)
        yield Variant("select_for_token", half, (), dict(types), blocks)
        batch = {**blocks, "BLOCK_M": block_m}
        yield Variant("select_for_batch", f"{half}, packs", (), dict(types), {**batch, "SQUARED": False})
        squared = {**types, "x": "fp32", "padding": None, "packed": None}
        yield Variant("select_for_batch", f"{half}, of sums", (), squared, {**batch, "SQUARED": True})


def _factor_products() -> Iterator[Variant]:
    grouped: Types = {"columns": None, "column_places": None}
    alone: Types = dict.fromkeys(ROUTED)
    for splits in (1, tiles.MAX_SPLITS):
        out: Types = {"out": WEIGHT if splits == 1 else "fp32"}
        constants = {"SPLITS": splits}
        yield Variant("factor_product", f"shrink, {splits} parts", ("shrink",), {**grouped, **out}, constants)
        yield Variant("factor_product", f"shared V, {splits} parts", ("shrink",), {**alone, **out}, constants)
    exact: Types = {"out": "fp32"}
    for splits in (1, tiles.MAX_SPLITS):
        words, table, constants = f"expand, {splits} parts", ("expand_down",), {"SPLITS": splits}
        yield Variant("factor_product", words, table, {**grouped, **exact}, constants)
        yield Variant("factor_product", f"low rank, {words}", table, {**alone, **exact}, constants)
    for splits in (1, tiles.MAX_SPLITS):
        words, table, constants = f"columns, {splits} parts", ("expand_columns",), {"SPLITS": splits}
        yield Variant("factor_product", words, table, exact, constants)
    yield from _activations()


def _activations() -> Iterator[Variant]:
    no_columns: Types = {"columns": None, "column_places": None}
    no_deltas = {**no_columns, "s": None, "u": None, "places": None}
    table = ("expand_gate_up",)

    def constants(z_parts: int = 1, activation: str = "silu") -> dict[str, Any]:
        return {"ACTIVATION": activation, "Z_PARTS": z_parts}

    for activation in ("silu", "gelu", "gelu_tanh"):
        yield Variant("expand_and_activate", activation, table, no_columns, constants(activation=activation))
    parts = tiles.MAX_SPLITS
    split = {**no_columns, "z": "fp32"}
    yield Variant("expand_and_activate", f"{parts} parts", table, split, constants(parts))
    yield Variant("expand_and_activate", "no base", table, {**no_columns, "z": None}, constants())
    yield Variant("expand_and_activate", "no deltas", table, no_deltas, constants())
    yield Variant("expand_and_activate", "columns", table, {}, constants())


def compilations(
    dtype: torch.dtype, device_name: str = "default", *, divisible: bool = True, **sizes: int
) -> Iterator[Compilation]:
    """Every variant with every tile of a device's table that it is launched with.

    divisible: sizes and ranks are multiples of 16, which the launcher finds out by itself; False: nothing is known of
    them. sizes: see `variants`.
    """
    table = tiles.table(device_name)
    for variant in variants(device_name, **sizes):
        kernel = KERNELS[variant.kernel]
        choices: list[dict[str, Any]] = [{}]
        if variant.tables:
            # A grouped kernel's block_m changes where that of the first of them does.
            bounds = {*variant.tables, *(tiles.GROUPED[:1] if {*variant.tables} & {*tiles.GROUPED} else ())}
            buckets = sorted({rows for name in bounds for rows in table[name]})
            found = {tiles.tile(name, rows, dtype, device_name) for name in variant.tables for rows in buckets}
            choices = [_tile_constants(tile) for tile in sorted(found, key=str)]
        for choice in choices:
            constants = {**variant.constants, **choice}
            yield _compilation(kernel, variant, constants, TYPES[dtype], divisible)


def _tile_constants(tile: tiles.Tile) -> dict[str, Any]:
    blocks = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k}
    return {**blocks, "num_warps": tile.num_warps, "num_stages": tile.num_stages}


def _compilation(
    kernel: Kernel, variant: Variant, constants: dict[str, Any], dtype: str, divisible: bool
) -> Compilation:
    types = {**kernel.pointers, **variant.types}
    signature, constexprs, attrs = {}, {}, {}
    for place, argument in enumerate(kernel.function.arg_names):
        if argument in types and types[argument] is not None:
            signature[argument] = f"*{dtype if types[argument] == WEIGHT else types[argument]}"
        elif argument in kernel.integers:
            signature[argument] = "i32"
        else:
            signature[argument] = "constexpr"
            constexprs[argument] = None if argument in types else constants[argument]
            continue
        multiple = divisible and argument not in kernel.varying and argument not in UNALIGNED
        if argument in types or multiple:
            attrs[(place,)] = [["tt.divisibility", 16]]
    blocks = ", ".join(f"{key}={value}" for key, value in constants.items() if value is not None)
    return Compilation(
        f"{variant.kernel} ({variant.name}) {dtype} {blocks}",
        kernel.function,
        signature,
        constexprs,
        attrs,
        constants["num_warps"],
        constants.get("num_stages", 3),
    )
