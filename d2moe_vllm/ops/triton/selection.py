"""Dynamic pruning (METHODS 1.5): which kept columns of the base are used, as reference.select_columns decides it."""

import triton
import triton.language as tl

from d2moe_vllm.ops.triton.common import running_total, total


@triton.jit
def best(scores, valid, count):
    """The `count` highest of a vector of scores, of equal ones the first; NaN counts as highest, as in torch's sort.

    The bits of a float are in the order of its values once those of a negative one are turned over: the lowest that is
    taken is found bit by bit, in 32 counts and without sorting. Exactly `count` are taken, whatever the scores are.
    """
    bits = (scores + 0.0).to(tl.int32, bitcast=True)  # -0 is 0
    keys = tl.where(scores != scores, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    keys = tl.where(valid, keys, -0x80000000)
    threshold = tl.full([], -0x80000000, tl.int32)
    threshold = tl.where(total((keys >= 0).to(tl.int32), 0) >= count, 0, threshold)
    for bit in tl.static_range(31):
        candidate = threshold + (1 << (30 - bit))
        threshold = tl.where(total((keys >= candidate).to(tl.int32), 0) >= count, candidate, threshold)
    above = keys > threshold
    equal = keys == threshold
    needed = count - total(above.to(tl.int32), 0)
    return above | (equal & (running_total(equal.to(tl.int32)) <= needed))


@triton.jit(do_not_specialize=["rows"])
def column_squares(
    x,
    padding,
    squares,
    rows,
    width,
    PROGRAM_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """squares: float32 [ceil(rows / PROGRAM_ROWS), width], sums of squares of x [rows, width] but for padding."""
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(1) * PROGRAM_ROWS
    sums = tl.full([BLOCK_N], 0.0, tl.float32)
    for start in range(0, PROGRAM_ROWS, BLOCK_M):
        own = first + start + tl.arange(0, BLOCK_M)
        there = own < rows
        if padding is not None:
            there &= tl.load(padding + own, mask=there, other=1) == 0
        mask = there[:, None] & (columns < width)[None, :]
        value = tl.load(x + own.to(tl.int64)[:, None] * width + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        sums += total(value * value, 0)
    tl.store(squares + tl.program_id(1).to(tl.int64) * width + columns, sums, mask=columns < width)


@triton.jit(do_not_specialize=["rows"])
def select_for_batch(
    x,
    padding,
    inputs,
    norms,
    chosen,
    chosen_inputs,
    packed,
    rows,
    width,
    group_size,
    group_used,
    SQUARED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """One program per group of columns; all rows but padding share one choice.

    x: [rows, width]; SQUARED: it holds partial sums of squares, and padding is left out already. inputs: int32 [kept],
    the columns of x that are kept, or None where all are. norms: float32 [kept]. Writes, ascending, chosen and
    chosen_inputs: int32 [used], places among the kept columns and columns of x. packed: [rows, used], what x has
    there, or None where that is another kernel's work: with many rows 8 programs would be too few.
    """
    group = tl.program_id(0)
    within = tl.arange(0, BLOCK_G)
    valid = within < group_size
    kept = group * group_size + within
    columns = kept if inputs is None else tl.load(inputs + kept, mask=valid, other=0)
    sums = tl.full([BLOCK_G], 0.0, tl.float32)
    for start in range(0, rows, BLOCK_M):
        own = start + tl.arange(0, BLOCK_M)
        there = own < rows
        if padding is not None:
            there &= tl.load(padding + own, mask=there, other=1) == 0
        pointers = x + own.to(tl.int64)[:, None] * width + columns[None, :]
        value = tl.load(pointers, mask=there[:, None] & valid[None, :], other=0.0).to(tl.float32)
        if SQUARED:
            sums += total(value, 0)
        else:
            sums += total(value * value, 0)
    scores = tl.sqrt_rn(sums) * tl.load(norms + kept, mask=valid, other=0.0)
    taken = best(scores, valid, group_used)
    place = group * group_used + running_total(taken.to(tl.int32)) - 1
    tl.store(chosen + place, kept, mask=taken)
    tl.store(chosen_inputs + place, columns, mask=taken)
    if packed is not None:
        used = tl.num_programs(0) * group_used
        for start in range(0, rows, BLOCK_M):
            own = start + tl.arange(0, BLOCK_M)
            mask = (own < rows)[:, None] & taken[None, :]
            value = tl.load(x + own.to(tl.int64)[:, None] * width + columns[None, :], mask=mask, other=0.0)
            pointers = packed + own.to(tl.int64)[:, None] * used + place[None, :]
            tl.store(pointers, value.to(packed.dtype.element_ty), mask=mask)


@triton.jit
def select_for_token(x, inputs, norms, packed, width, group_size, group_used, BLOCK_G: tl.constexpr):
    """One program per row and group: packed [rows, kept] is x [rows, width] at the kept columns, 0 where not chosen."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    within = tl.arange(0, BLOCK_G)
    valid = within < group_size
    kept = group * group_size + within
    columns = kept if inputs is None else tl.load(inputs + kept, mask=valid, other=0)
    value = tl.load(x + row * width + columns, mask=valid, other=0.0)
    scores = tl.abs(value.to(tl.float32)) * tl.load(norms + kept, mask=valid, other=0.0)
    taken = best(scores, valid, group_used)
    pointers = packed + row * (tl.num_programs(1) * group_size) + kept
    tl.store(pointers, tl.where(taken, value, 0.0).to(packed.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["rows"])
def gather(x, inputs, packed, rows, width, count, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """packed [rows, count] = x [rows, width] at columns inputs: int32 [count]."""
    own = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    places = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.load(inputs + places, mask=places < count, other=0)
    mask = (own < rows)[:, None] & (places < count)[None, :]
    value = tl.load(x + own.to(tl.int64)[:, None] * width + columns[None, :], mask=mask, other=0.0)
    pointers = packed + own.to(tl.int64)[:, None] * count + places[None, :]
    tl.store(pointers, value.to(packed.dtype.element_ty), mask=mask)
