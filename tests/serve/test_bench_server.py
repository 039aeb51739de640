"""`make bench-server` on a tiny model: that vLLM's own commands run against it, and that pairs are merged."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import bench_server
import pytest
from compression import ROOT

TINY = ["--size", "512,1024,4,2", "--eager", "--rounds", "1", "--concurrency", "2", "--input-len", "8"]
TINY += ["--output-len", "4", "--prompts", "4"]


@pytest.mark.slow
def test_the_bench_runs(tmp_path: Path) -> None:
    """Three pairs by two runs: servers, `vllm bench serve` and `throughput`; every figure of every row is there."""
    packed = ["--storages", "base int4, delta int2", "--backends", "cpu-int8"]
    runs = (
        ["--ratios", "0.4", "--batch-ratios", "--storages", "--throughput-rounds", "1"],
        ["--ratios", "--batch-ratios", "0.4", *packed, "--throughput-rounds", "0"],
    )
    for options in runs:
        command = [
            sys.executable,
            str(ROOT / "benchmarks" / "bench_server.py"),
            "--folder",
            str(tmp_path),
            *TINY,
            *options,
        ]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=800, env=environment)
        assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "server.json").read_text())
    pairs = [(row["scope"], row["storage"], row["backend"]) for row in results["serve"]]
    few = ("off", "base int4, delta int2", "cpu-int8")
    assert pairs == [("batch", "bfloat16", "cpu"), ("off", "bfloat16", "cpu"), few]
    assert [row["ratio"] for row in results["serve"][:2]] == [0.4, 0.4]
    assert 0.5 < results["serve"][2]["ratio"] < 0.9
    assert [(row["ratio"], row["scope"]) for row in results["throughput"]] == [(0.4, "off")]
    for found in [*results["serve"], *results["throughput"]]:
        for side in ("dense", "ours"):
            figures = [figure for figure in bench_server.FIGURES if figure in found[side]]
            assert all(0 < found[side][figure] < 1e5 for figure in figures)
            assert "output_tokens_per_s" in figures
        assert found["speedup"] == pytest.approx(
            found["ours"]["output_tokens_per_s"] / found["dense"]["output_tokens_per_s"]
        )
    for found in results["memory"]:
        assert found["ours"]["checkpoint"] < 0.6 * found["dense"]["checkpoint"] + 1e6
        assert all(found[side]["resident"] > found[side]["checkpoint"] for side in ("dense", "ours"))
    assert "40%   off bfloat16" in done.stdout
    assert "base int4, delta int2, cpu-int8" in done.stdout


def test_what_a_smaller_model_leaves_to_the_kv_cache() -> None:
    """1 GiB of 1024 tokens is 1 MiB a token: 3 GiB less of resident memory are 3072 tokens more."""
    dense = bench_server.Resident(checkpoint=5, resident=6 << 30, kv_tokens=1024)
    row = bench_server.compare_memory(dense, bench_server.Resident(checkpoint=2, resident=3 << 30, kv_tokens=1024))
    assert row["ours"]["kv_tokens"] == 4096
    assert row["dense"]["kv_tokens"] == 1024


def row(ratio: float, *rounds: tuple[float, float]) -> dict[str, Any]:
    """rounds: output tokens per second of dense and ours."""
    both = [[{"output_tokens_per_s": dense}, {"output_tokens_per_s": ours}] for dense, ours in rounds]
    return {"ratio": ratio, "scope": "off", "concurrency": 16, "rounds": both}


def test_rounds_of_a_pair_add_up_unless_the_workload_differs() -> None:
    """Other pairs stay; a pair that is measured anew is taken out first."""
    first = bench_server.merged({}, {"output_len": 128}, {"serve": [row(0.6, (10, 15)), row(0.4, (10, 12))]})
    newer = {"serve": [row(0.6, (10, 20))]}
    added = bench_server.merged(copy.deepcopy(first), {"output_len": 128}, newer)
    assert [(r["ratio"], r["speedup"], len(r["rounds"])) for r in added["serve"]] == [(0.4, 1.2, 1), (0.6, 1.75, 2)]
    other = bench_server.merged(copy.deepcopy(first), {"output_len": 64}, newer)
    assert [(r["ratio"], r["speedup"]) for r in other["serve"]] == [(0.6, 2)]
    left = bench_server.without(first, [bench_server.Pair(0.6, "off", Path())])
    assert [r["ratio"] for r in left["serve"]] == [0.4]
    assert left["workload"] == {"output_len": 128}


def test_speed_ups_are_of_rounds() -> None:
    """Each round's own ratio, so that a slow machine in one of them cancels."""
    found = bench_server.compare(row(0.6, (10, 20), (5, 11), (9, 9)))
    assert (found["speedup"], found["speedup_min_max"]) == (2, [1, 2.2])
    assert (found["dense"]["output_tokens_per_s"], found["ours"]["output_tokens_per_s_min_max"]) == (9, [9, 20])
