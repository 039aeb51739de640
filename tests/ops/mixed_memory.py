"""Prints, in bytes: one expert's V of gate and up; what a call of the cpu backend adds to this process's peak memory;
what a call of the reference adds that mixes a V as a whole. All experts are in use. Linux."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from mixed_cases import mixed_case

from d2moe_vllm.ops import cpu, reference

SIZES = {"tokens": 4, "hidden": 4096, "intermediate": 512, "num_experts": 8, "bases": 2, "rank": (1024, 1024)}


def status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))


def added(call: Callable[[], Any]) -> int:
    """Peak of resident memory while it runs, over what was resident before."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    call()
    return status("VmHWM") - before


torch.set_num_threads(2)
arguments, spec = mixed_case(0, torch.bfloat16, **SIZES)
arguments[2] = torch.arange(8, dtype=torch.int32).view(4, 2)
reference.MIXED_ROWS = 1024
small, small_spec = mixed_case(0, torch.bfloat16)
# Code and the threads' stacks are there before either is measured.
reference.fused_experts(*small, small_spec)
whole = added(lambda: reference.fused_experts(*arguments, spec))
packed = cpu.pack(*arguments[3:5], spec)
half = cpu.pack(*small[3:5], small_spec)
cpu.fused_experts(*small[:3], *half, None, small_spec)
ours = added(lambda: cpu.fused_experts(*arguments[:3], *packed, None, spec))
print(2 * 1024 * 4096 * 2, ours, whole)
