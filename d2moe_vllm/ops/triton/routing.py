"""Sorts routed pairs (token, choice) by expert, in blocks of rows that each belong to one expert.

Pairs are cut into chunks of CHUNK. With more than one, `count_chunks` counts each chunk's pairs by expert; then every
program of `align` adds up all counts and places its own chunk's pairs: no program walks over all pairs, and no order
depends on which runs first.
"""

import triton
import triton.language as tl

from d2moe_vllm.ops.triton.common import ceil_div, running_total, total

CHUNK = tl.constexpr(512)
"""Pairs that one program sorts; a multiple of STEP."""
STEP = tl.constexpr(32)
"""Pairs that are compared with others at once."""


@triton.jit
def count_pairs(ids, first, count, num_experts, BLOCK_E: tl.constexpr):
    """int32 [BLOCK_E]: how many of the pairs from `first` to the end of its chunk go to each expert."""
    experts = tl.arange(0, BLOCK_E)
    found = tl.full([STEP, BLOCK_E], 0, tl.int32)
    for start in range(first, tl.minimum(first + CHUNK, count), STEP):
        numbers = start + tl.arange(0, STEP)
        chosen = tl.load(ids + numbers, mask=numbers < count, other=-1)
        found += (chosen[:, None] == experts[None, :]).to(tl.int32)
    return tl.where(experts < num_experts, total(found, 0), 0)


@triton.jit(do_not_specialize=["count"])
def count_chunks(ids, counts, count, num_experts, BLOCK_E: tl.constexpr):
    """counts: int32 [chunks, num_experts], a program's row each."""
    chunk, experts = tl.program_id(0), tl.arange(0, BLOCK_E)
    own = count_pairs(ids, chunk * CHUNK, count, num_experts, BLOCK_E)
    tl.store(counts + chunk * num_experts + experts, own, mask=experts < num_experts)


@triton.jit(do_not_specialize=["count", "max_blocks"])
def align(
    ids,
    counts,
    pairs,
    block_experts,
    count,
    num_experts,
    max_blocks,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program per chunk.

    ids: int32 [count], experts of pairs; outside 0..num_experts-1 is nobody's. counts: of count_chunks, None where
    there is one chunk. Writes pairs: int32 [max_blocks * BLOCK_M], numbers of pairs, ascending within an expert, -1
    where an expert's last block has no more; and block_experts: int32 [max_blocks], each block's expert, -1 for blocks
    that are not needed. BLOCK_E: a power of two, at least num_experts. BLOCK_C: chunks whose counts are read at once.
    """
    chunk, chunks, experts = tl.program_id(0), tl.num_programs(0), tl.arange(0, BLOCK_E)
    first = chunk * CHUNK
    if counts is None:
        of_expert = count_pairs(ids, first, count, num_experts, BLOCK_E)
        before = tl.full([BLOCK_E], 0, tl.int32)
    else:
        of_all = tl.full([BLOCK_C, BLOCK_E], 0, tl.int32)
        of_earlier = tl.full([BLOCK_C, BLOCK_E], 0, tl.int32)
        for start in range(0, chunks, BLOCK_C):
            rows = (start + tl.arange(0, BLOCK_C))[:, None]
            there = (rows < chunks) & (experts < num_experts)[None, :]
            found = tl.load(counts + rows * num_experts + experts[None, :], mask=there, other=0)
            of_all += found
            of_earlier += tl.where(rows < chunk, found, 0)
        of_expert, before = total(of_all, 0), total(of_earlier, 0)
    blocks = (of_expert + BLOCK_M - 1) // BLOCK_M
    end_blocks = running_total(blocks)
    places = (end_blocks - blocks) * BLOCK_M

    # Of each pair: where its expert's pairs of this chunk begin, and how many of these come before it.
    numbers = first + tl.arange(0, CHUNK)
    chosen = tl.load(ids + numbers, mask=numbers < count, other=-1)
    own = (chosen >= 0) & (chosen < num_experts)
    place = tl.gather(places + before, tl.where(own, chosen, 0), 0)
    for start in range(first, tl.minimum(first + CHUNK, count), STEP):
        others = start + tl.arange(0, STEP)
        same = tl.load(ids + others, mask=others < count, other=-1)[:, None] == chosen[None, :]
        # Over the first axis, which lies in a thread's own registers.
        place += total((same & (others[:, None] < numbers[None, :])).to(tl.int32), 0)
    tl.store(pairs + place, numbers, mask=own)

    # Every program has its share of the blocks, whose experts it names and whose ends it fills.
    share = ceil_div(max_blocks, chunks)
    for start in range(chunk * share, tl.minimum((chunk + 1) * share, max_blocks), STEP):
        block = start + tl.arange(0, STEP)
        there = block < tl.minimum((chunk + 1) * share, max_blocks)
        expert = total((end_blocks[:, None] <= block[None, :]).to(tl.int32), 0)
        tl.store(block_experts + block, tl.where(expert < num_experts, expert, -1), mask=there)
        of_block = tl.minimum(expert, BLOCK_E - 1)
        end = tl.gather(places + of_expert, of_block, 0)
        slots = (block * BLOCK_M)[:, None] + tl.arange(0, BLOCK_M)[None, :]
        empty = there[:, None] & (slots >= end[:, None])
        tl.store(pairs + slots, tl.full([STEP, BLOCK_M], -1, tl.int32), mask=empty)
