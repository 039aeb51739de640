"""The search for tiles, with clocks that are known: the command itself needs a GPU."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from compression import ROOT, TINY, d2moe_here
from synthetic import Synthetic, write_checkpoint

from d2moe_vllm.ops.triton import tiles
from d2moe_vllm.ops.triton.tiles import GROUPED, TABLE_KERNELS, Tile
from d2moe_vllm.tuning import tune

LIMIT = 100_000


class Quiet:
    """Steps without a display."""

    done = 0.0

    def label(self, text: str) -> None:
        pass

    def advance(self, work: float) -> None:
        self.done += work


class Clock:
    """A layer whose time says how far each tile is from a best one, which differs by kernel and rows."""

    def __init__(self, top_k: int, num_experts: int) -> None:
        self.sizes, self.asked = (top_k, num_experts), []
        self.best = {}
        for (place, kernel), rows in itertools.product(enumerate(TABLE_KERNELS), (1, 2, 4, 16, 32, 64, 128, 256)):
            choices = tune.candidates(kernel, rows, None, LIMIT)
            self.best[kernel, rows] = choices[(7 * place + rows) % len(choices)]

    def cost(self, kernel: str, rows: int, tile: Tile) -> float:
        best = self.best[kernel, rows]
        pairs = [(tile.block_n, best.block_n), (tile.block_k, best.block_k), (tile.num_stages, best.num_stages)]
        # The grouped kernels want different block_m's, the first of them most of all.
        weight = 10 if kernel == GROUPED[0] else 0.1 if kernel in GROUPED else 1
        distance = sum(abs(math.log2(mine / other)) for mine, other in [*pairs, (tile.num_warps, best.num_warps)])
        return 1 + distance + weight * abs(math.log2(tile.block_m / best.block_m))

    def __call__(self, tokens: int, table: tune.Table) -> float:
        self.asked.append(table)
        rows = tune.tunable(tokens, *self.sizes)
        with tiles.using(table):
            found = {kernel: tiles.tile(kernel, rows[kernel], torch.bfloat16, "default") for kernel in TABLE_KERNELS}
        return sum(self.cost(kernel, rows[kernel], tile) for kernel, tile in found.items())


def start(kernel: str, rows: int) -> Tile:
    return tiles.tile(kernel, rows, torch.bfloat16, "default")


def search(clock: Any, tokens: tuple[int, ...], top_k: int, num_experts: int) -> tuple[tune.Table, list[tune.Timing]]:
    options = {"top_k": top_k, "num_experts": num_experts, "start": start, "shared_limit": LIMIT}
    return tune.search(clock, lambda count: TABLE_KERNELS, tokens, **options, steps=Quiet())


def test_what_a_layer_does_not_launch_is_left_out() -> None:
    """Its times would be chance."""
    options = {"top_k": 2, "num_experts": 8, "start": start, "shared_limit": LIMIT, "steps": Quiet()}
    few = {"base", GROUPED[0], "mix"}
    table, _ = tune.search(Clock(2, 8), lambda count: few | ({"gather"} if count > 1 else set()), (1, 16), **options)
    assert {kernel: set(entries) for kernel, entries in table.items()} == {
        "base": {1, 16}, GROUPED[0]: {1, 4}, "mix": {1, 16}, "gather": {16},
    }  # fmt: skip


def test_the_fastest_tiles_are_found() -> None:
    """Of every kernel and number of rows, as the kernels would look them up."""
    clock = Clock(2, 8)
    table, timings = search(clock, (1, 16, 64), 2, 8)
    for tokens in (1, 16, 64):
        rows = tune.tunable(tokens, 2, 8)
        for kernel in TABLE_KERNELS:
            best, first = clock.best[kernel, rows[kernel]], clock.best[GROUPED[0], rows[kernel]]
            if kernel not in GROUPED[1:]:
                assert table[kernel][rows[kernel]] == best
                continue
            choices = tune.candidates(kernel, rows[kernel], first.block_m, LIMIT)
            least = min(clock.cost(kernel, rows[kernel], tile) for tile in choices)
            assert clock.cost(kernel, rows[kernel], table[kernel][rows[kernel]]) == least
            assert table[kernel][rows[kernel]].block_m == first.block_m
    assert [timing.tokens for timing in timings] == [1, 16, 64]
    assert all(timing.after_ms < timing.before_ms for timing in timings)
    assert timings[2].after_ms == clock(64, table)


def test_what_several_numbers_of_tokens_share_is_settled_once() -> None:
    """With 128 experts, one token and sixteen leave each expert one row: 16 tokens must not undo what 1 found."""
    clock = Clock(8, 128)
    table, _ = search(clock, (16, 1), 8, 128)
    assert all(set(table[kernel]) == {1} for kernel in GROUPED)
    assert set(table["base"]) == {1, 16}
    alone, _ = search(clock, (1,), 8, 128)
    assert all(table[kernel] == alone[kernel] for kernel in GROUPED)


def test_what_does_not_fit_or_run_is_not_chosen() -> None:
    """Nothing above the limit is even timed; what cannot run takes for ever."""
    clock = Clock(2, 8)

    def unable(tokens: int, table: tune.Table) -> float:
        # The assembler refuses eight warps, say.
        used = [tile.num_warps for entries in table.values() for tile in entries.values()]
        return math.inf if 8 in used else clock(tokens, table)

    table, _ = search(unable, (1, 16), 2, 8)
    assert all(tile.num_warps == 4 for entries in table.values() for tile in entries.values())
    tried = {tile for asked in clock.asked for kernel in asked for tile in asked[kernel].values()}
    matrices = [tile for tile in tried if tile.block_k > 1]
    assert len(matrices) > 50
    assert all(t.num_stages * (t.block_m + t.block_n) * t.block_k * 2 <= LIMIT for t in matrices)
    with pytest.raises(RuntimeError, match="does not run with 1 tokens"):
        search(lambda tokens, table: math.inf, (1,), 2, 8)


def test_the_table_is_read_back_from_the_users_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("D2MOE_CACHE", str(tmp_path))
    table, _ = search(Clock(2, 8), (1, 16), 2, 8)
    tune.write(
        {kernel: table[kernel] for kernel in ("base", "mix")}, tiles.user_folder() / "NVIDIA_H100_80GB_HBM3.json"
    )
    tiles.table.cache_clear()
    try:
        found = tiles.table("NVIDIA H100 80GB HBM3")
        assert {kernel: found[kernel] for kernel in ("base", "mix")} == {
            kernel: table[kernel] for kernel in ("base", "mix")
        }
        # What it does not name is as it was, and other devices are.
        assert found["shrink"] == tiles.table("NVIDIA A100-SXM4-80GB")["shrink"]
        assert [path.name for path in tiles.user_folder().iterdir()] == ["NVIDIA_H100_80GB_HBM3.json"]
    finally:
        tiles.table.cache_clear()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "Expecting property name"),
        ('{"base": {"1": {"block_m": 16}}}', "missing 4 required"),
        ('{"bass": {}}', "it has bass"),
        ('{"base": {}}', "a kernel without entries"),
        ("[1]", "is no table of tiles"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, words: str) -> None:
    monkeypatch.setenv("D2MOE_CACHE", str(tmp_path))
    tiles.user_folder().mkdir()
    (tiles.user_folder() / "A_GPU.json").write_text(content)
    tiles.table.cache_clear()
    with pytest.raises(ValueError, match=r"A_GPU\.json is no table of tiles") as error:
        tiles.table("A GPU")
    assert words in str(error.value)
    assert "run `d2moe tune` again or delete it" in str(error.value)
    assert "\n" not in str(error.value)


INTERPRETED = """
import json, sys, time
from pathlib import Path
import torch
sys.path[:0] = ["tests", "tests/ops"]
from test_triton_tune import Quiet, start
from d2moe_vllm.ops.shapes import Shape
from d2moe_vllm.ops.triton import tiles
from d2moe_vllm.tuning import tune
from d2moe_vllm.tuning.workload import Workload, uniform_config
from d2moe_vllm import ops

def clock(call):
    started = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - started)

torch.manual_seed(0)
config = uniform_config(Shape(256, 128, 2, 1), 0.3, "off")
workload = Workload(config, 0, 1, torch.device("cpu"), clock)
table, timings = tune.search(
    workload, workload.kernels, (1,), top_k=1, num_experts=2, start=start, shared_limit=6144, steps=Quiet()
)
tune.write(table, tiles.user_folder() / tiles.file_name("default"))
tiles.table.cache_clear()
tiles.tile.cache_clear()
used = tiles.tile("base", 1, torch.bfloat16, "default")
inputs = workload.batch(1)
expected = ops.fused_experts("reference", *inputs, *workload.halves, None, workload.spec)
error = (workload.run(1) - expected).norm() / expected.norm()
print(json.dumps([vars(used), [timing._asdict() for timing in timings], float(error)]))
"""


def test_a_real_layer_is_tuned(tmp_path: Path) -> None:
    """In the interpreter, where times mean nothing: the table is whole, is used, and changes no result."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "D2MOE_CACHE": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        check=False, capture_output=True, text=True, cwd=ROOT, env={**environment, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    used, timings, error = json.loads(done.stdout)
    written = json.loads((tmp_path / "tiles" / "default.json").read_text())
    # There are no deltas that are columns.
    assert set(written) == {"base", "shrink", "expand_gate_up", "expand_down", "mix", "combine", "gather"}
    assert set(written["base"]) == {"1"}
    assert used == written["base"]["1"]
    assert all(0 < timing["after_ms"] <= timing["before_ms"] for timing in timings)
    assert error < 1e-4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "tune for what? name a compressed checkpoint's folder, or a model: --shape Mixtral-8x7B"),
        (["--shape", "Mixtral"], "no shape 'Mixtral'; there are Mixtral-8x7B, DeepSeekMoE-16B, Qwen3-30B-A3B"),
        (["--shape", "Mixtral-8x7B", "--ratio", "1"], "--ratio 1.0 is not between 0 and 1"),
        ([TINY], "config.json has no quantization_config: this is a dense checkpoint"),
        ([TINY, "--shape", "Mixtral-8x7B"], "tune for what?"),
    ],
)
def test_bad_input_is_one_line(arguments: list[object], words: str) -> None:
    done = d2moe_here("tune", *arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    write_checkpoint(compressed := tmp_path / "checkpoint", Synthetic())
    for arguments in ((compressed,), (compressed, "--scope", "token", "--json"), ("--shape", "Qwen3-30B-A3B")):
        done = d2moe_here("tune", *arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == (
            "d2moe: tune times kernels on a GPU, and torch finds none here; run it on the machine that serves\n"
        )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_tuned(compressed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For one token, with times that are times; the table is in force afterwards."""
    monkeypatch.setattr(tune, "TOKENS", (1,))
    monkeypatch.setenv("D2MOE_CACHE", str(tmp_path))
    done = d2moe_here("tune", compressed, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["in_force"]
    assert Path(result["path"]).exists()
    assert 0 < result["layer"][0]["after_ms"] <= result["layer"][0]["before_ms"]
