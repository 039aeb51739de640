"""The layer benchmark's dense side and clock on a CUDA device. Written without one, and never run yet."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from layer_shapes import Shape
from torch import Tensor


class Dense:
    """vLLM's Triton kernels on the dense layer, with the tiles that vLLM has for this device."""

    def __init__(self, shape: Shape) -> None:
        from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts

        hidden, inner, experts, _ = shape
        self.run = fused_experts
        self.w13, self.w2 = _random(experts, 2 * inner, hidden), _random(experts, hidden, inner)

    def __call__(self, x: Tensor, gates: Tensor, ids: Tensor) -> Tensor:
        return self.run(x, self.w13, self.w2, gates, ids)


def _random(*size: int) -> Tensor:
    return torch.randn(size, dtype=torch.bfloat16, device="cuda") * size[-1] ** -0.5


def interleaved(calls: dict[str, Callable[[], Any]], seconds: float) -> dict[str, list[float]]:
    """Milliseconds of each, replayed from CUDA graphs turn by turn, with nothing of them left in the L2 cache."""
    from d2moe_vllm.tuning.workload import GraphTimer

    timer = GraphTimer()
    graphs = {name: timer.captured(call) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < 3:
        for name, graph in graphs.items():
            times[name].append(timer.once(graph))
    return times
