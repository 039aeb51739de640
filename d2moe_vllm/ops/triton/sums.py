"""Gate-weighted sums over a token's experts in the order of its choices: no atomics, the same bits each time."""

import triton
import triton.language as tl

from d2moe_vllm.ops.triton.common import load_parts


@triton.jit(do_not_specialize=["rows"])
def mix(
    h,
    gates,
    ids,
    inputs,
    spots,
    out,
    rows,
    width,
    count,
    num_experts,
    TOP_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out [rows, count] = sum_k gates[:, k] h[row * TOP_K + k], in float32, at the columns the base has kept.

    h: [rows * TOP_K, width]. gates: float32, ids: int32 [rows, TOP_K]; what is not one of num_experts adds nothing.
    inputs: int32 [count], or None where count is width. spots: int32 [num_experts, count], where in an expert's row of
    h they are, -1 where it has none; None where all experts have all.
    """
    own = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    kept = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    there, in_count = own < rows, kept < count
    columns = kept if inputs is None else tl.load(inputs + kept, mask=in_count, other=0)
    acc = tl.full([BLOCK_M, BLOCK_N], 0.0, tl.float32)
    for choice in tl.static_range(TOP_K):
        pair = own * TOP_K + choice
        expert = tl.load(ids + pair, mask=there, other=-1)
        here = there & (expert >= 0) & (expert < num_experts)
        gate = tl.load(gates + pair, mask=here, other=0.0)
        mask = here[:, None] & in_count[None, :]
        places = columns[None, :]
        if spots is not None:
            own_spots = spots + tl.maximum(expert, 0).to(tl.int64)[:, None] * count + columns[None, :]
            places = tl.load(own_spots, mask=mask, other=-1)
            mask = places >= 0
        pointers = h + pair.to(tl.int64)[:, None] * width + places
        acc += gate[:, None] * tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    pointers = out + own.to(tl.int64)[:, None] * count + kept[None, :]
    tl.store(pointers, acc.to(out.dtype.element_ty), mask=there[:, None] & in_count[None, :])


@triton.jit(do_not_specialize=["rows"])
def combine(
    base,
    deltas,
    bias,
    gates,
    ids,
    y,
    rows,
    width,
    num_experts,
    TOP_K: tl.constexpr,
    BASE_PARTS: tl.constexpr,
    DELTA_PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y [rows, width] = sum of base's parts + sum_k gates[:, k] times the sum of deltas' parts and bias, rounded once.

    base: [BASE_PARTS, rows, width], deltas: [DELTA_PARTS, rows * TOP_K, width], bias: [num_experts, width], each None
    where there is none.
    """
    own = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    there, in_width = own < rows, (columns < width)[None, :]
    long_rows = tl.cast(rows, tl.int64)
    acc = tl.full([BLOCK_M, BLOCK_N], 0.0, tl.float32)
    if deltas is not None or bias is not None:
        for choice in tl.static_range(TOP_K):
            pair = own * TOP_K + choice
            expert = tl.load(ids + pair, mask=there, other=-1)
            here = there & (expert >= 0) & (expert < num_experts)
            gate = tl.load(gates + pair, mask=here, other=0.0)
            here = here[:, None] & in_width
            gives = tl.full([BLOCK_M, BLOCK_N], 0.0, tl.float32)
            if deltas is not None:
                pointers = deltas + pair.to(tl.int64)[:, None] * width + columns[None, :]
                gives += load_parts(pointers, TOP_K * long_rows * width, here, DELTA_PARTS)
            if bias is not None:
                pointers = bias + expert.to(tl.int64)[:, None] * width + columns[None, :]
                gives += tl.load(pointers, mask=here, other=0.0).to(tl.float32)
            acc += gate[:, None] * gives
    if base is not None:
        pointers = base + own.to(tl.int64)[:, None] * width + columns[None, :]
        acc += load_parts(pointers, long_rows * width, there[:, None] & in_width, BASE_PARTS)
    pointers = y + own.to(tl.int64)[:, None] * width + columns[None, :]
    tl.store(pointers, acc.to(y.dtype.element_ty), mask=there[:, None] & in_width)


@triton.jit(do_not_specialize=["count"])
def add_parts(parts, out, count, PARTS: tl.constexpr, BLOCK_N: tl.constexpr):
    """out [count] = the sum of parts: float32 [PARTS, count].

    A launch of its own where the sum is an input of a product: that kernel would keep every part in shared memory.
    """
    places = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    value = load_parts(parts + places, tl.cast(count, tl.int64), places < count, PARTS)
    tl.store(out + places, value.to(out.dtype.element_ty), mask=places < count)
