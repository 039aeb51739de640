"""The Triton kernels compile to machine code of every GPU they are for, fit its shared memory and spill no register."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import aot_report
import pytest
from aot import TARGETS, Compiled
from compression import ROOT

pytest.importorskip("triton")

REPORT = Path(__file__).with_name("aot_report.py")
KERNELS = {
    "add_parts", "align", "base_product", "column_squares", "combine", "count_chunks", "expand_and_activate",
    "factor_product", "gather", "mix", "mixed_product", "select_for_batch", "select_for_token",
}  # fmt: skip
"""All of them: one that is launched nowhere in the report is not compiled, and so not known to compile."""


def python(tmp_path: Path, *arguments: object) -> str:
    """In a process where nothing is interpreted, whatever this one does."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # Compiled here and now, not found in a cache.
    env |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": f"{ROOT}{os.pathsep}{REPORT.parent}"}
    env["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, env=env, cwd=REPORT.parent, timeout=3000
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def report(tmp_path: Path, *arguments: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in python(tmp_path, REPORT, *arguments).splitlines()]


def check(rows: list[dict[str, Any]]) -> None:
    bad = aot_report.refused(rows)
    assert not bad, "\n".join(bad)
    assert all(row["elf"] and row["registers"] > 8 for row in rows)


def test_every_kernel_compiles_for_hopper(tmp_path: Path) -> None:
    rows = report(tmp_path, "sm_90", "bfloat16")
    check(rows)
    assert {row["kernel"] for row in rows} == KERNELS


def test_the_largest_kernel_compiles_for_the_others(tmp_path: Path) -> None:
    """Each launch for one of them; the rest does in the slow test below."""
    rows = report(tmp_path, "sm_80,sm_100", "bfloat16", "expand_and_activate", "rotated")
    check(rows)
    assert {row["target"] for row in rows} == {"sm_80", "sm_100"}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("target", "dtype"), zip(TARGETS, ["float16", "bfloat16", "float32"], strict=True))
def test_every_kernel_in_all_it_is_launched_with(tmp_path: Path, target: str, dtype: str) -> None:
    """Every tile of the default table; real models' sizes and odd ones; every variant of the format and scope. The
    other pairs of target and dtype: `make kernels`."""
    rows = report(tmp_path, target, dtype, "all")
    check(rows)
    assert {row["kernel"] for row in rows} == KERNELS
    assert len(rows) > 200


SPILLING = """
import json, sys
import triton
import triton.language as tl
import aot


@triton.jit
def product(a, b, c, depth, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    acc = tl.zeros([M, N], tl.float32)
    for first in range(0, depth, K):
        left = tl.load(a + m[:, None] * depth + (first + k)[None, :])
        acc = tl.dot(left, tl.load(b + (first + k)[:, None] * N + n[None, :]), acc)
    tl.store(c + m[:, None] * N + n[None, :], acc.to(tl.bfloat16))


def launch(m, n, k, warps, stages):
    import torch
    x = torch.empty(4096, 4096, dtype=torch.bfloat16, device="meta")
    product[(1,)](x, x, x, 4096, M=m, N=n, K=k, num_warps=warps, num_stages=stages)


result = {}
for name, target in aot.TARGETS.items():
    # Accumulators lie in tensor memory on sm_100: it takes larger ones to spill.
    spills = (256, 256, 64, 4, 3) if name == "sm_100" else (128, 256, 64, 4, 3)
    for kind, sizes in {"fits": (64, 64, 64, 4, 3), "spills": spills, "large": (128, 256, 128, 8, 4)}.items():
        (one,) = aot.record(lambda: launch(*sizes), target)
        compiled = aot.compile_launch(one, target)
        result[f"{name} {kind}"] = (compiled.refused_by(target), compiled.shared_bytes)
print(json.dumps(result))
"""


def test_the_harness_finds_spills_and_too_much_memory(tmp_path: Path) -> None:
    """In a kernel that is made for it: else nothing above would prove anything."""
    (tmp_path / "spilling.py").write_text(SPILLING)
    result = json.loads(python(tmp_path, tmp_path / "spilling.py"))
    for name, target in TARGETS.items():
        refused, shared_bytes = result[f"{name} fits"]
        assert refused is None
        assert 0 < shared_bytes < target.shared_limit
        assert "bytes of spilled registers" in result[f"{name} spills"][0]
        assert f"bytes of shared memory, {target.shared_limit} are there" in result[f"{name} large"][0]


def test_limits_are_inclusive() -> None:
    target = TARGETS["sm_80"]
    fits = Compiled(target.shared_limit, 255, 0, 512, b"")
    assert fits.refused_by(target) is None
    assert "166913 bytes of shared memory" in str(fits._replace(shared_bytes=166913).refused_by(target))
    assert "513 columns" in str(fits._replace(tensor_columns=513).refused_by(target))
    assert "4 bytes of spilled" in str(fits._replace(spill_bytes=4).refused_by(target))
