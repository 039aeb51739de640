"""Counts what a worker's layers do and writes it, every few seconds, to files that the front-end reads.

A CUDA graph runs no Python: what is counted per token is counted on the device, in static shapes and without a
synchronisation, and copied to the host by the graph itself.
"""

from __future__ import annotations

import threading
import weakref
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from d2moe_vllm import compat
from d2moe_vllm.format.config import CheckpointConfig
from d2moe_vllm.observability.files import Sample, Writer
from d2moe_vllm.observability.metrics import COLUMNS_USED, DELTA_BYTES, EXPERT_TOKENS, SECONDS, Half, layer_groups

INTERVAL = 2.0
"""Seconds between two writes."""

NOT_RECORDED = -1

logger = compat.init_logger(__name__)

_recorder: Recorder | None = None


def start(folder: str | None, config: CheckpointConfig) -> None:
    """Record the model that is being built, into `folder`; None: do not. Again for the same model: nothing.

    A process records one model: not a second one (a draft model) as long as the first is there.
    """
    global _recorder
    if folder is None or (_recorder is not None and _recorder.config() is not None):
        return
    if not Path(folder).is_dir():
        logger.info_once(f"d2moe: no metrics from this process, which does not see the server's folder {folder}")
        return
    try:
        _recorder = Recorder(Path(folder), config)
    except Exception as error:
        _give_up(error)
        return
    # A daemon, so that it keeps no worker alive. It ends when another model takes its recorder's place.
    threading.Thread(target=_publish_for_ever, args=(_recorder,), name="d2moe-metrics", daemon=True).start()


def add_layer(
    config: CheckpointConfig,
    layer: int,
    *,
    experts: Sequence[int],
    delta_bytes: int,
    used: Mapping[Half, float],
    masked: bool,
) -> int:
    """Have a layer recorded; what `record` is to be told of it, NOT_RECORDED if its model is not recorded here.

    experts: global number of each local expert; empty where another rank counts the same tokens.
    used: COLUMNS_USED of this layer. masked: whether vLLM's padding mask is one of this layer's rows.
    """
    if _recorder is None or _recorder.config() is not config:
        return NOT_RECORDED
    place = len(_recorder.layers)
    _recorder.layers[layer] = _Layer(place, tuple(experts), delta_bytes, dict(used), masked)
    return layer


def record(layer: int, topk_ids: Tensor, seconds: float) -> None:
    """Count one call of a layer. topk_ids: int [T, K], local experts, -1 for none. Never raises."""
    if _recorder is not None and layer != NOT_RECORDED:
        try:
            _recorder.record(layer, topk_ids, seconds)
        except Exception as error:
            _give_up(error)


def _give_up(error: Exception) -> None:
    global _recorder
    _recorder = None
    logger.warning("d2moe: metrics stand still from here on, serving goes on (%s: %s)", type(error).__name__, error)


def _publish_for_ever(recorder: Recorder) -> None:
    pause = threading.Event()
    while not pause.wait(INTERVAL) and _recorder is recorder:
        try:
            recorder.writer.write(recorder.samples())
        except Exception as error:
            _give_up(error)


@dataclass
class _Layer:
    place: int
    experts: tuple[int, ...]
    delta_bytes: int
    used: dict[Half, float]
    masked: bool
    seconds: float = 0.0
    calls: int = 0


class Recorder:
    """What this process knows of one model's layers."""

    def __init__(self, folder: Path, config: CheckpointConfig) -> None:
        self.config, self.writer = weakref.ref(config), Writer(folder)
        self.layers: dict[int, _Layer] = {}
        self._groups = layer_groups(config)
        self._rank = str(compat.global_rank())
        self._counts: Tensor | None = None
        self._one: Tensor | None = None
        self._on_host: Tensor | None = None

    def record(self, layer: int, topk_ids: Tensor, seconds: float) -> None:
        if (entry := self.layers.get(layer)) is None:
            return
        capturing = topk_ids.is_cuda and torch.cuda.is_current_stream_capturing()
        # Not while a graph is captured: its memory is its own. The first call is the profiling run.
        if self._counts is None or self._on_host is None or self._one is None:
            if capturing:
                return
            self._counts, self._on_host = self._empty_counts(topk_ids.device)
            self._one = torch.ones(1, dtype=torch.int64, device=topk_ids.device)
        # Profiling serves nobody. A capture does not either, but what it captures runs at each replay.
        if compat.is_profile_run() and not capturing:
            return
        if topk_ids.device.type == "cpu":
            entry.seconds += seconds
            entry.calls += 1
        if entry.experts:
            padding = compat.padding_mask(topk_ids.shape[0]) if entry.masked else None
            count_tokens(self._counts[entry.place], topk_ids, padding, self._one)
        if self._on_host is not self._counts and entry.place == len(self.layers) - 1:
            self._on_host.copy_(self._counts, non_blocking=True)

    def _empty_counts(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """int64 [layers, 1 + local experts + 1], see count_tokens, on the device and, pinned, on the host."""
        bins = max(len(layer.experts) for layer in self.layers.values()) + 2
        with torch.inference_mode(False):
            counts = torch.zeros(len(self.layers), bins, dtype=torch.int64, device=device)
            if device.type == "cpu":
                return counts, counts
            return counts, torch.zeros(counts.shape, dtype=torch.int64, device="cpu", pin_memory=True)

    def samples(self) -> Iterator[Sample]:
        """All numbers as they are now."""
        layers = dict(self.layers)
        held: dict[str, float] = defaultdict(float)
        ratios: dict[tuple[str, str], list[float]] = defaultdict(list)
        seconds: dict[str, float] = defaultdict(float)
        calls: dict[str, float] = defaultdict(float)
        for number, layer in layers.items():
            group = self._groups[number]
            held[group] += layer.delta_bytes
            for half, ratio in layer.used.items():
                ratios[group, half].append(ratio)
            if layer.calls:
                seconds[group] += layer.seconds
                calls[group] += layer.calls
        for group in held:
            yield Sample(DELTA_BYTES, "", (group, self._rank), held[group])
        for (group, name), found in ratios.items():
            yield Sample(COLUMNS_USED, "", (group, name), sum(found) / len(found))
        for group in calls:
            yield Sample(SECONDS, "_sum", (group, self._rank), seconds[group])
            yield Sample(SECONDS, "_count", (group, self._rank), calls[group])
        for (group, expert), count in self._tokens(layers).items():
            yield Sample(EXPERT_TOKENS, "_total", (group, str(expert)), count)

    def _tokens(self, layers: Mapping[int, _Layer]) -> dict[tuple[str, int], int]:
        """By (group, global expert); 0 for experts that no token went to yet."""
        found: dict[tuple[str, int], int] = defaultdict(int)
        rows = None if self._on_host is None else self._on_host.tolist()
        for number, layer in layers.items():
            for local, expert in enumerate(layer.experts):
                found[self._groups[number], expert] += rows[layer.place][1 + local] if rows else 0
        return found


def count_tokens(counts: Tensor, topk_ids: Tensor, padding_mask: Tensor | None, one: Tensor) -> None:
    """Adds a batch to counts, in place: no shape and no control flow depends on data.

    counts: int64 [1 + E + 1]: ids below 0, of expert 0 to E - 1, and above. topk_ids: int [T, K].
    padding_mask: bool [T], True for rows that do not count. one: int64 [1], a constant not to be made each time.
    """
    if padding_mask is not None:
        topk_ids = topk_ids.masked_fill(padding_mask.unsqueeze(1), -1)
    # An index out of range would be fatal on a GPU, so bins at both ends take it. The sum is int64, as `one` is.
    bins = torch.add(topk_ids.clamp(-1, counts.numel() - 2), one).flatten()
    counts.index_add_(0, bins, one.expand(bins.shape[0]))
