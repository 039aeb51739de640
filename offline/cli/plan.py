"""`d2moe plan`: parse, call, print."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from offline.cli.options import (
    Accounting,
    AllowLarger,
    Bits,
    ExpertParallel,
    FamilyFile,
    FitOption,
    GpuMemoryUtilization,
    Json,
    KVCacheDtypeOption,
    MaxModelLen,
    MaxNumBatchedTokens,
    MaxNumSeqs,
    Memory,
    Method,
    Ratio,
    RecipeFile,
    Revision,
    SeqLen,
    Size,
    Src,
    TensorParallelSize,
    WindowsOption,
    parse_bits,
    parse_size,
    ratio_for,
    read_asked,
    read_recipe,
)
from offline.cli.tables import arithmetic, less_than_asked, neighbours, projections, show, sizes
from offline.io.console import plain_console
from offline.io.units import durations
from offline.io.units import size as in_words

if TYPE_CHECKING:
    from offline.source.structure import ProposalError

TYPICAL = (
    "These are a typical model's layers, without a base; calibration decides bits, channels and bases layer by layer, "
    "in no more bytes."
)


def plan(
    source: Src,
    ratio: Ratio = None,
    size: Size = None,
    fit: FitOption = None,
    recipe: RecipeFile = None,
    method: Method = None,
    bits: Bits = None,
    accounting: Accounting = None,
    windows: WindowsOption = None,
    seq_len: SeqLen = None,
    memory: Memory = None,
    allow_larger: AllowLarger = False,
    processes: Annotated[int, typer.Option(min=1, help="Processes on one machine, as torchrun would start.")] = 1,
    revision: Revision = None,
    family_file: FamilyFile = None,
    max_model_len: MaxModelLen = None,
    max_num_seqs: MaxNumSeqs = None,
    max_num_batched_tokens: MaxNumBatchedTokens = None,
    tensor_parallel_size: TensorParallelSize = None,
    expert_parallel: ExpertParallel = False,
    kv_cache_dtype: KVCacheDtypeOption = None,
    gpu_memory_utilization: GpuMemoryUtilization = None,
    as_json: Json = False,
) -> None:
    """Ranks, sizes, memory, disk and time, before any work."""
    from offline.plan.asked import plan_asked
    from offline.plan.duration import estimate_seconds
    from offline.plan.make import summary as summarize
    from offline.source.dense import open_dense
    from offline.source.structure import ProposalError

    asked = read_asked(
        ratio,
        size,
        fit,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        tensor_parallel_size=tensor_parallel_size,
        expert_parallel=expert_parallel,
        kv_cache_dtype=kv_cache_dtype,
        gpu_memory_utilization=gpu_memory_utilization,
    )
    overrides = {
        "ratio": ratio_for(asked, ratio),
        "method": method,
        "bits": parse_bits(bits),
        "accounting": accounting,
        "calibration": {"windows": windows, "seq_len": seq_len},
    }
    options: dict[str, Any] = {"processes": processes, "allow_larger": allow_larger, "memory": parse_size(memory)}
    try:
        model = open_dense(source, revision)
    except ProposalError as proposal:
        _propose(proposal, as_json)
        raise
    planned, fitted = plan_asked(model, read_recipe(recipe, overrides), asked, **options)
    console = plain_console(stderr=True)
    for remark in planned.model.remarks:
        console.print(remark, highlight=False, soft_wrap=True)
    found = summarize(planned, estimate_seconds(planned))
    show(found | ({"fit": fitted.to_json()} if fitted else {}), as_json, plan_table)


def _propose(proposal: ProposalError, as_json: bool) -> None:
    """On stdout, as a file that --family-file takes; what is to be done with it the error says."""
    from offline.source.familyfile import written

    text = written(proposal.row, proposal.notes)
    content = {"proposed_family": proposal.row.model_dump(mode="json", exclude_none=True), "notes": proposal.notes}
    show(content, as_json, lambda console, _: console.print(text, end="", highlight=False, soft_wrap=True))


def plan_table(console: Console, summary: dict[str, Any]) -> None:
    if "fit" in summary:
        arithmetic(console, summary["fit"])
    sizes(console, summary["source"], summary["result"])
    console.print()
    console.print(f"stores: {summary['result']['stores']}", highlight=False, soft_wrap=True)
    less_than_asked(console, summary)
    projections(console, "", {"first layer": summary["first_layer"]}, summary["intermediate_size"])
    if dense := summary["result"]["dense_layers"]:
        console.print(f"{summary['result']['layers']} layers like this, {dense} stay dense", highlight=False)
    if not summary["result"]["final"]:
        from offline.methods import find_method

        typical = summary["recipe"]["delta"]["method"] == "dense"
        console.print(TYPICAL if typical else find_method(summary["recipe"]["method"]).until, style="dim")
    console.print()
    if summary["first_layer"]["up"]["delta"] != "dense":
        shares = ", ".join(f"{role} {100 * share:.2f} %" for role, share in summary["kept_share_of_deltas"].items())
        console.print(f"kept share of the deltas: {shares}", highlight=False)
    result = summary["result"]
    share = result["expert_bytes"] / result["dense_expert_bytes"]
    console.print(f"experts alone: {100 * share:.2f} % of their bytes are left", highlight=False)
    reads = summary["calibration"]
    rows, enough = reads["rows_for_each_input"], reads["enough_rows"]
    note = f" ({enough} are enough)" if rows < enough else ""
    console.print(
        f"calibration: {reads['windows']} windows of {reads['seq_len']:,} tokens, {rows:,.1f} rows of an expert on "
        f"average for each input of its widest matrix{note}",
        highlight=False,
    )
    disk, least, most = summary["disk_bytes"], summary["least_seconds"], summary["estimated_seconds"]
    fewer = f" ({in_words(disk['least_work'])} at least, slower)" if disk["least_work"] < disk["work"] else ""
    console.print(
        f"to do it: about {in_words(summary['peak_memory_bytes'])} of memory, {in_words(disk['work'])} of disk while "
        f"running{fewer}, {in_words(disk['result'])} for the result, roughly {durations(least, most)}",
        highlight=False,
    )
    if least < most:
        console.print("the shorter time where experts share nothing, and no layer gets a base", style="dim")
    if "fit" in summary:
        neighbours(console, summary["fit"])
