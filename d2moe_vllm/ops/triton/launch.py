"""Buffers, grids and tiles of each kernel. Every shape follows from shapes alone; nothing waits for the device."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from d2moe_vllm.ops.triton import mixing, products, routing, selection, sums, tiles
from d2moe_vllm.ops.weights import HalfSpec

DIRECT_ROWS = 16
"""With up to so many rows the selection itself sums squares and packs what it chose; with more, kernels with as many
programs as there are blocks do."""
SQUARES_ROWS = 64
"""Rows that one program of column_squares sums."""
ADD_BLOCK = 1024
"""Elements that one program of add_parts makes."""


def power_of_two(value: int) -> int:
    """The lowest that is not less."""
    return 1 << max(value - 1, 0).bit_length()


def ceil_div(value: int, by: int) -> int:
    return -(-value // by)


def max_blocks(pairs: int, num_experts: int, block_m: int) -> int:
    """The most blocks that `pairs` rows can need, each expert's padded to whole blocks of block_m."""
    return (pairs + min(num_experts, pairs) * (block_m - 1)) // block_m


def select_block(group_size: int) -> tuple[int, int, int]:
    """(BLOCK_G, BLOCK_M, warps) of the selection for groups of this size."""
    block_g = power_of_two(group_size)
    return block_g, max(1, min(DIRECT_ROWS, 8192 // block_g)), 4 if block_g <= 1024 else 8


def align_blocks(num_experts: int) -> tuple[int, int]:
    """(BLOCK_E, BLOCK_C) of routing.align."""
    block_e = max(power_of_two(num_experts), 16)
    return block_e, max(4096 // block_e, 1)


@dataclass
class Batch:
    """Tokens with their choices of experts, and the launches that work on them.

    gates: float32 [tokens, top_k]. ids: int32, likewise. invariant: no bit of a row may depend on other rows, nor on
    how many there are.
    """

    gates: Tensor
    ids: Tensor
    num_experts: int
    dtype: torch.dtype
    invariant: bool
    pairs: Tensor = field(init=False)
    block_experts: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.tokens, self.top_k = self.ids.shape
        self.device = self.ids.device
        count = self.tokens * self.top_k
        block_m = self.tile("shrink").block_m
        blocks = max_blocks(count, self.num_experts, block_m)
        self.pairs, self.block_experts = self.empty(blocks * block_m), self.empty(blocks)
        block_e, block_c = align_blocks(self.num_experts)
        chunks, counts = ceil_div(count, routing.CHUNK.value), None
        if chunks > 1:
            counts = self.empty(chunks, self.num_experts)
            routing.count_chunks[(chunks,)](self.ids, counts, count, self.num_experts, BLOCK_E=block_e)
        routing.align[(chunks,)](
            self.ids,
            counts,
            self.pairs,
            self.block_experts,
            count,
            self.num_experts,
            blocks,
            BLOCK_M=block_m,
            BLOCK_E=block_e,
            BLOCK_C=block_c,
            num_warps=8,
        )

    def empty(self, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def tile(self, kernel: str) -> tiles.Tile:
        """This batch's tile of a kernel."""
        rows = ceil_div(self.tokens * self.top_k, self.num_experts) if kernel in tiles.GROUPED else self.tokens
        return tiles.tile(
            kernel, tiles.INVARIANT_ROWS if self.invariant else rows, self.dtype, tiles.device_name(self.device)
        )

    def _splits(self, programs: int, depth: int, block_k: int) -> int:
        return 1 if self.invariant else tiles.splits(programs, depth, block_k, self.device)

    def base_product(self, x: Tensor, base: Tensor, chosen: Tensor | None, *, exact: bool = False) -> Tensor:
        """[parts, rows, out]: x [rows, depth] @ base[chosen]. exact: in float32 even where it is one part."""
        tile, (rows, depth), width = self.tile("base"), x.shape, base.shape[1]
        programs = ceil_div(rows, tile.block_m) * ceil_div(width, tile.block_n)
        splits = self._splits(programs, depth, tile.block_k)
        dtype = torch.float32 if exact or splits > 1 else self.dtype
        out = self.empty(splits, rows, width, dtype=dtype)
        products.base_product[(programs, splits)](
            x, base, chosen, out, rows, depth, width, SPLITS=splits, **_matrix(tile)
        )
        return out

    def factor_product(
        self,
        kernel: str,
        a: Tensor,
        b: Tensor,
        *,
        grouped: bool,
        places: Tensor | None = None,
        columns: Tensor | None = None,
        column_places: Tensor | None = None,
        exact: bool = False,
        out: Tensor | None = None,
    ) -> Tensor:
        """[parts, rows, width]: B a, for all rows of a [rows, depth], or for the pairs, each by its expert's B.

        b: [width, depth], or where it is grouped [D, width, depth] by `places`, with a's rows tokens or pairs. columns:
        [D', depth], those of a that are multiplied. exact: as in base_product. out: where to, one part.
        """
        tile, (width, depth) = self.tile(kernel), b.shape[-2:]
        rows = self.tokens * self.top_k if grouped else len(a)
        blocks_m = len(self.block_experts) if grouped else ceil_div(rows, tile.block_m)
        programs = blocks_m * ceil_div(width, tile.block_n)
        if out is None:
            splits = self._splits(programs, depth, tile.block_k)
            dtype = torch.float32 if exact or splits > 1 else self.dtype
            out = self.empty(splits, rows, width, dtype=dtype)
        products.factor_product[(programs, len(out))](
            a,
            b,
            out,
            self.pairs if grouped else None,
            self.block_experts if grouped else None,
            places,
            columns,
            None if columns is None else column_places,
            rows,
            depth,
            width,
            a.stride(0),
            b.stride(-2),
            out.stride(1),
            0 if columns is None else columns.stride(0),
            self.top_k if grouped and len(a) == self.tokens else 1,
            SPLITS=len(out),
            **_matrix(tile),
        )
        return out

    def mixed_product(self, x: Tensor, bases: Tensor, alpha: Tensor, *, gate_rank: int, function: str) -> Tensor:
        """[parts, pairs, k]: V x of each pair's token, V mixed from bases [m, k, depth] by its expert's alpha [2 m]."""
        tile, (count, rank, depth), pairs = self.tile("shrink_mixed"), bases.shape, self.tokens * self.top_k
        block_m = min(tile.block_m, tiles.SLOT_ROWS)
        most = tiles.MIXED_AT_ONCE * (2 if self.dtype == torch.float32 else 1)
        block_j = min(max(power_of_two(count), 16), most)
        groups = ceil_div(len(self.pairs), block_m * tiles.SLOTS)
        blocks_n = sum(ceil_div(part, tile.block_n) for part in (gate_rank, rank - gate_rank))
        splits = self._splits(groups * blocks_n, depth, tile.block_k)
        out = self.empty(splits, pairs, rank, dtype=torch.float32 if splits > 1 else self.dtype)
        mixing.mixed_product[(groups * blocks_n, splits)](
            x,
            bases,
            alpha,
            out,
            self.pairs,
            self.block_experts,
            pairs,
            len(self.block_experts),
            count,
            gate_rank,
            rank,
            depth,
            self.top_k,
            FUNCTION=function,
            SPLITS=splits,
            PAIRS_M=tile.block_m,
            SLOTS=tiles.SLOTS,
            BLOCK_J=block_j,
            BLOCKS_J=ceil_div(count, block_j),
            **{**_matrix(tile), "BLOCK_M": block_m},
        )
        return out

    def added(self, parts: Tensor) -> Tensor:
        """[rows, width]: the sum of parts [parts, rows, width], in the weights' type."""
        if len(parts) == 1:
            return parts[0]
        out = self.empty(*parts.shape[1:], dtype=self.dtype)
        sums.add_parts[(ceil_div(out.numel(), ADD_BLOCK),)](
            parts, out, out.numel(), PARTS=len(parts), BLOCK_N=ADD_BLOCK
        )
        return out

    def expand_and_activate(
        self,
        s: Tensor | None,
        u: Tensor | None,
        z: Tensor | None,
        *,
        width: int,
        ranks: tuple[int, ...],
        places: Tensor | None,
        columns: Tensor | None,
        column_places: Tensor | None,
        bias: Tensor | None,
        activation: str,
        swiglu: tuple[float, ...],
    ) -> Tensor:
        """h [pairs, width] from s [tokens or pairs, k], u [D, width, k], z [parts, tokens, 2 width] and bias [E, 2
        width]; ranks: gate's and up's, or up's alone, where these are width wide."""
        limit, alpha, beta = swiglu or (0.0, 0.0, 0.0)
        tile, pairs = self.tile("expand_gate_up"), self.tokens * self.top_k
        h = self.empty(pairs, width, dtype=self.dtype)
        products.expand_and_activate[(len(self.block_experts) * ceil_div(width, tile.block_n),)](
            s,
            u,
            z,
            bias,
            h,
            self.pairs,
            self.block_experts,
            places,
            columns,
            None if columns is None else column_places,
            self.tokens,
            *((0, *ranks) if len(ranks) == 1 else ranks),
            width,
            0 if s is None else s.stride(0),
            0 if u is None else u.stride(1),
            0 if columns is None else columns.stride(0),
            1 if s is None or len(s) == pairs else self.top_k,
            self.top_k,
            ACTIVATION=activation,
            LIMIT=limit,
            ALPHA=alpha,
            BETA=beta,
            GATED=len(ranks) == 2,
            Z_PARTS=1 if z is None else len(z),
            **_matrix(tile),
        )
        return h

    def used_inputs(
        self,
        x: Tensor,
        inputs: Tensor | None,
        norms: Tensor,
        padding: Tensor | None,
        half: HalfSpec,
        scope: str,
    ) -> tuple[Tensor, Tensor | None]:
        """What of x [rows, width] the base is multiplied with: packed [rows, depth] in the weights' type, and which of
        the base's rows these are, int32 [depth], None for all. inputs: the columns that are kept, None for all.
        """
        rows, kept, groups, used = x.shape[0], len(norms), half.groups, half.used
        if scope == "off" or used >= kept:
            return (x.to(self.dtype) if inputs is None else self.gather(x, inputs)), None
        size = kept // groups
        block_g, block_m, warps = select_block(size)
        if scope == "token":
            packed = self.empty(rows, kept, dtype=self.dtype)
            selection.select_for_token[(rows, groups)](
                x, inputs, norms, packed, x.shape[1], size, used // groups, BLOCK_G=block_g, num_warps=warps
            )
            return packed, None
        used = used // groups * groups
        chosen, chosen_inputs = self.empty(used), self.empty(used)
        direct = rows <= DIRECT_ROWS
        packed = self.empty(rows, used, dtype=self.dtype) if direct else None
        values = x if direct else self.column_squares(x, padding)
        selection.select_for_batch[(groups,)](
            values,
            padding if direct else None,
            inputs,
            norms,
            chosen,
            chosen_inputs,
            packed,
            values.shape[0],
            x.shape[1],
            size,
            used // groups,
            SQUARED=not direct,
            BLOCK_M=block_m,
            BLOCK_G=block_g,
            num_warps=warps,
        )
        return (self.gather(x, chosen_inputs) if packed is None else packed), chosen

    def column_squares(self, x: Tensor, padding: Tensor | None) -> Tensor:
        """float32 [ceil(rows / SQUARES_ROWS), width]: partial sums of x's squares over rows that are no padding."""
        rows, width = x.shape
        squares = self.empty(ceil_div(rows, SQUARES_ROWS), width, dtype=torch.float32)
        grid = (ceil_div(width, 128), len(squares))
        selection.column_squares[grid](
            x, padding, squares, rows, width, PROGRAM_ROWS=SQUARES_ROWS, BLOCK_M=16, BLOCK_N=128
        )
        return squares

    def gather(self, x: Tensor, inputs: Tensor) -> Tensor:
        """x [rows, width] at the columns `inputs`, in the weights' type."""
        tile, (rows, width) = self.tile("gather"), x.shape
        packed = self.empty(rows, len(inputs), dtype=self.dtype)
        grid = (ceil_div(rows, tile.block_m), ceil_div(len(inputs), tile.block_n))
        selection.gather[grid](x, inputs, packed, rows, width, len(inputs), **_plain(tile))
        return packed

    def mix(self, h: Tensor, inputs: Tensor | None, dtype: torch.dtype) -> Tensor:
        """[tokens, kept]: the gate-weighted sum of h [pairs, width] over a token's experts, at the columns `inputs`."""
        tile, width = self.tile("mix"), h.shape[1]
        count = width if inputs is None else len(inputs)
        out = self.empty(self.tokens, count, dtype=dtype)
        grid = (ceil_div(self.tokens, tile.block_m), ceil_div(count, tile.block_n))
        sums.mix[grid](
            h,
            self.gates,
            self.ids,
            inputs,
            out,
            self.tokens,
            width,
            count,
            self.num_experts,
            TOP_K=self.top_k,
            **_plain(tile),
        )
        return out

    def combine(self, base: Tensor | None, deltas: Tensor | None, bias: Tensor | None, width: int) -> Tensor:
        """y [tokens, width] from float32 base [parts, tokens, width] and deltas [parts, pairs, width], and bias [E,
        width]."""
        tile = self.tile("combine")
        y = self.empty(self.tokens, width, dtype=self.dtype)
        grid = (ceil_div(self.tokens, tile.block_m), ceil_div(width, tile.block_n))
        sums.combine[grid](
            base,
            deltas,
            bias,
            self.gates,
            self.ids,
            y,
            self.tokens,
            width,
            self.num_experts,
            TOP_K=self.top_k,
            BASE_PARTS=1 if base is None else len(base),
            DELTA_PARTS=1 if deltas is None else len(deltas),
            **_plain(tile),
        )
        return y


def _plain(tile: tiles.Tile) -> dict[str, Any]:
    return {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def _matrix(tile: tiles.Tile) -> dict[str, Any]:
    return {**_plain(tile), "BLOCK_K": tile.block_k}
