"""How a dense model uses its experts on the calibration text: one sweep forwards, a layer in memory at a time."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offline.errors import InputError
from offline.io.progress import Steps
from offline.run.sweep import Scratch, Sweep, Visitor
from offline.source.dense import DenseModel
from offline.source.layerwise import LayerwiseModel, read_hf_config
from offline.work.statistics import DenseExperts


@dataclass(frozen=True)
class Usage:
    """What the calibration tells about one layer's experts. tokens: float64 [experts], rows routed to each; output:
    float64 [experts], sum over those rows of gate * ||E(x)||."""

    tokens: Tensor
    output: Tensor


class CountedExperts(DenseExperts):
    """The dense experts of one layer, which also count what each of them does."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.usage = Usage(*torch.zeros(2, self._shape.num_experts, dtype=torch.float64))

    def gave(self, expert: int, output: Tensor) -> None:
        self.usage.tokens[expert] += len(output)
        self.usage.output[expert] += float(output.norm(dim=-1).sum(dtype=torch.float64))


class Counting(Visitor):
    """found: layer -> how its experts are used."""

    name = "counted"

    def __init__(self, source: DenseModel, model: LayerwiseModel) -> None:
        self.source, self.model, self.layers = source, model, source.shape.layers
        self.found: dict[int, Usage] = {}

    def experts(self, layer: int) -> CountedExperts:
        held = self.source.experts.held(layer, self.model.device)
        biases = self.source.experts.biases(layer, self.model.device)
        experts = CountedExperts(self.source.shape, held, self.model.gated, biases=biases)
        self.found[layer] = experts.usage
        return experts

    def visited(self, layer: int) -> None:
        if not torch.isfinite(self.found[layer].output).all():
            raise InputError(f"layer {layer}: activations overflow on the calibration text; use another")


def count_usage(
    model: DenseModel, tokens: Tensor, device: torch.device, folder: Path, steps: Steps
) -> dict[int, Usage]:
    """Layer -> how its experts are used over windows of tokens, int64 [windows, seq_len]. One layer is in memory at a
    time, hidden states lie in `folder`; `steps` is told of every window and layer."""
    streamed = LayerwiseModel(model.reader, model.family, read_hf_config(model.folder), device)
    visitor = Counting(model, streamed)
    with tempfile.TemporaryDirectory(prefix="count-", dir=folder) as place:
        # Every layer that has experts is visited.
        sweep = Sweep(streamed, lambda layer: None, tokens, Scratch(Path(place)), steps, len(tokens))
        sweep.run(visitor)
    return visitor.found
