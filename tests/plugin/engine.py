"""The real engine, offline, in a process of its own; results as token ids and log-probabilities."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

PROMPTS = (
    "The assignment statement evaluates the expression list and",
    "A class definition",
    "The import statement combines two operations; it searches for the named module, then",
    "Lists are",
)
MAX_TOKENS = 24
RUNNER = Path(__file__).with_name("llm_runner.py")
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    # The engine in this process and not in one of its own, which would import vLLM once more.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
TWO_RANKS = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}

Results = list[dict[str, list]]


def run_engine(folder: Path, model: Path, env: dict[str, str], **job: Any) -> tuple[int, str, Path]:
    """Exit code, log, and where the results are; nothing of the engine outlives this."""
    output = folder / "results.json"
    content = {"prompts": PROMPTS, "max_tokens": MAX_TOKENS, "one_by_one": False, "output": str(output), **job}
    content["llm"] = {"model": str(model), **job["llm"]}
    (folder / "job.json").write_text(json.dumps(content))
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, str(RUNNER), str(folder / "job.json")],
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **ENVIRONMENT, **env},
        )
        try:
            code = process.wait(timeout=600)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return code, (folder / "log").read_text(), output


def generate(
    folder: Path,
    model: Path,
    env: dict[str, str] | None = None,
    one_by_one: bool = False,
    job: dict[str, Any] | None = None,
    **llm: Any,
) -> Results:
    """job: other prompts or another number of tokens than PROMPTS and MAX_TOKENS, or `batches` of prompts that share
    forward passes. llm: arguments of vllm.LLM."""
    folder.mkdir()
    code, log, output = run_engine(folder, model, env or {}, one_by_one=one_by_one, **(job or {}), llm=llm)
    assert code == 0, log[-5000:]
    return json.loads(output.read_text())


def assert_same(ours: Results, expected: Results, tolerance: float = 1e-4) -> None:
    """Identical greedy tokens; log-probabilities of prompt and completion within tolerance."""
    assert [r["ids"] for r in ours] == [r["ids"] for r in expected]
    for kind in ("prompt_logprobs", "logprobs"):
        for mine, theirs in zip(ours, expected, strict=True):
            torch.testing.assert_close(torch.tensor(mine[kind]), torch.tensor(theirs[kind]), rtol=0, atol=tolerance)
