"""`d2moe compress`: parse, call, print."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from offline.cli.options import (
    Accounting,
    AllowLarger,
    Bits,
    CalibrationText,
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
    ScopeOption,
    Seed,
    SeqLen,
    Size,
    Src,
    TensorParallelSize,
    TokenizerOption,
    TrustRemoteCode,
    WindowsOption,
    parse_bits,
    parse_size,
    ratio_for,
    read_asked,
    read_recipe,
)
from offline.cli.tables import arithmetic, less_than_asked, show, sizes
from offline.errors import InputError
from offline.io.console import plain_console
from offline.io.memory import peak_memory
from offline.io.units import duration, durations
from offline.io.units import size as in_words
from offline.work.distributed import is_first


def compress(
    source: Src,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; must not exist yet.")],
    ratio: Ratio = None,
    size: Size = None,
    fit: FitOption = None,
    calibration: CalibrationText = None,
    recipe: RecipeFile = None,
    method: Method = None,
    bits: Bits = None,
    accounting: Accounting = None,
    scope: ScopeOption = None,
    windows: WindowsOption = None,
    seq_len: SeqLen = None,
    seed: Seed = None,
    revision: Revision = None,
    family_file: FamilyFile = None,
    workdir: Annotated[Path | None, typer.Option(help="For intermediate files (default OUT.d2moe-work).")] = None,
    memory: Memory = None,
    tokenizer: TokenizerOption = None,
    trust_remote_code: TrustRemoteCode = False,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where to compute.")] = "auto",
    allow_larger: AllowLarger = False,
    restart: Annotated[bool, typer.Option("--restart", help="Start over what was begun on another machine.")] = False,
    max_model_len: MaxModelLen = None,
    max_num_seqs: MaxNumSeqs = None,
    max_num_batched_tokens: MaxNumBatchedTokens = None,
    tensor_parallel_size: TensorParallelSize = None,
    expert_parallel: ExpertParallel = False,
    kv_cache_dtype: KVCacheDtypeOption = None,
    gpu_memory_utilization: GpuMemoryUtilization = None,
    as_json: Json = False,
) -> None:
    """Compress SRC into OUT, layer by layer; a run that was interrupted is continued."""
    from offline.run.compress import compress as run
    from offline.source.text import Text
    from offline.source.tokens import TokenizerChoice

    started = time.monotonic()
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
        "scope": scope,
        "calibration": {"windows": windows, "seq_len": seq_len, "seed": seed},
    }
    chosen = read_recipe(recipe, overrides)
    if not calibration:
        raise InputError("no calibration text; add --calibration FILE (a UTF-8 text or JSONL of the model's domain)")
    options: dict[str, Any] = {"revision": revision, "workdir": workdir, "restart": restart, "device": device}
    options |= {"allow_larger": allow_larger, "asked": asked}
    console = plain_console(stderr=True, quiet=not is_first())
    options["tokenizer"] = TokenizerChoice(tokenizer, trust_remote_code)
    result = run(source, out, chosen, Text(tuple(calibration)), **options, memory=parse_size(memory), console=console)
    result["seconds"] = round(time.monotonic() - started, 1)
    result["peak_memory_bytes"] = peak_memory()
    if not is_first():
        return  # one of several processes speaks for all
    show(result, as_json, compress_table)


def compress_table(console: Console, result: dict[str, Any]) -> None:
    sizes(console, result["source"], result["result"])
    console.print(f"stores: {result['result']['stores']}", highlight=False, soft_wrap=True)
    less_than_asked(console, result)
    predicted = result["predicted"]
    table = Table("", "predicted", "really", box=None, pad_edge=False)
    table.add_row("time", durations(predicted["least_seconds"], predicted["seconds"]), duration(result["seconds"]))
    table.add_row("peak memory", in_words(predicted["peak_memory_bytes"]), in_words(result["peak_memory_bytes"]))
    table.add_row(
        "working folder", f"{in_words(predicted['work_bytes'])} at most", f"{in_words(result['work_bytes'])} at the end"
    )
    console.print(table)
    command = ["vllm", "serve", result["path"], "--trust-remote-code"]
    command += ["--tokenizer", result["tokenizer"]] if result["tokenizer"] else []
    if "fit" in result:
        arithmetic(console, result["fit"])
        command += result["fit"]["serve"]
    console.print(f"serve it:  {shlex.join(command)}", highlight=False, soft_wrap=True, markup=False)
