"""The product with a V that is mixed from bases (METHODS 3), for many experts at once, so that bases are read once."""

import triton
import triton.language as tl

from d2moe_vllm.ops.triton.common import block_of, ceil_div, split_of
from d2moe_vllm.ops.triton.stored import UNIT, widened_matrices


@triton.jit
def function(value, FUNCTION: tl.constexpr):
    """silu or tanh of float32."""
    if FUNCTION == "silu":
        value = value / (1.0 + tl.exp(-value))
    else:
        # Near zero, where 1 - e would cancel, its series, which is exact to 1e-7 below 0.1.
        square = value * value
        small = value * (1.0 + square * (-0.3333333333333333 + square * 0.13333333333333333))
        e = tl.exp(-2.0 * tl.abs(value))
        large = (1.0 - e) / (1.0 + e)
        value = tl.where(square < 0.01, small, tl.where(value < 0.0, -large, large))
    return value


@triton.jit
def add_mix(
    mix,
    alphas,
    there,
    first,
    count,
    bases,
    basis_stride,
    mask,
    scales,
    unit,
    depth,
    rows,
    stride,
    BITS: tl.constexpr,
    ZERO: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """mix [SLOTS, N * K] + what BLOCK_J bases from `first` give; with BITS [SLOTS, K * N]. alphas: [SLOTS, 1], pointers
    to the first basis' factors; there: which of them are any. bases: [1, N * K], pointers to the first basis' values;
    mask: which of them are any. With BITS their codes instead, and scales to where `stride` as in
    stored.widened_matrices, of the bases' rows `rows` and the inputs from unit `unit` on.
    """
    numbers = first + tl.arange(0, BLOCK_J)
    known = numbers < count
    factors = tl.load(alphas + numbers[None, :], mask=there & known[None, :], other=0.0)
    if BITS == 0:
        starts = numbers.to(tl.int64)[:, None] * basis_stride
        tile = tl.load(bases + starts, mask=known[:, None] & mask, other=0.0)
    else:
        tile = widened_matrices(
            bases, scales, first, count, unit, depth, rows, stride, BITS, ZERO, GROUP, BLOCK_J, BLOCK_K, BLOCK_N
        ).to(factors.dtype)
    return tl.dot(factors, tile, mix, input_precision="ieee")


@triton.jit(do_not_specialize=["rows", "max_blocks"])
def mixed_product(
    x,
    bases,
    scales,
    alpha,
    out,
    pairs,
    block_experts,
    rows,
    max_blocks,
    count,
    gate_rank,
    rank,
    depth,
    bases_stride,
    top_k,
    BITS: tl.constexpr,
    ZERO: tl.constexpr,
    GROUP: tl.constexpr,
    FUNCTION: tl.constexpr,
    SPLITS: tl.constexpr,
    PAIRS_M: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCKS_J: tl.constexpr,
):
    """out[:, pair] = f(sum_j alpha[expert, j] bases[j]) x[pair // top_k], partial sums over the inputs.

    x: [tokens, depth]. bases: [count, rank, depth], gate's gate_rank rows before up's; with BITS codes of as many bits,
    of count matrices [rank, depth], bases_stride words from one line to the next, and their scales (layout.py). alpha:
    [D, 2 count], gate's before up's; expert e's stand at e. out: [SPLITS, rows, rank]. pairs, block_experts: see
    routing.align, in blocks of PAIRS_M, a multiple of BLOCK_M; SLOTS pieces of BLOCK_M rows are worked on at once.
    Bases and V are rounded to the weights' type where the reference rounds them: before mixing, after it, and after f.
    No program has rows of both gate and up. BLOCKS_J: of BLOCK_J bases, in all.
    """
    gate_blocks = ceil_div(gate_rank, BLOCK_N)
    blocks_n = gate_blocks + ceil_div(rank - gate_rank, BLOCK_N)
    group, block_n = block_of(tl.program_id(0), tl.num_programs(0), blocks_n * BLOCK_N, BLOCK_N)
    slots = group * SLOTS + tl.arange(0, SLOTS)
    if tl.load(block_experts + group * SLOTS * BLOCK_M // PAIRS_M) < 0:
        return
    experts = tl.load(block_experts + slots * BLOCK_M // PAIRS_M, mask=slots * BLOCK_M < max_blocks * PAIRS_M, other=-1)
    places = slots[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    own = tl.load(pairs + places, mask=(experts >= 0)[:, None], other=-1)
    there = (own >= 0)[:, :, None]

    is_up = block_n >= gate_blocks
    first_row = tl.where(is_up, gate_rank + (block_n - gate_blocks) * BLOCK_N, block_n * BLOCK_N)
    end_row = tl.where(is_up, rank, gate_rank)
    alphas = alpha + (experts.to(tl.int64) * 2 + is_up.to(tl.int64))[:, None] * count
    # A tile of V as one row of the mix, its inputs side by side; its rows, where these are in words.
    tile = tl.arange(0, BLOCK_N * BLOCK_K)
    tile_rows, tile_inputs = first_row + tile // BLOCK_K, tile % BLOCK_K
    own_rows = first_row + tl.arange(0, BLOCK_N)
    tile_start = bases
    if BITS == 0:
        tile_start += (tile_rows.to(tl.int64) * depth + tile_inputs)[None, :]
    basis_stride = tl.cast(rank, tl.int64) * depth
    x_start = x + (own // top_k).to(tl.int64)[:, :, None] * depth
    start, stop = split_of(depth, BLOCK_K, SPLITS)
    acc = tl.full([SLOTS, BLOCK_M, BLOCK_N], 0.0, tl.float32)
    for first in range(start, stop, BLOCK_K):
        mask = ((tile_rows < end_row) & (first + tile_inputs < depth))[None, :]
        mix = tl.full([SLOTS, BLOCK_N * BLOCK_K], 0.0, tl.float32)
        known = (experts >= 0)[:, None]
        own_start = tile_start
        if BITS == 0:
            own_start += first
        if BLOCKS_J == 1:
            mix = add_mix(
                mix, alphas, known, 0, count, own_start, basis_stride, mask, scales, first // UNIT, depth, own_rows,
                bases_stride, BITS, ZERO, GROUP, BLOCK_J, BLOCK_K, BLOCK_N,
            )  # fmt: skip
        else:
            for basis in range(0, count, BLOCK_J):
                mix = add_mix(
                    mix, alphas, known, basis, count, own_start, basis_stride, mask, scales, first // UNIT, depth,
                    own_rows, bases_stride, BITS, ZERO, GROUP, BLOCK_J, BLOCK_K, BLOCK_N,
                )  # fmt: skip
        v = function(mix.to(x.dtype.element_ty).to(tl.float32), FUNCTION).to(x.dtype.element_ty)
        if BITS == 0:
            v = tl.permute(tl.reshape(v, [SLOTS, BLOCK_N, BLOCK_K]), (0, 2, 1))
        else:
            v = tl.reshape(v, [SLOTS, BLOCK_K, BLOCK_N])
        inputs = (first + tl.arange(0, BLOCK_K))[None, None, :]
        x_tile = tl.load(x_start + inputs, mask=there & (inputs < depth), other=0.0)
        acc = tl.dot(x_tile, v, acc, input_precision="ieee")
    columns = (first_row + tl.arange(0, BLOCK_N))[None, None, :]
    out_rows = tl.program_id(1).to(tl.int64) * rows + own.to(tl.int64)
    tl.store(
        out + out_rows[:, :, None] * rank + columns, acc.to(out.dtype.element_ty), mask=there & (columns < end_row)
    )
