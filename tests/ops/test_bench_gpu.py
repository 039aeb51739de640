"""What of `make test-gpu` can be known without a GPU."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest
import torch
from compression import ROOT


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "run_gpu.py")], check=False, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "test-gpu: torch finds no NVIDIA GPU here; run it on a machine with one\n"


def test_vllms_dense_kernels_take_what_the_benchmark_gives_them() -> None:
    """By name and order of arguments; on a CPU no more can be said."""
    module = pytest.importorskip("vllm.model_executor.layers.fused_moe.fused_moe")
    names = list(inspect.signature(module.fused_experts).parameters)
    assert names[:5] == ["hidden_states", "w1", "w2", "topk_weights", "topk_ids"]
    required = [p for p in inspect.signature(module.fused_experts).parameters.values() if p.default is p.empty]
    assert len(required) == 5
