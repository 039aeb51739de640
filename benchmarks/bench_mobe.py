"""One MoE layer of MoBE (METHODS 3) on this CPU: the cpu backend beside the reference backend and vLLM's fused MoE on
the dense layer, interleaved in one run.

Random bfloat16 weights and routing; as many bases as `auto` takes, ranks by MoBE's budget at this ratio of the experts'
bytes. Ours and the reference have to agree before they are timed. A table on stdout, all rows in build/bench/mobe.json.
byte_ratio is what the dense layer's experts in use weigh over what ours read: bases, and these experts' A and down.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from bench_layer import Dense, interleaved, random
from layer_shapes import BYTES, SHAPES, Shape, dense_expert_bytes, multiple
from torch import Tensor

from d2moe_vllm.ops import cpu, reference
from d2moe_vllm.ops.weights import HalfSpec, LayerSpec, Weights

OUT = Path(__file__).resolve().parent.parent / "build" / "bench" / "mobe.json"
TOLERANCE = 0.02
"""Of the result's norm; bfloat16 rounds by 0.4 %, a wrong basis is tens of percent."""
REFERENCE_SECONDS = 4
"""Where one call of the reference backend takes longer, it is timed once: it is there for scale."""


def bases_of(shape: Shape) -> int:
    """`auto` of the recipe."""
    return max(shape.experts // 4, 2)


def rank_of(shape: Shape, ratio: float) -> int:
    """Of gate and up, where `ratio` of the experts is gone and down stays. Raises ValueError where none does that."""
    hidden, inner, experts, _ = shape
    # The share of gate and up that is kept: gamma of METHODS 3.
    gamma = 1 - 1.5 * ratio
    rank = multiple(gamma * experts * inner * hidden / (experts * inner + bases_of(shape) * hidden), 16)
    if not 0 < gamma < 1 or rank > min(hidden, inner):
        raise ValueError(f"ratio {ratio:g} is out of MoBE's reach for {shape}; choose one between 0.3 and 0.6")
    return rank


class Layer:
    """Random, of one kind of V after another: as the checkpoint has it, and packed."""

    def __init__(self, shape: Shape, ratio: float, function: str) -> None:
        hidden, inner, experts, _ = shape
        rank, m = rank_of(shape, ratio), bases_of(shape)
        alpha = torch.rand(experts, 2, m).softmax(dim=2).flatten(1).bfloat16()
        # Such that f bends: its arguments are about 1.
        w13 = Weights(
            bases=random(m, 2 * rank, hidden) * (hidden * m) ** 0.5, alpha=alpha, a=random(experts, inner, 2 * rank)
        )
        w13 = w13._replace(a=w13.a * hidden**-0.5)  # type: ignore[operator]
        self.halves = (w13, Weights(dense=random(experts, hidden, inner)))
        self.spec = LayerSpec(experts, inner, HalfSpec((rank, rank)), HalfSpec((0,)), "silu", "off", function)
        # Packing takes the storage of what it packs, which the reference still needs.
        copies = [Weights(*(None if t is None else t.clone() for t in half)) for half in self.halves]
        self.packed = cpu.pack(*copies, self.spec)
        self.base_bytes = m * 2 * rank * hidden * BYTES
        self.expert_bytes = (2 * rank * inner + hidden * inner) * BYTES

    def ours(self, *inputs: Tensor) -> Tensor:
        return cpu.fused_experts(*inputs, *self.packed, None, self.spec)

    def reference(self, *inputs: Tensor) -> Tensor:
        return reference.fused_experts(*inputs, *self.halves, None, self.spec)


def measure(shape: Shape, layer: Layer, dense: Dense, tokens: int, seconds: float) -> dict[str, Any]:
    """Times of the three. Ends the program where ours and the reference differ."""
    inputs = (
        torch.randn(tokens, shape.hidden, dtype=torch.bfloat16),
        torch.rand(tokens, shape.top_k),
        torch.stack([torch.randperm(shape.experts)[: shape.top_k] for _ in range(tokens)]).int(),
    )
    found, expected = layer.ours(*inputs).float(), layer.reference(*inputs).float()
    if not (error := float((found - expected).norm() / expected.norm())) < TOLERANCE:
        sys.exit(f"not timed: {tokens} tokens, the backends differ by {error:.3g}")
    times = interleaved({"dense": lambda: dense(*inputs), "ours": lambda: layer.ours(*inputs)}, seconds)
    times["reference"] = timed_reference(layer, inputs)
    active = inputs[2].unique().numel()
    ms = {name: statistics.median(values) for name, values in times.items()}
    our_bytes = layer.base_bytes + active * layer.expert_bytes
    return {
        "tokens": tokens, "experts_in_use": active, "rank": layer.spec.w13.ranks[0], "bases": bases_of(shape),
        "function": layer.spec.function, "ms": ms, "runs": {name: len(values) for name, values in times.items()},
        "ms_min_max": {name: [min(values), max(values)] for name, values in times.items()}, "difference": error,
        "byte_ratio": active * dense_expert_bytes(shape) / our_bytes,
    }  # fmt: skip


def timed_reference(layer: Layer, inputs: tuple[Tensor, ...]) -> list[float]:
    """Milliseconds; the call that was compared has warmed it up."""
    found: list[float] = []
    while len(found) < 3 and sum(found) < 1000 * REFERENCE_SECONDS:
        started = time.perf_counter()
        layer.reference(*inputs)
        found.append(1000 * (time.perf_counter() - started))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["Mixtral-8x7B", "Qwen3-30B-A3B"], choices=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 4, 16, 64, 256])
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.3, 0.5], help="of the experts' bytes")
    parser.add_argument("--functions", nargs="+", default=["silu"], choices=list(reference.FUNCTIONS))
    parser.add_argument("--seconds", type=float, default=1.5, help="per row, for ours and dense")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    OUT.parent.mkdir(parents=True, exist_ok=True)
    titles = ("dense ms", "ref. ms", "ours ms", "speed-up", "bytes")
    print(f"{'shape':16} {'ratio':>5} {'f':>5} {'tokens':>6}", *(f"{title:>9}" for title in titles))
    for name in arguments.shapes:
        shape = SHAPES[name]
        dense = Dense(shape)
        for ratio, function in itertools.product(arguments.ratios, arguments.functions):
            try:
                layer = Layer(shape, ratio, function)
            except ValueError as error:
                parser.error(str(error))
            for tokens in arguments.tokens:
                row = measure(shape, layer, dense, tokens, arguments.seconds)
                rows.append({"shape": name, "ratio": ratio, **row})
                OUT.write_text(json.dumps(rows, indent=1))
                ms = row["ms"]
                figures = (ms["dense"], ms["reference"], ms["ours"], ms["dense"] / ms["ours"], row["byte_ratio"])
                head = f"{name:16} {ratio:5.0%} {function:>5} {tokens:6}"
                print(head, *(f"{figure:9.2f}" for figure in figures), flush=True)


if __name__ == "__main__":
    main()
