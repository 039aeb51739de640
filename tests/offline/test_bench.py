"""`make bench-offline` at tiny shapes: that it runs, and that what it reports is of the size it should be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from compression import ROOT

SHAPE = ["--hidden", "128", "--intermediate", "256", "--experts", "2", "--device", "cpu"]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_the_bench_compares_both_sides(tmp_path: Path, dtype: str) -> None:
    out = tmp_path / "bench" / "offline.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "bench_offline.py"), *SHAPE, "--paper-dtype", dtype]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--out", str(out)], check=False, capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    # Both reach the same optimum by different ways: anything else would be a mistake in one of them.
    assert result["error_ratio"] == pytest.approx(1, abs=1e-5)
    assert all(0.01 < result["compared"][role]["paper"]["error"] < 0.9 for role in ("gate", "up", "down"))
    assert all(seconds["wall"] > 0 for seconds in result["seconds"].values())
    assert set(result["speedup"]) == {"wall", "cpu"}
    assert 0.05 < result["peak_gib"]["host"] < 4
    assert "written to" in done.stdout
