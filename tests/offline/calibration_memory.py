"""A layer of many small experts, there and back: prints the bytes that this added to the process at the worst moment.

A process of its own: what is free within one that has done other things fits whatever is asked for.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from offline.io.memory import forget_peak, peak_memory
from offline.work.statistics import DenseExperts

HIDDEN, MIDDLE, EXPERTS, TOKENS, CHOSEN = 1024, 512, 64, 1024, 8


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    shapes = {"gate": (MIDDLE, HIDDEN), "up": (MIDDLE, HIDDEN), "down": (HIDDEN, MIDDLE)}
    weights = {
        (expert, role): torch.full(shape, 0.01, dtype=torch.bfloat16)
        for expert in range(EXPERTS)
        for role, shape in shapes.items()
    }
    halves = {"w13": ("gate", "up"), "w2": ("down",)}
    shape: Any = SimpleNamespace(num_experts=EXPERTS, intermediate_size=MIDDLE, halves=halves)
    experts = DenseExperts(shape, lambda expert, role: weights[expert, role], lambda gate, up: gate.sigmoid() * up)
    x = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    chosen = torch.rand(TOKENS, EXPERTS).topk(CHOSEN).indices
    forget_peak()
    before = peak_memory()
    experts(x, chosen, torch.rand(TOKENS, CHOSEN)).sum().backward()
    print(peak_memory() - before)


if __name__ == "__main__":
    main()
