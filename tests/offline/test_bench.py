"""`make bench-offline` and `make bench-stages` at tiny shapes: that they run, and compare what is the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import bench_stages
import pytest
from compression import ROOT

from offline.work.statistics import Gradients

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


def test_stages_are_as_they_were(tmp_path: Path) -> None:
    """Each stage gives what it gave before, up to rounding to bfloat16 where there is any."""
    seen = []
    for stage in bench_stages.stages(48, 96, 300, tmp_path):
        before, now = stage.before(), stage.now()
        pairs = [(before, now)]
        if isinstance(before, Gradients) and isinstance(now, Gradients):
            pairs = [(one.grams[site], two.grams[site]) for one, two in [(before, now)] for site in before.grams]
            pairs += [(before.fisher[role], now.fisher[role]) for role in before.fisher or {}]
        for one, two in pairs:
            assert float((one - two).norm() / one.norm()) < 0.02, stage.name
        seen.append(stage.name)
    assert len(seen) == 5
