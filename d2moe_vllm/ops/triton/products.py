"""Matrix products: the base's over chosen inputs, and those of factors, for all rows or expert by expert."""

import triton
import triton.language as tl

from d2moe_vllm.ops.triton.common import add_product, block_of, load_parts, split_of


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
        acc = tl.dot(a_tile, b_tile, acc, input_precision="ieee")
    pointers = out + (tl.program_id(1).to(tl.int64) * rows + own.to(tl.int64)[:, None]) * width + columns[None, :]
    tl.store(pointers, acc.to(out.dtype.element_ty), mask=there & in_width)


@triton.jit(do_not_specialize=["rows"])
def factor_product(
    a,
    b,
    out,
    pairs,
    block_experts,
    places,
    columns,
    column_places,
    rows,
    depth,
    width,
    a_stride,
    b_stride,
    out_stride,
    columns_stride,
    a_divisor,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[:, row] = B a[row // a_divisor], partial sums over the inputs; a and B have their inputs side by side.

    a: [a's rows, a_stride], of which the first `depth` columns are used, or those that `columns` names.
    b: [width, b_stride], or one such matrix per place of an expert. out: [SPLITS, rows, out_stride].
    pairs, block_experts: see routing.align: each block of rows is one expert's; None: row i of all rows is row i, and
    B one matrix. places: int32 [experts], where an expert's B is, -1 for none, which gives zeros; None: expert e's
    is at e. columns, column_places: int32 [D', columns_stride] and the same for them; None where there are none.
    """
    block_m, block_n = block_of(tl.program_id(0), tl.num_programs(0), width, BLOCK_N)
    outputs = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    start, stop = split_of(depth, BLOCK_K, SPLITS)
    own = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    there = own < rows
    if pairs is not None:
        expert = tl.load(block_experts + block_m)
        if expert < 0:
            return
        own = tl.load(pairs + own)
        there = own >= 0
        place = expert
        if places is not None:
            place = tl.load(places + expert)
            stop = tl.where(place < 0, start, stop)
        b += place.to(tl.int64) * width * b_stride
        if columns is not None:
            column_place = expert
            if column_places is not None:
                column_place = tl.maximum(tl.load(column_places + expert), 0)
            columns += column_place.to(tl.int64) * columns_stride
    in_width = (outputs < width)[None, :]
    a_start = a + (own // a_divisor).to(tl.int64)[:, None] * a_stride
    b_start = b + outputs.to(tl.int64)[None, :] * b_stride
    acc = tl.full([BLOCK_M, BLOCK_N], 0.0, tl.float32)
    acc = add_product(acc, a_start, there[:, None], b_start, in_width, columns, start, stop, depth, BLOCK_K)
    out_rows = tl.program_id(1).to(tl.int64) * rows + own.to(tl.int64)
    pointers = out + out_rows[:, None] * out_stride + outputs[None, :]
    tl.store(pointers, acc.to(out.dtype.element_ty), mask=there[:, None] & in_width)


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
    z,
    bias,
    h,
    pairs,
    block_experts,
    places,
    columns,
    column_places,
    z_rows,
    gate_rank,
    up_rank,
    width,
    s_stride,
    u_stride,
    columns_stride,
    s_divisor,
    top_k,
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
    columns of s instead. u: [D, width, u_stride], gate's columns first; None: no expert has deltas. z: [Z_PARTS,
    z_rows, 2 width]; None: there is no base. h: [pairs, width]. The rest as in factor_product.
    """
    block_m, block_n = block_of(tl.program_id(0), tl.num_programs(0), width, BLOCK_N)
    expert = tl.load(block_experts + block_m)
    if expert < 0:
        return
    own = tl.load(pairs + block_m * BLOCK_M + tl.arange(0, BLOCK_M))
    there = (own >= 0)[:, None]
    outputs = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    in_width = (outputs < width)[None, :]
    gate = tl.full([BLOCK_M, BLOCK_N], 0.0, tl.float32)
    up = tl.full([BLOCK_M, BLOCK_N], 0.0, tl.float32)
    if u is not None:
        place = expert
        if places is not None:
            place = tl.load(places + expert)
            gate_rank_used = tl.where(place < 0, 0, gate_rank)
            up_rank_used = tl.where(place < 0, 0, up_rank)
        else:
            gate_rank_used = gate_rank
            up_rank_used = up_rank
        u_start = u + (place.to(tl.int64) * width + outputs.to(tl.int64)[None, :]) * u_stride
        s_start = s + (own // s_divisor).to(tl.int64)[:, None] * s_stride
        if columns is None:
            gate_columns = None
            up_columns = None
            s_up = s_start + gate_rank
        else:
            column_place = expert
            if column_places is not None:
                column_place = tl.maximum(tl.load(column_places + expert), 0)
            gate_columns = columns + column_place.to(tl.int64) * columns_stride
            up_columns = gate_columns + gate_rank
            s_up = s_start
        if GATED:
            gate = add_product(
                gate, s_start, there, u_start, in_width, gate_columns, 0, gate_rank_used, gate_rank, BLOCK_K
            )
        u_start += gate_rank
        up = add_product(up, s_up, there, u_start, in_width, up_columns, 0, up_rank_used, up_rank, BLOCK_K)
    if z is not None:
        z_width = 2 * width if GATED else width
        z_start = z + (own // top_k).to(tl.int64)[:, None] * z_width + outputs[None, :]
        z_part = tl.cast(z_rows, tl.int64) * z_width
        if GATED:
            gate += load_parts(z_start, z_part, there & in_width, Z_PARTS)
            z_start += width
        up += load_parts(z_start, z_part, there & in_width, Z_PARTS)
    if bias is not None:
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
    pointers = h + own.to(tl.int64)[:, None] * width + outputs[None, :]
    tl.store(pointers, hidden.to(h.dtype.element_ty), mask=there & in_width)
