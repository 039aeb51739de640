"""One MoE layer on this CPU, or on a CUDA device where there is one: our operator beside vLLM's fused MoE on the dense
layer, interleaved in one run.

Random bfloat16 weights and routing. A table on stdout, all rows in build/bench/layer.json. byte_ratio is what the dense
layer's experts in use weigh over what ours read for the same routing; limit the speed-up that is possible: the lower of
byte_ratio and of the dense layer's time over that of our multiplications at the peak rate, which is measured first.
After the rows of low-rank deltas in bfloat16, by ratio and scope, those of whole matrices of few bits, by storage:
ratio then is what of the dense layer's bytes is gone. On CPUs each of fewer than 8 bits has a second row, in the same
turns, of the backend that rounds what it multiplies with to 8 bits; error is how far its result is from the first's.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import layer_gpu
import torch
from layer_shapes import BYTES, GROUPS, SCOPES, SHAPES, STORAGES, Shape, dense_expert_bytes, sizes
from torch import Tensor

from d2moe_vllm.ops import BACKENDS
from d2moe_vllm.ops.packing import Packing
from d2moe_vllm.ops.weights import HalfSpec, LayerSpec, Weights

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OURS = BACKENDS["triton" if DEVICE == "cuda" else "cpu"]
INT8 = BACKENDS.get("cpu-int8") if DEVICE == "cpu" else None
Layer = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Of x, gates and ids."""
PRECISIONS = (torch.bfloat16,) if DEVICE == "cuda" else (torch.bfloat16, torch.float32)
OUT = Path(__file__).resolve().parent.parent / "build" / "bench" / "layer.json"


def spread(inputs: int, kept: int) -> Tensor:
    """kept ascending columns, as many in each group."""
    own = torch.stack([torch.randperm(inputs // GROUPS)[: kept // GROUPS].sort().values for _ in range(GROUPS)])
    return (own + torch.arange(GROUPS).unsqueeze(1) * (inputs // GROUPS)).flatten().int()


def random(*size: int) -> Tensor:
    """Numbers repeat after a prime number of them: drawing all of them anew takes longer than all measurements."""
    numbers, count = torch.randn(999983) * size[-1] ** -0.5, math.prod(size)
    return numbers.bfloat16().repeat(count // len(numbers) + 1)[:count].view(size).clone()


class Ours:
    """A layer of a uniform checkpoint at this ratio, packed."""

    def __init__(self, shape: Shape, ratio: float, scope: str) -> None:
        found = sizes(shape, ratio, scope)
        hidden, inner, experts, _ = shape
        rank, kept, used = found.rank, found.kept, found.used
        self.spec = LayerSpec(
            num_experts=experts,
            intermediate_size=inner,
            w13=HalfSpec((rank, rank), groups=GROUPS, used=used[0]),
            w2=HalfSpec((rank,), groups=GROUPS, used=used[1]),
            activation="silu",
            scope=scope,
        )
        self.base_bytes, self.expert_bytes = found.base_bytes, found.expert_bytes
        self.base_products = found.base_bytes // BYTES
        self.expert_products = found.expert_bytes // BYTES

        halves = []
        for inputs, outputs, parts, columns in ((hidden, inner, 2, kept[0]), (inner, hidden, 1, kept[1])):
            halves.append(
                Weights(
                    delta_u=random(experts, outputs, parts * rank),
                    delta_v=random(experts, parts * rank, inputs),
                    base=random(columns, parts * outputs),
                    base_columns=spread(inputs, columns),
                    base_norms=torch.rand(columns) + 0.5,
                )
            )
        self.halves = halves if OURS.pack is None else OURS.pack(*halves, self.spec)
        self.others: dict[str, Layer] = {}

    def __call__(self, x: Tensor, gates: Tensor, ids: Tensor) -> Tensor:
        return OURS.fused_experts(x, gates, ids, *self.halves, None, self.spec)


ZERO = {8: 128, 4: 8, 3: 3.5, 2: 1.5}
GROUP = 64


class Few:
    """A layer of whole matrices of few bits, gate, up and down alike, packed."""

    def __init__(self, shape: Shape, storage: str) -> None:
        hidden, inner, experts, _ = shape
        base, delta = (None if bits is None else Packing(bits, ZERO[bits], GROUP) for bits in STORAGES[storage])
        halves, self.base_bytes, self.expert_bytes = [], 0, 0
        self.expert_products = 3 * hidden * inner
        self.base_products = 0 if base is None else self.expert_products
        for inputs, outputs, parts in ((hidden, inner, 2), (inner, hidden, 1)):
            dense, dense_scales = self._matrices(delta, experts, parts * outputs, inputs)
            self.expert_bytes += (dense.nbytes + dense_scales.nbytes) // experts
            own = {"dense": dense, "dense_scales": dense_scales}
            if base is not None:
                one, scales = self._matrices(base, parts * outputs, inputs)
                own |= {"base": one, "base_scales": scales}
                self.base_bytes += one.nbytes + scales.nbytes
            halves.append(Weights(**own))
        specs = (HalfSpec((0,) * parts, groups=GROUPS, base=base, delta=delta) for parts in (2, 1))
        self.spec = LayerSpec(experts, inner, *specs, activation="silu", scope="off")
        self.others: dict[str, Layer] = {}
        if INT8 is not None and INT8.pack is not None and any(bits and bits < 8 for bits in STORAGES[storage]):
            # Packing takes the storage it is given.
            copies = (Weights(*(None if t is None else t.clone() for t in half)) for half in halves)
            packed, run, spec = INT8.pack(*copies, self.spec), INT8.fused_experts, self.spec
            self.others[", rows int8"] = lambda x, gates, ids: run(x, gates, ids, *packed, None, spec)
        self.halves = halves if OURS.pack is None else OURS.pack(*halves, self.spec)

    def _matrices(self, how: Packing | None, *size: int) -> tuple[Tensor, Tensor]:
        assert how is not None
        *rows, inputs = size
        codes = torch.randint(0, 256, (*rows, how.row_bytes(inputs)), dtype=torch.uint8)
        scale = inputs**-0.5 / 2 ** (how.bits - 1)
        return codes, (torch.rand(*rows, how.row_groups(inputs)) + 0.5).mul_(scale).bfloat16()

    def __call__(self, x: Tensor, gates: Tensor, ids: Tensor) -> Tensor:
        return OURS.fused_experts(x, gates, ids, *self.halves, None, self.spec)


class Dense:
    """vLLM's own kernel for CPUs without AMX, or with it, on its own packed weights."""

    def __init__(self, shape: Shape) -> None:
        import vllm._custom_ops as ops

        # Asks Linux for leave to use tiles: without it the first such instruction ends the process.
        self.isa = "amx" if torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx() else "vec"
        self.run = ops.cpu_fused_moe
        hidden, inner, experts, _ = shape
        self.w13 = self._packed(ops, experts, 2 * inner, hidden)
        self.w2 = self._packed(ops, experts, hidden, inner)

    def _packed(self, ops: Any, *size: int) -> Tensor:
        return ops.cpu_prepack_moe_weight(random(*size), self.isa)

    def __call__(self, x: Tensor, gates: Tensor, ids: Tensor) -> Tensor:
        out = torch.empty_like(x)
        self.run(out, x, self.w13, self.w2, None, None, gates, ids, "silu", self.isa)
        return out


def peak_rate(seconds: float = 3.0) -> float:
    """Multiplications a second of a large matrix product: in bfloat16, or in float32 where a processor has none."""
    best, end = math.inf, time.perf_counter() + seconds
    size = 8192 if DEVICE == "cuda" else 1024
    pairs = [(torch.randn(size, size).to(kind), torch.randn(size, size).to(kind)) for kind in PRECISIONS]
    while time.perf_counter() < end:
        for x, w in pairs:
            milliseconds = interleaved({"product": lambda x=x, w=w: x @ w}, 0)["product"]
            best = min(best, min(milliseconds) / 1000)
    return size**3 / best


def interleaved(calls: dict[str, Callable[[], Any]], seconds: float) -> dict[str, list[float]]:
    """Milliseconds of each, turn by turn, after one turn to warm up."""
    if DEVICE == "cuda":
        return layer_gpu.interleaved(calls, seconds)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < 3:
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            times[name].append(1000 * (time.perf_counter() - started))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 4, 16, 64, 256, 1024])
    parser.add_argument("--ratios", nargs="*", type=float, default=[0.2, 0.4, 0.6, 0.8])
    parser.add_argument("--scopes", nargs="+", default=list(SCOPES), choices=SCOPES)
    parser.add_argument("--storages", nargs="*", default=list(STORAGES), choices=STORAGES)
    parser.add_argument("--seconds", type=float, default=1.5, help="per row")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_default_device(DEVICE)
    OUT.parent.mkdir(parents=True, exist_ok=True)
    rows, peak = [], peak_rate()
    print(f"peak rate measured: {2 * peak / 1e9:.0f} GFLOP/s")
    titles = ("dense ms", "ours ms", "speed-up", "bytes", "limit", "of it", "GB/s", "error")
    print(f"{'shape':16} {'storage':32} {'ratio':>5} {'scope':>5} {'tokens':>6}", *(f"{title:>8}" for title in titles))
    for name in arguments.shapes:
        shape = SHAPES[name]
        dense = layer_gpu.Dense(shape) if DEVICE == "cuda" else Dense(shape)
        for ratio in arguments.ratios:
            for scope in arguments.scopes:
                ours = Ours(shape, ratio, scope)
                for tokens in arguments.tokens:
                    rows += measure(name, shape, dense, ours, ratio, scope, tokens, peak, arguments.seconds)
                    OUT.write_text(json.dumps(rows, indent=1))
        for storage in arguments.storages:
            few = Few(shape, storage)
            ratio = 1 - (few.base_bytes / shape.experts + few.expert_bytes) / dense_expert_bytes(shape)
            for tokens in arguments.tokens:
                rows += measure(name, shape, dense, few, ratio, "off", tokens, peak, arguments.seconds, storage)
                OUT.write_text(json.dumps(rows, indent=1))


def measure(
    name: str,
    shape: Shape,
    dense: Callable[..., Tensor],
    ours: Ours | Few,
    ratio: float,
    scope: str,
    tokens: int,
    peak: float,
    seconds: float,
    storage: str = "bfloat16",
) -> list[dict[str, Any]]:
    """A row of ours, and one of each of its others."""
    x = torch.randn(tokens, shape.hidden, dtype=torch.bfloat16)
    ids = torch.stack([torch.randperm(shape.experts)[: shape.top_k] for _ in range(tokens)]).int()
    gates = torch.rand(tokens, shape.top_k)
    layers = {"": ours, **ours.others}
    calls: dict[str, Callable[[], Any]] = {"dense": lambda: dense(x, gates, ids)}
    calls |= {kind: (lambda layer=layer: layer(x, gates, ids)) for kind, layer in layers.items()}
    times = interleaved(calls, seconds)
    active = ids.unique().numel()
    dense_bytes = active * dense_expert_bytes(shape)
    our_bytes = ours.base_bytes + active * ours.expert_bytes
    # A base is multiplied with each token once, however many experts it goes to.
    products = tokens * (ours.base_products + shape.top_k * ours.expert_products)
    median = {key: statistics.median(values) for key, values in times.items()}
    first, rows = ours(x, gates, ids).float(), []
    for kind, layer in layers.items():
        row = {
            "shape": name, "tokens": tokens, "ratio": ratio, "scope": scope, "storage": storage + kind,
            "dense_ms": median["dense"], "ours_ms": median[kind], "speedup": median["dense"] / median[kind],
            "byte_ratio": dense_bytes / our_bytes, "bytes_read": our_bytes,
            "gb_per_s": our_bytes / median[kind] / 1e6, "dense_gb_per_s": dense_bytes / median["dense"] / 1e6,
            "runs": len(times[kind]), "ours_ms_min_max": [min(times[kind]), max(times[kind])],
            "dense_ms_min_max": [min(times["dense"]), max(times["dense"])],
        }  # fmt: skip
        if kind:
            row["error"] = float((layer(x, gates, ids).float() - first).norm() / first.norm())
        row["limit"] = min(row["byte_ratio"], row["dense_ms"] / (1000 * products / peak))
        row["of_limit"] = row["speedup"] / row["limit"]
        columns = ("dense_ms", "ours_ms", "speedup", "byte_ratio", "limit", "of_limit", "gb_per_s")
        figures = " ".join(f"{row[key]:8.2f}" for key in columns)
        error = f" {row['error']:8.4f}" if kind else ""
        print(f"{name:16} {storage + kind:32} {ratio:5.0%} {scope:>5} {tokens:6} {figures}{error}", flush=True)
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()
