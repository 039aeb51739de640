"""How a dense model uses its experts on the calibration text: one sweep forwards, a layer in memory at a time."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.activations import ACT2FN

from offline.errors import InputError
from offline.io.progress import Steps
from offline.run.sweep import batches
from offline.source.dense import DenseModel
from offline.source.layerwise import LayerwiseModel, read_hf_config
from offline.work.activations import Rows
from offline.work.statistics import DenseExperts


@dataclass(frozen=True)
class Usage:
    """What the calibration tells about one layer's experts. tokens: float64 [experts], rows routed to each; output:
    float64 [experts], sum over those rows of gate * ||E(x)||."""

    tokens: Tensor
    output: Tensor


class CountedExperts(DenseExperts):
    """The dense experts of one layer, which also count what each of them does."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.usage = Usage(*torch.zeros(2, self._shape.num_experts, dtype=torch.float64))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states: [tokens, hidden]; top_k_index, top_k_weights: [tokens, k]. Returns [tokens, hidden]."""
        output = torch.zeros_like(hidden_states)
        for expert in range(self._shape.num_experts):
            token, slot = (top_k_index == expert).nonzero(as_tuple=True)
            if not len(token):
                continue
            rows, gates = hidden_states[token], top_k_weights[token, slot, None]
            middle = self._activation(self._project(expert, "gate", rows)) * self._project(expert, "up", rows)
            weighted = gates * self._project(expert, "down", middle)
            self.usage.tokens[expert] += len(token)
            self.usage.output[expert] += float(weighted.norm(dim=-1).sum(dtype=torch.float64))
            output = output.index_add(0, token, weighted)
        return output


@torch.no_grad()
def count_usage(
    model: DenseModel, tokens: Tensor, device: torch.device, folder: Path, steps: Steps
) -> dict[int, Usage]:
    """Layer -> how its experts are used over windows of tokens, int64 [windows, seq_len]. One layer is in memory at a
    time, hidden states lie in `folder`; `steps` is told of every window and layer."""
    count, length = tokens.shape
    config = read_hf_config(model.folder)
    streamed, found = LayerwiseModel(model.reader, model.family, config, device), dict[int, Usage]()
    every = list(batches(count, length))
    with tempfile.TemporaryDirectory(prefix="count-", dir=folder) as place:
        hidden = Rows(Path(place) / "hidden.rows", count * length, model.shape.hidden_size)
        hidden.allocate()
        for batch in every:
            hidden.write(slice(batch.start * length, batch.stop * length), streamed.embed(tokens[batch]).flatten(0, 1))
        streamed.release()
        for number in range(max(model.shape.layers) + 1):
            steps.label(f"layer {number + 1}/{model.num_layers}: calibration")
            experts = None
            if number in model.shape.layers:
                held = model.experts.held(number, device)
                experts = CountedExperts(model.shape, held, ACT2FN[config.hidden_act])
            layer = streamed.load_layer(number, experts)
            for batch in every:
                rows = slice(batch.start * length, batch.stop * length)
                before = hidden.read(rows).view(batch.stop - batch.start, length, -1).to(device)
                hidden.write(rows, streamed.run_layer(number, layer, before).flatten(0, 1))
                steps.advance(batch.stop - batch.start)
            if experts is not None:
                if not torch.isfinite(experts.usage.output).all():
                    raise InputError(f"layer {number}: activations overflow on the calibration text; use another")
                found[number] = experts.usage
    return found
