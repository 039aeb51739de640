"""Matrix products: the base's over chosen inputs, and those of factors, for all rows or expert by expert."""

import triton
import triton.language as tl

from d2moe_vllm.ops.triton.common import block_of, ceil_div, load_parts, split_of
from d2moe_vllm.ops.triton.stored import UNIT, add_stored, units_of


@triton.jit(do_not_specialize=["rows"])
def base_product(
    x,
    base,
    chosen,
    out,
    rows,
    depth,
    width,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out [SPLITS, rows, width] = x @ base[chosen], partial sums over the inputs.

    x: [rows, depth], packed: only the inputs that are used. base: [kept, width], input-major, so that an input that is
    not chosen is a contiguous row that is not read. chosen: int32 [depth], or None where depth is kept.
    """
    block_m, block_n = block_of(tl.program_id(0), tl.num_programs(0), width, BLOCK_N)
    own = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    there, in_width = (own < rows)[:, None], (columns < width)[None, :]
    x_rows = x + own.to(tl.int64)[:, None] * depth
    start, stop = split_of(depth, BLOCK_K, SPLITS)
    acc = tl.full([BLOCK_M, BLOCK_N], 0.0, tl.float32)
    steps = tl.arange(0, BLOCK_K)
    next_places = start + steps
    if chosen is not None:
        next_places = tl.load(chosen + start + steps, mask=start + steps < depth, other=0)
    for first in range(start, stop, BLOCK_K):
        inputs = first + steps
        in_depth = inputs < depth
        places = inputs
        if chosen is not None:
            # Read one step early: loads whose addresses are loaded in the same step would halve the pipeline's depth.
            places = next_places
            next_places = tl.load(chosen + inputs + BLOCK_K, mask=inputs + BLOCK_K < depth, other=0)
        b_tile = tl.load(
            base + places.to(tl.int64)[:, None] * width + columns[None, :], mask=in_depth[:, None] & in_width, other=0.0
        )
        a_tile = tl.load(x_rows + inputs[None, :], mask=there & in_depth[None, :], other=0.0)
        acc = tl.dot(a_tile, b_tile.to(a_tile.dtype), acc, input_precision="ieee")
    pointers = out + (tl.program_id(1).to(tl.int64) * rows + own.to(tl.int64)[:, None]) * width + columns[None, :]
    tl.store(pointers, acc.to(out.dtype.element_ty), mask=there & in_width)


@triton.jit(do_not_specialize=["rows"])
def factor_product(
    a,
    b,
    scales,
    base,
    base_scales,
    out,
    pairs,
    block_experts,
    places,
    columns,
    column_places,
    kept,
    starts,
    group_shifts,
    group_starts,
    rows,
    depth,
    width,
    shift,
    group_shift,
    groups,
    a_stride,
    b_stride,
    out_stride,
    columns_stride,
    a_divisor,
    base_group_shift,
    BITS: tl.constexpr,
    ZERO: tl.constexpr,
    GROUP: tl.constexpr,
    BASE_BITS: tl.constexpr,
    BASE_ZERO: tl.constexpr,
    BASE_GROUP: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[:, row] = B a[row // a_divisor], partial sums over the inputs; a and B have their inputs side by side.

    a: [a's rows, a_stride], of which the first `depth` columns are used, or those that `columns` names.
    b: [width, b_stride], or one such matrix per place of an expert; with BITS codes of as many bits, of which `scales`
    has `groups` rows for each matrix (layout.py); shift, group_shift: see `stored.add_widened`. out: [SPLITS, rows,
    out_stride].
    pairs, block_experts: see routing.align: each block of rows is one expert's; None: row i of all rows is row i, and
    B one matrix. places: int32 [experts], where an expert's B is, -1 for none, which gives zeros; None: expert e's
    is at e. columns, column_places: int32 [D', columns_stride] and the same for them; None where there are none.
    kept: where experts keep some channels only and these are B's inputs, layout.Ragged's width, and after it its start,
    group_shift and group_start, in the place of depth, places and group_shift.
    base: codes of BASE_BITS bits of one matrix of B's size, which is added to every expert's; None for none.
    """
    block_m, block_n = block_of(tl.program_id(0), tl.num_programs(0), width, BLOCK_N)
    outputs = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    own = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    there = own < rows
    in_all = depth
    here = True
    if pairs is not None:
        expert = tl.load(block_experts + block_m)
        if expert < 0:
            return
        own = tl.load(pairs + own)
        there = own >= 0
        if kept is not None:
            first = tl.load(starts + expert)
            # Multiples of it they are anyway: now the compiler knows.
            depth = tl.load(kept + expert) // UNIT * UNIT
            in_all = tl.where(first < 0, 0, depth)
            long_first = tl.maximum(first, 0).to(tl.int64)
            if BITS == 0:
                b_stride = depth
                b += long_first * width
            else:
                group_shift = tl.load(group_shifts + expert)
                b += long_first // UNIT * BITS * b_stride
                scales += tl.load(group_starts + expert).to(tl.int64) * b_stride
        else:
            place = expert
            if places is not None:
                place = tl.load(places + expert)
                here = place >= 0
                if base is None:
                    in_all = tl.where(here, depth, 0)
                place = tl.maximum(place, 0)
            if BITS == 0:
                b += place.to(tl.int64) * width * b_stride
            else:
                b += place.to(tl.int64) * units_of(depth, shift) * BITS * b_stride
                scales += place.to(tl.int64) * groups * b_stride
        if columns is not None:
            column_place = expert
            if column_places is not None:
                column_place = tl.maximum(tl.load(column_places + expert), 0)
            columns += column_place.to(tl.int64) * columns_stride
    in_width = (outputs < width)[None, :]
    if BITS != 0:
        in_all = tl.where(in_all > 0, units_of(depth, shift) * UNIT, 0)
        # Outputs are padded: a line is there or not as a whole.
        in_width = (outputs < b_stride)[None, :]
    base_there = in_width
    if base is not None:
        in_width = in_width & here
    start, stop = split_of(in_all, BLOCK_K, SPLITS)
    a_start = a + (own // a_divisor).to(tl.int64)[:, None] * a_stride
    acc = tl.full([BLOCK_M, BLOCK_N], 0.0, tl.float32)
    acc = add_stored(
        acc, a_start, there[:, None], b, scales, outputs, in_width, b_stride, columns, shift, group_shift,
        start, stop, depth, base, base_scales, outputs, base_there, b_stride, base_group_shift,
        BITS, ZERO, GROUP, BASE_BITS, BASE_ZERO, BASE_GROUP, BLOCK_K, BLOCK_N,
    )  # fmt: skip
    out_rows = tl.program_id(1).to(tl.int64) * rows + own.to(tl.int64)
    pointers = out + out_rows[:, None] * out_stride + outputs[None, :]
    tl.store(pointers, acc.to(out.dtype.element_ty), mask=there[:, None] & (outputs < width)[None, :])


@triton.jit
def activate(value, ACTIVATION: tl.constexpr):
    """silu, gelu, gelu_tanh or relu2 of float32."""
    if ACTIVATION == "silu":
        value = value / (1.0 + tl.exp(-value))
    elif ACTIVATION == "gelu":
        value = 0.5 * value * (1.0 + tl.erf(value * 0.7071067811865476))
    elif ACTIVATION == "relu2":
        value = tl.where(value < 0.0, 0.0, value)  # what is no number stays none
        value = value * value
    else:
        # (1 + tanh(y)) / 2 is 1 / (1 + exp(-2 y)).
        value = value / (1.0 + tl.exp(-1.5957691216057308 * (value + 0.044715 * value * value * value)))
    return value


@triton.jit
def clamped(gate, up, LIMIT: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr):
    """The clamped SwiGLU of LayerSpec.swiglu, of float32."""
    gate = tl.where(gate > LIMIT, LIMIT, gate)
    up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
    return gate / (1.0 + tl.exp(-ALPHA * gate)) * (up + BETA)


@triton.jit(do_not_specialize=["z_rows"])
def expand_and_activate(
    s,
    u,
    scales,
    base,
    base_scales,
    z,
    bias,
    h,
    pairs,
    block_experts,
    places,
    columns,
    column_places,
    kept,
    starts,
    firsts,
    channels,
    z_rows,
    gate_rank,
    up_rank,
    width,
    z_width,
    s_stride,
    u_stride,
    columns_stride,
    s_divisor,
    top_k,
    base_stride,
    WHOLE: tl.constexpr,
    BITS: tl.constexpr,
    ZERO: tl.constexpr,
    GROUP: tl.constexpr,
    BASE_BITS: tl.constexpr,
    BASE_ZERO: tl.constexpr,
    BASE_GROUP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    BETA: tl.constexpr,
    GATED: tl.constexpr,
    Z_PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """h[pair] = act(z^gate[token] + U^gate s^gate) * (z^up[token] + U^up s^up), gate and up in one program, each with
    the expert's of bias [experts, 2 width] where there is one. LIMIT: 0, or `clamped` takes the place of act and *. Not
    GATED: h[pair] = act(z^up[token] + U^up s^up), gate_rank is 0, and what is 2 width wide is width wide.

    s: [s's rows, s_stride], row pair // s_divisor, gate's columns first; where `columns` is given they name
    columns of s instead; WHOLE: gate and up have the same. u: [D, width, u_stride], gate's columns first, or, WHOLE,
    [D, 2 width, u_stride], gate's rows first; with BITS codes of as many bits, gate's matrix before up's, with scales
    (layout.py). None: no expert has deltas. z: [Z_PARTS, z_rows, 2 z_width]; None: there is no base. h: [pairs, width].
    kept: where experts keep some channels only, layout.Ragged's width, and after it its start and first: what of h is
    whose; channels: which channels of z, or of the base, these are (layout._places). base: codes of one matrix [2
    z_width, inputs], rows of which are added to an expert's before the product, in the place of z; WHOLE alone. The
    rest as in factor_product.
    """
    block_m, block_n = block_of(tl.program_id(0), tl.num_programs(0), width, BLOCK_N)
    expert = tl.load(block_experts + block_m)
    if expert < 0:
        return
    h_stride = width
    if kept is not None:
        width = tl.load(kept + expert) // UNIT * UNIT
        if block_n * BLOCK_N >= width:
            return
    own = tl.load(pairs + block_m * BLOCK_M + tl.arange(0, BLOCK_M))
    there = (own >= 0)[:, None]
    outputs = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    in_width = (outputs < width)[None, :]
    gate = tl.full([BLOCK_M, BLOCK_N], 0.0, tl.float32)
    up = tl.full([BLOCK_M, BLOCK_N], 0.0, tl.float32)
    if u is not None:
        gate_rank_used = gate_rank
        up_rank_used = up_rank
        place = expert
        here = True
        if kept is not None:
            place = tl.load(starts + expert)
            here = place >= 0
        elif places is not None:
            place = tl.load(places + expert)
            here = place >= 0
        # An expert without deltas still has the base, where this is added to them.
        if base is None:
            gate_rank_used = tl.where(here, gate_rank, 0)
            up_rank_used = tl.where(here, up_rank, 0)
        place = tl.maximum(place, 0).to(tl.int64)
        if kept is None:
            place *= width
        # From here on `place` counts outputs before the expert's.
        s_start = s + (own // s_divisor).to(tl.int64)[:, None] * s_stride
        s_up = s_start
        if columns is None:
            gate_columns = None
            up_columns = None
            if not WHOLE:
                s_up = s_start + gate_rank
        else:
            column_place = expert
            if column_places is not None:
                column_place = tl.maximum(tl.load(column_places + expert), 0)
            gate_columns = columns + column_place.to(tl.int64) * columns_stride
            up_columns = gate_columns + gate_rank
        stored = in_width
        up_scales = scales
        if BITS == 0:
            if WHOLE and GATED:
                u += place * 2 * u_stride
                u_up = u + tl.cast(width, tl.int64) * u_stride
            else:
                u += place * u_stride
                u_up = u + gate_rank
        else:
            if kept is not None:
                u_stride = width
                before = place
            else:
                before = place // width * u_stride
            # Outputs are padded: a line is there or not as a whole.
            stored = (outputs < u_stride)[None, :]
            gate_units = units_of(gate_rank, None)
            gate_groups = ceil_div(gate_rank, GROUP)
            u += before * (gate_units + units_of(up_rank, None)) * BITS
            u_up = u + tl.cast(gate_units * BITS, tl.int64) * u_stride
            scales += before * (gate_groups + ceil_div(up_rank, GROUP))
            up_scales = scales + gate_groups * u_stride
            gate_rank_used = units_of(gate_rank_used, None) * UNIT
            up_rank_used = units_of(up_rank_used, None) * UNIT
        base_columns = outputs
        base_up = z_width if GATED else 0
        base_there = in_width
        if base is not None:
            stored = stored & here
            if channels is not None:
                own_channels = channels + tl.load(firsts + expert) + outputs
                base_columns = tl.load(own_channels, mask=outputs < width, other=-1)
                base_there = (base_columns >= 0)[None, :]
        if GATED:
            gate = add_stored(
                gate, s_start, there, u, scales, outputs, stored, u_stride, gate_columns, None, 0,
                0, gate_rank_used, gate_rank, base, base_scales, base_columns, base_there, base_stride, 0,
                BITS, ZERO, GROUP, BASE_BITS, BASE_ZERO, BASE_GROUP, BLOCK_K, BLOCK_N,
            )  # fmt: skip
        up = add_stored(
            up, s_up, there, u_up, up_scales, outputs, stored, u_stride, up_columns, None, 0,
            0, up_rank_used, up_rank, base, base_scales, base_columns + base_up, base_there, base_stride, 0,
            BITS, ZERO, GROUP, BASE_BITS, BASE_ZERO, BASE_GROUP, BLOCK_K, BLOCK_N,
        )  # fmt: skip
    first = 0
    if kept is not None:
        first = tl.load(firsts + expert)
    if z is not None:
        z_columns = outputs
        z_there = in_width
        if channels is not None:
            z_columns = tl.load(channels + first + outputs, mask=outputs < width, other=-1)
            z_there = (z_columns >= 0)[None, :]
        z_stride = 2 * z_width if GATED else z_width
        z_start = z + (own // top_k).to(tl.int64)[:, None] * z_stride + z_columns[None, :]
        z_part = tl.cast(z_rows, tl.int64) * z_stride
        if GATED:
            gate += load_parts(z_start, z_part, there & z_there, Z_PARTS)
            z_start += z_width
        up += load_parts(z_start, z_part, there & z_there, Z_PARTS)
    if bias is not None:
        if kept is not None:
            own_bias = bias + tl.cast(first, tl.int64) * (2 if GATED else 1) + outputs
        else:
            own_bias = bias + expert.to(tl.int64) * (2 * width if GATED else width) + outputs
        if GATED:
            gate += tl.load(own_bias, mask=outputs < width, other=0.0).to(tl.float32)[None, :]
            own_bias += width
        up += tl.load(own_bias, mask=outputs < width, other=0.0).to(tl.float32)[None, :]
    if not GATED:
        hidden = activate(up, ACTIVATION)
    elif LIMIT > 0:
        hidden = clamped(gate, up, LIMIT, ALPHA, BETA)
    else:
        hidden = activate(gate, ACTIVATION) * up
    pointers = h + own.to(tl.int64)[:, None] * h_stride + outputs[None, :]
    tl.store(pointers, hidden.to(h.dtype.element_ty), mask=there & in_width)
