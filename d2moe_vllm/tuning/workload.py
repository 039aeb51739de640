"""A layer of random weights to measure kernels on, and the clock for it."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from d2moe_vllm import ops
from d2moe_vllm.format.config import CheckpointConfig, Layer, Projection, Pruning, Scope, Source
from d2moe_vllm.ops.shapes import GROUPS, Shape, sizes
from d2moe_vllm.ops.triton import pack, tiles
from d2moe_vllm.serving.loading import LayerLoader

Timer = Callable[[Callable[[], object]], float]
"""Milliseconds that a call takes."""


def uniform_config(shape: Shape, ratio: float, scope: Scope) -> CheckpointConfig:
    """A checkpoint of one layer with this shape, as `d2moe compress` plans it at this ratio, in bfloat16."""
    found = sizes(shape, ratio, scope)
    gate, down = (
        Projection(rank=found.rank, kept_columns=kept, used_columns=used)
        for kept, used in zip(found.kept, found.used, strict=True)
    )
    parameters = 3 * shape.experts * shape.hidden * shape.intermediate
    return CheckpointConfig(
        family="mixtral",
        experts="model.layers.{layer}.block_sparse_moe.experts",
        projections={"gate": "w1", "up": "w3", "down": "w2"},
        num_experts=shape.experts,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        dtype="bfloat16",
        pruning=Pruning(scope=scope, groups=GROUPS),
        layers={0: Layer(gate=gate, up=gate, down=down)},
        source=Source(name="a shape", parameters=parameters, bytes=2 * parameters),
    )


def typical_layer(config: CheckpointConfig) -> int:
    """The one with the median of all ranks."""
    ranks = {number: sum(layer[role].rank for role in layer.roles) for number, layer in config.layers.items()}
    return sorted(ranks, key=ranks.__getitem__)[len(ranks) // 2]


class Workload:
    """One layer of random weights on a device, and batches for it. Called with tokens and a table: milliseconds,
    infinite where triton cannot compile or launch a kernel with such a tile."""

    def __init__(self, config: CheckpointConfig, number: int, top_k: int, device: torch.device, timer: Timer) -> None:
        self.device, self.timer, self.top_k = device, timer, top_k
        self.dtype = torch.float16 if config.dtype == "float16" else torch.bfloat16
        if device.type == "cpu":  # interpreted, where bfloat16 products are wrong
            self.dtype = torch.float32
        experts = config.num_experts
        loader = LayerLoader(config, number, num_local_experts=experts, local_expert=lambda expert: expert)
        with device:
            found = loader.empty_parameters(self.dtype)
        for name, tensor in found.items():
            if tensor.is_floating_point() and not name.endswith("norms"):
                tensor.normal_(0, tensor.shape[-1] ** -0.5)
        activation = "silu" if "gate" in config.projections else "relu2"
        self.spec = loader.spec(config.pruning.scope, activation=activation, prune_down=True)
        self.halves = pack(*ops.halves([found.get(name) for name in ops.PARAMETERS]), self.spec)
        self.hidden_size = config.hidden_size
        self._batches: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def batch(self, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """x, gates, ids: every token goes to top_k different experts, all equally likely."""
        if tokens not in self._batches:
            ids = torch.rand(tokens, self.spec.num_experts, device=self.device).argsort(dim=1)
            x = torch.randn(tokens, self.hidden_size, device=self.device).to(self.dtype)
            gates = torch.rand(tokens, self.top_k, device=self.device)
            self._batches[tokens] = x, gates, ids[:, : self.top_k].int()
        return self._batches[tokens]

    def run(self, tokens: int) -> Tensor:
        return ops.fused_experts("triton", *self.batch(tokens), *self.halves, None, self.spec)

    def kernels(self, tokens: int) -> set[str]:
        """Those whose tiles such a batch asks for."""
        with tiles.using(asked := _Asked()):
            self.run(tokens)
        return asked.names

    def __call__(self, tokens: int, table: Mapping[str, Mapping[int, tiles.Tile]]) -> float:
        from triton.errors import TritonError

        with tiles.using(table):
            try:
                return self.timer(lambda: self.run(tokens))
            except TritonError:  # too much shared memory, or code that the assembler refuses
                return math.inf


class _Asked(Mapping[str, Mapping[int, tiles.Tile]]):
    """Holds no tile, and remembers of which kernels it was asked for one."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def __contains__(self, kernel: object) -> bool:
        self.names.add(str(kernel))
        return False

    def __getitem__(self, kernel: str) -> Mapping[int, tiles.Tile]:
        raise KeyError(kernel)

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


class GraphTimer:
    """Median milliseconds of a call on the current CUDA device, replayed from a graph as when serving, with nothing of
    it left in the L2 cache. Has never been run: written without a GPU."""

    def __init__(self, seconds: float = 0.1, flush_bytes: int = 256 << 20) -> None:
        self.seconds = seconds
        self.flush = torch.empty(flush_bytes, dtype=torch.uint8, device="cuda")

    def __call__(self, call: Callable[[], object]) -> float:
        return statistics.median(self.times(call))

    def times(self, call: Callable[[], object]) -> list[float]:
        graph = self.captured(call)
        times: list[float] = []
        end = time.perf_counter() + self.seconds
        while len(times) < 5 or time.perf_counter() < end:
            times.append(self.once(graph))
        return times

    @staticmethod
    def captured(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
        """After two calls on another stream, which compile and fill caches."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()
            call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph

    def once(self, graph: torch.cuda.CUDAGraph) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.flush.zero_()
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
