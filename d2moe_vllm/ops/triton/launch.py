"""Buffers, grids and tiles of each kernel. Every shape follows from shapes alone; nothing waits for the device."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from d2moe_vllm.ops.packing import Packing
from d2moe_vllm.ops.triton import mixing, products, routing, selection, sums, tiles
from d2moe_vllm.ops.triton.layout import OUTPUTS, UNIT, Ragged, round_up, units
from d2moe_vllm.ops.weights import HalfSpec

DIRECT_ROWS = 16
"""With up to so many rows the selection itself sums squares and packs what it chose; with more, kernels with as many
programs as there are blocks do."""
SQUARES_ROWS = 64
"""Rows that one program of column_squares sums."""
MANY_ROWS = 64
"""Of a block, from which on a product is bound by arithmetic rather than by reading."""
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


class Matrices(NamedTuple):
    """Matrices [outputs, inputs] in one tensor, as layout.pack leaves them.

    values: [outputs, inputs] or [D, outputs, inputs], or flat; with `how`, codes, and their scales. first: where in a
    whole row the inputs begin.
    """

    values: Tensor
    outputs: int
    inputs: int
    scales: Tensor | None = None
    how: Packing | None = None
    first: int = 0

    @property
    def stride(self) -> int:
        """Elements from a row to the next: of inputs, or, of codes and scales, of outputs."""
        if self.how is not None:
            return round_up(self.outputs, OUTPUTS)
        return self.values.stride(-2) if self.values.dim() > 1 else self.inputs

    @property
    def places(self) -> int:
        """Of inputs in a row, those of its neighbours in the first and the last unit included."""
        return self.inputs if self.how is None else UNIT * units(self.inputs, self.first)

    @property
    def shift(self) -> int | None:
        """How many places there are before the first input; None for none, which makes a simpler kernel."""
        return None if self.how is None else self.first % UNIT or None

    @property
    def group_shift(self) -> int:
        return 0 if self.how is None else self.first % self.how.group_size // UNIT

    @property
    def groups(self) -> int:
        return 0 if self.how is None else self.how.row_groups(self.inputs, self.first)

    def kernel(self, name: str) -> str:
        """Under which name tiles are looked up."""
        return name if self.how is None else f"{name}{tiles.FEW}"


def storage(how: Packing | None, prefix: str = "") -> dict[str, Any]:
    """What kernels are compiled for of a storage."""
    bits, zero, group = (0, 0.0, UNIT) if how is None else how
    return {f"{prefix}BITS": bits, f"{prefix}ZERO": float(zero), f"{prefix}GROUP": group}


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

    @property
    def adds_bases(self) -> bool:
        """Whether a base is to be added to experts' own matrices before one product: where each expert has so many rows
        that arithmetic is the limit, and not the bytes that are read."""
        return not self.invariant and self.tile("shrink").block_m >= MANY_ROWS

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
        b: Matrices,
        *,
        grouped: bool,
        places: Tensor | None = None,
        columns: Tensor | None = None,
        column_places: Tensor | None = None,
        ragged: Ragged | None = None,
        base: Matrices | None = None,
        exact: bool = False,
        out: Tensor | None = None,
    ) -> Tensor:
        """[parts, rows, outputs]: B a, for all rows of a [rows, inputs], or for the pairs, each by its expert's B.

        Where it is grouped B is by `places`, with a's rows tokens or pairs. columns: [D', inputs], those of a that are
        multiplied. ragged: B's inputs are the channels that an expert keeps, b.inputs of them at most. base: a matrix
        that is added to each B, packed as B is. exact: as in base_product. out: where to, one part.
        """
        tile, width = self.tile(b.kernel(kernel)), b.outputs
        rows = self.tokens * self.top_k if grouped else len(a)
        blocks_m = len(self.block_experts) if grouped else ceil_div(rows, tile.block_m)
        programs = blocks_m * ceil_div(width, tile.block_n)
        if out is None:
            splits = self._splits(programs, b.places, tile.block_k)
            dtype = torch.float32 if exact or splits > 1 else self.dtype
            out = self.empty(splits, rows, width, dtype=dtype)
        products.factor_product[(programs, len(out))](
            a,
            b.values,
            b.scales,
            None if base is None else base.values,
            None if base is None else base.scales,
            out,
            self.pairs if grouped else None,
            self.block_experts if grouped else None,
            places,
            columns,
            None if columns is None else column_places,
            *((None,) * 4 if ragged is None else (ragged.width, ragged.start, ragged.group_shift, ragged.group_start)),
            rows,
            b.inputs,
            width,
            b.shift if ragged is None else None,
            b.group_shift,
            b.groups,
            a.stride(0),
            b.stride,
            out.stride(1),
            0 if columns is None else columns.stride(0),
            self.top_k if grouped and len(a) == self.tokens else 1,
            0 if base is None else base.group_shift,
            SPLITS=len(out),
            **storage(b.how),
            **storage(None if base is None else base.how, "BASE_"),
            **_matrix(tile),
        )
        return out

    def mixed_product(self, x: Tensor, bases: Matrices, alpha: Tensor, *, gate_rank: int, function: str) -> Tensor:
        """[parts, pairs, k]: V x of each pair's token, V mixed from m bases [k, depth] by its expert's alpha [2 m]."""
        tile, rank, depth = self.tile(bases.kernel("shrink_mixed")), bases.outputs, bases.inputs
        count, pairs = alpha.shape[1] // 2, self.tokens * self.top_k
        block_m = min(tile.block_m, tiles.SLOT_ROWS)
        block_j = min(max(power_of_two(count), 16), tiles.mixed_at_once(self.dtype, bases.how is not None))
        groups = ceil_div(len(self.pairs), block_m * tiles.SLOTS)
        blocks_n = sum(ceil_div(part, tile.block_n) for part in (gate_rank, rank - gate_rank))
        splits = self._splits(groups * blocks_n, depth, tile.block_k)
        out = self.empty(splits, pairs, rank, dtype=torch.float32 if splits > 1 else self.dtype)
        mixing.mixed_product[(groups * blocks_n, splits)](
            x,
            bases.values,
            bases.scales,
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
            bases.stride,
            self.top_k,
            **storage(bases.how),
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
        u: Matrices | None,
        z: Tensor | None,
        *,
        width: int,
        ranks: tuple[int, ...],
        whole: bool,
        places: Tensor | None,
        columns: Tensor | None,
        column_places: Tensor | None,
        ragged: Ragged | None,
        channels: Tensor | None,
        base: Matrices | None,
        bias: Tensor | None,
        activation: str,
        swiglu: tuple[float, ...],
    ) -> Tensor:
        """h [pairs, width] from s [tokens or pairs, k], u [width, k], z [parts, tokens, 2 channels of the base] and
        bias [E, 2 width]. ranks: of gate and of up, k in all; of up alone where there is no gate, and z and bias are
        half as wide; whole: each has all of s, and u has `width` rows for each. ragged: outputs are the channels that
        an expert keeps, width of them at most; channels: which of the base's these are. base: in z's place, [2 channels
        of the base, k], packed as u is: its rows are added to u's.
        """
        limit, alpha, beta = swiglu or (0.0, 0.0, 0.0)
        pairs = self.tokens * self.top_k
        tile = self.tile("expand_gate_up" if u is None else u.kernel("expand_gate_up"))
        h = self.empty(pairs, width, dtype=self.dtype)
        products.expand_and_activate[(len(self.block_experts) * ceil_div(width, tile.block_n),)](
            s,
            None if u is None else u.values,
            None if u is None else u.scales,
            None if base is None else base.values,
            None if base is None else base.scales,
            z,
            bias,
            h,
            self.pairs,
            self.block_experts,
            places,
            columns,
            None if columns is None else column_places,
            *((None,) * 3 if ragged is None else (ragged.width, ragged.start, ragged.first)),
            channels,
            self.tokens,
            *((0, *ranks) if len(ranks) == 1 else ranks),
            width,
            z.shape[2] // len(ranks) if z is not None else width if base is None else base.outputs // len(ranks),
            0 if s is None else s.stride(0),
            0 if u is None else u.stride,
            0 if columns is None else columns.stride(0),
            1 if s is None or len(s) == pairs else self.top_k,
            self.top_k,
            0 if base is None else base.stride,
            WHOLE=whole,
            ACTIVATION=activation,
            LIMIT=limit,
            ALPHA=alpha,
            BETA=beta,
            GATED=len(ranks) == 2,
            Z_PARTS=1 if z is None else len(z),
            **storage(None if u is None else u.how),
            **storage(None if base is None else base.how, "BASE_"),
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

    def mix(self, h: Tensor, inputs: Tensor | None, dtype: torch.dtype, spots: Tensor | None = None) -> Tensor:
        """[tokens, kept]: the gate-weighted sum of h [pairs, width] over a token's experts, at the columns `inputs`.
        spots: int32 [E, kept], where among an expert's channels these are, -1 for those that it has not."""
        tile, width = self.tile("mix"), h.shape[1]
        count = width if inputs is None else len(inputs)
        if spots is not None:
            count = spots.shape[1]
        out = self.empty(self.tokens, count, dtype=dtype)
        grid = (ceil_div(self.tokens, tile.block_m), ceil_div(count, tile.block_n))
        sums.mix[grid](
            h,
            self.gates,
            self.ids,
            inputs,
            spots,
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
