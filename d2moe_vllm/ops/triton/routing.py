"""Sorts routed pairs (token, choice) by expert, in blocks of rows that each belong to one expert."""

import triton
import triton.language as tl

from d2moe_vllm.ops.triton.common import running_total, total


@triton.jit(do_not_specialize=["count", "max_blocks"])
def align(
    ids,
    pairs,
    block_experts,
    count,
    num_experts,
    max_blocks,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """One program per expert; each counts all pairs, which is cheaper than a second launch.

    ids: int32 [count], experts of pairs; outside 0..num_experts-1 is nobody's. Writes pairs: int32
    [max_blocks * BLOCK_M], numbers of pairs, ascending within an expert, -1 where an expert's last block has no more;
    and block_experts: int32 [max_blocks], each block's expert, -1 for blocks that are not needed. BLOCK_E: a power of
    two, at least num_experts.
    """
    expert = tl.program_id(0)
    experts = tl.arange(0, BLOCK_E)
    counts = tl.full([BLOCK_E], 0, tl.int32)
    for start in range(0, count, BLOCK_P):
        numbers = start + tl.arange(0, BLOCK_P)
        chosen = tl.load(ids + numbers, mask=numbers < count, other=-1)
        counts += total((chosen[:, None] == experts[None, :]).to(tl.int32), 0)
    blocks = tl.where(experts < num_experts, (counts + BLOCK_M - 1) // BLOCK_M, 0)
    first_block = total(tl.where(experts < expert, blocks, 0), 0)
    own_count = total(tl.where(experts == expert, counts, 0), 0)
    end_block = first_block + (own_count + BLOCK_M - 1) // BLOCK_M

    place = first_block * BLOCK_M
    for start in range(0, count, BLOCK_P):
        numbers = start + tl.arange(0, BLOCK_P)
        own = (tl.load(ids + numbers, mask=numbers < count, other=-1) == expert).to(tl.int32)
        tl.store(pairs + place + running_total(own) - 1, numbers, mask=own > 0)
        place += total(own, 0)
    rest = place + tl.arange(0, BLOCK_M)
    tl.store(pairs + rest, tl.full([BLOCK_M], -1, tl.int32), mask=rest < end_block * BLOCK_M)

    for start in range(first_block, end_block, BLOCK_E):
        places = start + experts
        tl.store(block_experts + places, tl.full([BLOCK_E], 0, tl.int32) + expert, mask=places < end_block)
    if expert == num_experts - 1:
        for start in range(end_block, max_blocks, BLOCK_E):
            places = start + experts
            tl.store(block_experts + places, tl.full([BLOCK_E], -1, tl.int32), mask=places < max_blocks)
