"""The product with a V that is mixed from bases (METHODS 3), for many experts at once, so that bases are read once."""

import triton
import triton.language as tl

from d2moe_vllm.ops.triton.common import block_of, ceil_div, split_of


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
def add_mix(mix, alphas, bases, first, count, basis_stride, there, mask, BLOCK_J: tl.constexpr):
    """mix [SLOTS, N * K] + what BLOCK_J bases from `first` give. alphas: [SLOTS, 1] and bases: [1, N * K], pointers to
    the first basis' values; there, mask: which of them are any."""
    numbers = first + tl.arange(0, BLOCK_J)
    known = numbers < count
    factors = tl.load(alphas + numbers[None, :], mask=there & known[None, :], other=0.0)
    starts = numbers.to(tl.int64)[:, None] * basis_stride
    tile = tl.load(bases + starts, mask=known[:, None] & mask, other=0.0)
    return tl.dot(factors, tile, mix, input_precision="ieee")


@triton.jit(do_not_specialize=["rows", "max_blocks"])
def mixed_product(
    x,
    bases,
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
    top_k,
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

    x: [tokens, depth]. bases: [count, rank, depth], gate's gate_rank rows before up's. alpha: [D, 2 count], gate's
    before up's; expert e's stand at e. out: [SPLITS, rows, rank]. pairs, block_experts: see routing.align, in blocks of
    PAIRS_M, a multiple of BLOCK_M; SLOTS pieces of BLOCK_M rows are worked on at once. V is rounded to the weights'
    type where the reference rounds it: after mixing, and after f. No program has rows of both gate and up. BLOCKS_J: of
    BLOCK_J bases, in all.
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
    # A tile of V as one row of the mix, its inputs side by side.
    tile = tl.arange(0, BLOCK_N * BLOCK_K)
    tile_rows, tile_inputs = first_row + tile // BLOCK_K, tile % BLOCK_K
    tile_start = bases + (tile_rows.to(tl.int64) * depth + tile_inputs)[None, :]
    basis_stride = tl.cast(rank, tl.int64) * depth
    x_start = x + (own // top_k).to(tl.int64)[:, :, None] * depth
    start, stop = split_of(depth, BLOCK_K, SPLITS)
    acc = tl.full([SLOTS, BLOCK_M, BLOCK_N], 0.0, tl.float32)
    for first in range(start, stop, BLOCK_K):
        mask = ((tile_rows < end_row) & (first + tile_inputs < depth))[None, :]
        mix = tl.full([SLOTS, BLOCK_N * BLOCK_K], 0.0, tl.float32)
        known = (experts >= 0)[:, None]
        if BLOCKS_J == 1:
            mix = add_mix(mix, alphas, tile_start + first, 0, count, basis_stride, known, mask, BLOCK_J)
        else:
            for basis in range(0, count, BLOCK_J):
                mix = add_mix(mix, alphas, tile_start + first, basis, count, basis_stride, known, mask, BLOCK_J)
        v = function(mix.to(bases.dtype.element_ty).to(tl.float32), FUNCTION).to(bases.dtype.element_ty)
        v = tl.permute(tl.reshape(v, [SLOTS, BLOCK_N, BLOCK_K]), (0, 2, 1))
        inputs = (first + tl.arange(0, BLOCK_K))[None, None, :]
        x_tile = tl.load(x_start + inputs, mask=there & (inputs < depth), other=0.0)
        acc = tl.dot(x_tile, v, acc, input_precision="ieee")
    columns = (first_row + tl.arange(0, BLOCK_N))[None, None, :]
    out_rows = tl.program_id(1).to(tl.int64) * rows + own.to(tl.int64)
    tl.store(
        out + out_rows[:, :, None] * rank + columns, acc.to(out.dtype.element_ty), mask=there & (columns < end_row)
    )
