"""Matrices of few bits, in the layout of layout.py, widened in registers on their way into a product.

Words are read in whole lines, outputs side by side, and never written anywhere: a shift and a mask give a code, one
fused multiplication and addition what it stands for. That is exact in float32 and rounded once, to the type of what it
is multiplied with, as the reference rounds it.
"""

import triton
import triton.language as tl

from d2moe_vllm.ops.triton.common import add_product, ceil_div

UNIT = tl.constexpr(32)
"""layout.UNIT"""


@triton.jit
def units_of(depth, shift):
    """layout.units"""
    if shift is not None:
        depth += shift
    return (depth + UNIT - 1) // UNIT


@triton.jit
def codes_of(words, BITS: tl.constexpr):
    """int32 [R, 32 // BITS, N]: the codes of words [R, N], the first input's first."""
    shifts = tl.arange(0, 32 // BITS) * BITS
    return (words[:, None, :] >> shifts[None, :, None]) & ((1 << BITS) - 1)


@triton.jit
def widened(
    words,
    scales,
    unit,
    units,
    outputs,
    in_width,
    stride,
    group_shift,
    BITS: tl.constexpr,
    ZERO: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """float32 [BLOCK_K, BLOCK_N]: what BLOCK_K inputs, from unit `unit` on, stand for in these outputs; a word that is
    not there has scale 0.

    words: int32 [units, BITS, stride], scales: bfloat16 [groups, stride]. outputs: int32 [BLOCK_N]; in_width: bool [1,
    BLOCK_N]. group_shift: units of the first group that are elsewhere.
    """
    UNITS: tl.constexpr = BLOCK_K // UNIT
    own = unit + tl.arange(0, UNITS)
    groups = (own + group_shift) // (GROUP // UNIT)
    there = (own < units)[:, None] & in_width
    scale = tl.load(scales + groups[:, None] * stride + outputs[None, :], mask=there, other=0.0).to(tl.float32)
    if BITS == 3:
        rows = tl.arange(0, UNITS * 2)
        own_unit = unit + rows // 2
        places = own_unit * 3 + rows % 2
        low_there = (own_unit < units)[:, None] & in_width
        low = tl.load(words + places[:, None] * stride + outputs[None, :], mask=low_there, other=0)
        high = tl.load(words + (own * 3 + 2)[:, None] * stride + outputs[None, :], mask=there, other=0)
        codes = tl.reshape(codes_of(low, 2), [UNITS, UNIT, BLOCK_N]) | (codes_of(high, 1) << 2)
    else:
        rows = unit * BITS + tl.arange(0, UNITS * BITS)
        row_there = (rows < units * BITS)[:, None] & in_width
        found = tl.load(words + rows[:, None] * stride + outputs[None, :], mask=row_there, other=0)
        codes = tl.reshape(codes_of(found, BITS), [UNITS, UNIT, BLOCK_N])
    value = codes.to(tl.float32) * scale[:, None, :] - (ZERO * scale)[:, None, :]
    return tl.reshape(value, [BLOCK_K, BLOCK_N])


@triton.jit
def widened_matrices(
    words,
    scales,
    first,
    count,
    unit,
    depth,
    outputs,
    stride,
    BITS: tl.constexpr,
    ZERO: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """float32 [BLOCK_J, BLOCK_K * BLOCK_N]: the same tile of BLOCK_J matrices from number `first` on, of `count` that
    lie one after the other, each with `depth` inputs from its first on; zeros where there is no such matrix or input.
    """
    UNITS: tl.constexpr = BLOCK_K // UNIT
    # Words of a unit that are read at once: 3 bits are a plane of two and, read by itself, a plane of one.
    LINES: tl.constexpr = 2 if BITS == 3 else BITS
    units = units_of(depth, None)
    in_width = (outputs < stride)[None, :]
    rows = tl.arange(0, BLOCK_J * UNITS)
    own = unit + rows % UNITS
    numbers = (first + rows // UNITS).to(tl.int64)
    there = ((numbers < count) & (own < units))[:, None] & in_width
    groups = numbers * ceil_div(depth, GROUP) + own // (GROUP // UNIT)
    scale = tl.load(scales + groups[:, None] * stride + outputs[None, :], mask=there, other=0.0).to(tl.float32)
    lines = tl.arange(0, BLOCK_J * UNITS * LINES)
    line_unit = unit + lines // LINES % UNITS
    line_number = (first + lines // (UNITS * LINES)).to(tl.int64)
    line_there = ((line_number < count) & (line_unit < units))[:, None] & in_width
    places = (line_number * units + line_unit) * BITS + lines % LINES
    found = tl.load(words + places[:, None] * stride + outputs[None, :], mask=line_there, other=0)
    codes = tl.reshape(codes_of(found, LINES), [BLOCK_J * UNITS, UNIT, BLOCK_N])
    if BITS == 3:
        places = (numbers * units + own) * BITS + LINES
        high = tl.load(words + places[:, None] * stride + outputs[None, :], mask=there, other=0)
        codes |= codes_of(high, 1) << LINES
    value = codes.to(tl.float32) * scale[:, None, :] - (ZERO * scale)[:, None, :]
    return tl.reshape(value, [BLOCK_J, BLOCK_K * BLOCK_N])


@triton.jit
def add_widened(
    acc,
    a,
    a_mask,
    words,
    scales,
    outputs,
    in_width,
    stride,
    columns,
    shift,
    group_shift,
    start,
    stop,
    depth,
    base,
    base_scales,
    base_outputs,
    base_there,
    base_stride,
    base_group_shift,
    BITS: tl.constexpr,
    ZERO: tl.constexpr,
    GROUP: tl.constexpr,
    BASE_BITS: tl.constexpr,
    BASE_ZERO: tl.constexpr,
    BASE_GROUP: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """acc [M, BLOCK_N] + A W^T over places start..stop, whole units, of W's rows, which have `depth` inputs from place
    `shift` on (None: from the first).

    a, a_mask: [M, 1], where A's rows begin and which there are; columns: which of A's columns the inputs are, or None
    where they are all. The rest as in `widened`. base: another matrix of the same inputs, which is added to W before it
    is rounded, and after it what `widened` asks of it: its outputs are W's; None for none.
    """
    units = units_of(depth, shift)
    for first in range(start, stop, BLOCK_K):
        unit = first // UNIT
        w = widened(
            words, scales, unit, units, outputs, in_width, stride, group_shift, BITS, ZERO, GROUP, BLOCK_K, BLOCK_N
        )
        if base is not None:
            w += widened(
                base, base_scales, unit, units, base_outputs, base_there, base_stride, base_group_shift,
                BASE_BITS, BASE_ZERO, BASE_GROUP, BLOCK_K, BLOCK_N,
            )  # fmt: skip
        inputs = first + tl.arange(0, BLOCK_K)
        there = inputs < depth
        if shift is not None:
            inputs -= shift
            there = (inputs >= 0) & (inputs < depth)
        places = inputs if columns is None else tl.load(columns + inputs, mask=there, other=0)
        a_tile = tl.load(a + places[None, :], mask=a_mask & there[None, :], other=0.0)
        acc = tl.dot(a_tile, w.to(a_tile.dtype), acc, input_precision="ieee")
    return acc


@triton.jit
def add_stored(
    acc,
    a,
    a_mask,
    b,
    scales,
    outputs,
    in_width,
    stride,
    columns,
    shift,
    group_shift,
    start,
    stop,
    depth,
    base,
    base_scales,
    base_outputs,
    base_there,
    base_stride,
    base_group_shift,
    BITS: tl.constexpr,
    ZERO: tl.constexpr,
    GROUP: tl.constexpr,
    BASE_BITS: tl.constexpr,
    BASE_ZERO: tl.constexpr,
    BASE_GROUP: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """`add_widened`, or, with BITS 0, `common.add_product` with b's rows, `stride` apart, their inputs side by side."""
    if BITS == 0:
        rows = b + outputs.to(tl.int64)[None, :] * stride
        acc = add_product(acc, a, a_mask, rows, in_width, columns, start, stop, depth, BLOCK_K)
    else:
        acc = add_widened(
            acc, a, a_mask, b, scales, outputs, in_width, stride, columns, shift, group_shift, start, stop, depth,
            base, base_scales, base_outputs, base_there, base_stride, base_group_shift,
            BITS, ZERO, GROUP, BASE_BITS, BASE_ZERO, BASE_GROUP, BLOCK_K, BLOCK_N,
        )  # fmt: skip
    return acc
