"""What several kernels share.

`triton.language`'s own sum and cumsum are compiled functions, bound to the mode in which triton was first imported:
these go to the primitives below them, so that kernels can be interpreted in a process that compiles others.
"""

import triton
import triton.language as tl
from triton.language.standard import _sum_combine

GROUP_M = tl.constexpr(8)
"""Blocks of rows that are worked on together, so that what they read of the weights is still in the L2 cache."""


@triton.jit
def total(values, axis: tl.constexpr):
    """Sum over an axis."""
    return tl.reduce(values, axis, _sum_combine)


@triton.jit
def running_total(values):
    """Inclusive sums of a vector."""
    return tl.associative_scan(values, 0, _sum_combine)


@triton.jit
def ceil_div(value, by):
    return (value + by - 1) // by


@triton.jit
def block_of(program, programs, width, BLOCK_N: tl.constexpr):
    """(block of rows, block of columns) of a program among `programs`, for an output with `width` columns."""
    blocks_n = ceil_div(width, BLOCK_N)
    blocks_m = programs // blocks_n
    first = program // (GROUP_M * blocks_n) * GROUP_M
    size = tl.minimum(blocks_m - first, GROUP_M)
    within = program % (GROUP_M * blocks_n)
    return first + within % size, within // size


@triton.jit
def split_of(depth, BLOCK_K: tl.constexpr, SPLITS: tl.constexpr):
    """(start, stop) of this program's part of a sum over `depth`; start is a multiple of BLOCK_K."""
    size = ceil_div(ceil_div(depth, BLOCK_K), SPLITS) * BLOCK_K
    start = tl.program_id(1) * size
    return start, tl.minimum(start + size, depth)


@triton.jit
def load_parts(pointers, part, mask, PARTS: tl.constexpr):
    """float32 values that a split sum left as PARTS partial sums, `part` elements apart; always added in one order."""
    value = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    for place in tl.static_range(1, PARTS):
        value += tl.load(pointers + place * part, mask=mask, other=0.0)
    return value


@triton.jit
def add_product(acc, a, a_mask, b, b_mask, columns, start, stop, depth, BLOCK_K: tl.constexpr):
    """acc [M, N] + A B^T over inputs start..stop of `depth`, both with their inputs side by side.

    a, a_mask: [M, 1], where A's rows begin and which there are; b, b_mask: [1, N], likewise. columns: which of A's
    columns the inputs are, or None where they are all.
    """
    for first in range(start, stop, BLOCK_K):
        inputs = first + tl.arange(0, BLOCK_K)
        there = inputs < depth
        b_tile = tl.load(b + inputs[:, None], mask=there[:, None] & b_mask, other=0.0)
        places = inputs if columns is None else tl.load(columns + inputs, mask=there, other=0)
        a_tile = tl.load(a + places[None, :], mask=a_mask & there[None, :], other=0.0)
        acc = tl.dot(a_tile, b_tile.to(a_tile.dtype), acc, input_precision="ieee")
    return acc
