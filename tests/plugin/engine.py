"""The real engine, offline, in a process of its own; results as token ids and log-probabilities."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import forks
import torch

PROMPTS = (
    "The assignment statement evaluates the expression list and",
    "A class definition",
    "The import statement combines two operations; it searches for the named module, then",
    "Lists are",
)
MAX_TOKENS = 24
HERE = Path(__file__).parent
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
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import llm_runner; llm_runner.main('job.json')"
    env = {**ENVIRONMENT, **env}
    if all(name.startswith(("VLLM_", "HF_HUB_")) for name in env):
        done = forks.python(code, imports=forks.VLLM, env=env, cwd=folder, log=folder / "log")
        return done.returncode, done.stderr, output
    # All else is read when modules are imported.
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, cwd=folder, timeout=600, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    (folder / "log").write_text(done.stdout)
    return done.returncode, done.stdout, output


def generate(
    folder: Path,
    model: Path,
    env: dict[str, str] | None = None,
    one_by_one: bool = False,
    job: dict[str, Any] | None = None,
    **llm: Any,
) -> Results:
    """job: other prompts or another number of tokens than PROMPTS and MAX_TOKENS, or `batches` of prompts that share
    forward passes, or the file of an `image` that goes with each. llm: arguments of vllm.LLM."""
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
