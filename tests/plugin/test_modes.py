"""vLLM's own benchmarks and start-up modes with a compressed checkpoint, and what its CPU backend cannot do at all."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine import TWO_RANKS, run_engine
from synthetic import SOURCE

from offline.compare.server import Server

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow

CPU = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
REQUESTS = ["--dataset-name", "random", "--random-input-len", "32", "--random-output-len", "16", "--num-prompts", "24"]


def vllm(*arguments: object, folder: Path) -> str:
    """Runs the `vllm` command to its end; its output."""
    command = [str(Path(sys.executable).with_name("vllm")), *map(str, arguments)]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=600, cwd=folder, env={**os.environ, **CPU}
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module", params=["checkpoint", "dummy weights"])
def server(request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Of the checkpoint, and of a folder without any weight file under `--load-format dummy`."""
    folder, model, dummy = tmp_path_factory.mktemp("modes"), checkpoint, request.param != "checkpoint"
    arguments = ["--dtype", "float32", "--max-model-len", "256", "--served-model-name", "tiny", "--enforce-eager"]
    if dummy:
        model = folder / "model"
        shutil.copytree(checkpoint, model, ignore=shutil.ignore_patterns("*.safetensors"))
        arguments += ["--load-format", "dummy"]
    with Server(model, arguments, log=folder / "log", env=CPU) as running:
        yield running


def test_bench_serve(server: Server, checkpoint: Path, tmp_path: Path) -> None:
    """`vllm bench serve`: every request of its run is answered in full."""
    address = f"http://127.0.0.1:{server.port}"
    arguments = ["--model", "tiny", "--tokenizer", checkpoint, "--base-url", address, "--ignore-eos", *REQUESTS]
    vllm("bench", "serve", *arguments, "--save-result", "--result-filename", "result.json", folder=tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["completed"], result["failed"]) == (24, 0)
    assert result["total_output_tokens"] == 24 * 16


def test_bench_throughput(checkpoint: Path, tmp_path: Path) -> None:
    arguments = ["--model", checkpoint, "--trust-remote-code", "--dtype", "float32", "--max-model-len", "256"]
    vllm("bench", "throughput", *arguments, "--enforce-eager", *REQUESTS, "--output-json", "out.json", folder=tmp_path)
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["num_requests"] == 24
    # Its random prompts are text that is tokenized again: one token more or less.
    assert abs(result["total_num_tokens"] - 24 * (32 + 16)) <= 24


CANNOT = {
    "ray": ({"tensor_parallel_size": 2, "distributed_executor_backend": "ray"}, TWO_RANKS, "does not support ray"),
    "sleep": ({"enable_sleep_mode": True}, {}, "Sleep mode is not supported on current platform"),
}
"""Settings, environment, and how vLLM's CPU backend fails with them."""


@pytest.mark.parametrize(
    ("plugin", "message"),
    [
        (False, "assert self.intermediate_tensors is not None"),
        (True, "vLLM's CPU backend does not serve with --pipeline-parallel-size"),
    ],
    ids=["stock", "ours"],
)
def test_pipeline_parallel_ends_stock_vllm_at_the_first_request_and_ours_at_the_start(
    checkpoint: Path, tmp_path: Path, plugin: bool, message: str
) -> None:
    model, env = (checkpoint, TWO_RANKS) if plugin else (SOURCE, TWO_RANKS | {"VLLM_PLUGINS": ""})
    llm = {"dtype": "float32", "enforce_eager": True, "pipeline_parallel_size": 2}
    code, log, _ = run_engine(tmp_path, model, env, llm=llm)
    assert code != 0
    assert message in log


@pytest.mark.parametrize("mode", CANNOT)
@pytest.mark.parametrize("plugin", [False, True], ids=["stock", "ours"])
def test_what_the_cpu_backend_cannot_do_fails_alike(checkpoint: Path, tmp_path: Path, mode: str, plugin: bool) -> None:
    """These modes are untested for us because they do not work for any model on a CPU. Where this test fails, vLLM
    has learnt one of them: test it in earnest then, and say so in docs/serving.md."""
    llm, env, message = CANNOT[mode]
    model, env = (checkpoint, env) if plugin else (SOURCE, env | {"VLLM_PLUGINS": ""})
    code, log, _ = run_engine(tmp_path, model, env, llm={"dtype": "float32", "enforce_eager": True, **llm})
    assert code != 0
    assert message in log
