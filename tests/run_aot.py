"""Compiles every Triton kernel that layers launch, for every target and dtype, without a GPU.

One pair of target and dtype after the other; what a pair gave is kept in build/aot/<hash of the code>/, so that a run
that was interrupted goes on. Ends with 1 where a kernel does not compile, spills or asks for too much.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "ops"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
from aot import TARGETS
from aot_report import refused
from places import ROOT, code_hash

FOLDER = ROOT / "build" / "aot" / code_hash(["d2moe_vllm/ops", "tests/ops"])
DTYPES = ("bfloat16", "float16", "float32")


def main() -> int:
    FOLDER.mkdir(parents=True, exist_ok=True)
    print(f"{'target':8} {'dtype':9} kernels refused")
    bad = []
    for target, dtype in itertools.product(TARGETS, DTYPES):
        rows = [json.loads(line) for line in compiled(target, dtype).read_text().splitlines()]
        bad += (found := refused(rows))
        print(f"{target:8} {dtype:9} {len(rows):7} {len(found):7}", flush=True)
    print("\n".join(bad), end="\n" if bad else "")
    return bool(bad)


def compiled(target: str, dtype: str) -> Path:
    """The report of one pair, made where there is none."""
    done = FOLDER / f"{target}-{dtype}.jsonl"
    if not done.exists():
        partial = done.with_suffix(".partial")
        env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        command = [sys.executable, str(ROOT / "tests" / "ops" / "aot_report.py"), target, dtype, "all"]
        with partial.open("w") as file:
            subprocess.run(command, check=True, stdout=file, env={**env, "PYTHONPATH": str(ROOT)})
        partial.replace(done)
    return done


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("interrupted: call it again to go on from here")
