"""The loop over layers. Two sweeps: forwards to store every layer's input, then backwards, where each layer
is run once more with statistics, compressed and written. One layer's weights are in memory at a time.

Going backwards means that a layer's Fisher information, Gram matrices and result exist only while it is
the current one: nothing of the size of the model ever lies in memory or in the working folder.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.activations import ACT2FN

from offline.compression import compress_layer
from offline.layerwise import LayerwiseModel, next_token_loss, read_hf_config
from offline.plan import BATCH_TOKENS, Plan, layer_work
from offline.progress import Steps
from offline.statistics import DenseExperts, LayerStatistics
from offline.workdir import WorkDir


def batches(windows: int, length: int) -> Iterator[slice]:
    """Windows that run together, about BATCH_TOKENS tokens at a time."""
    step = max(1, BATCH_TOKENS // length)
    for start in range(0, windows, step):
        yield slice(start, min(start + step, windows))


@dataclass
class Run:
    """One compression, from tokens to a compressed layer file for every layer in the working folder."""

    plan: Plan
    tokens: Tensor
    work: WorkDir
    steps: Steps
    streamed: LayerwiseModel = field(init=False)

    def __post_init__(self) -> None:
        model = self.plan.model
        config = read_hf_config(model.folder)
        self.streamed = LayerwiseModel(model.reader, model.family, config)
        self.activation = ACT2FN[config.hidden_act]
        self.last = model.shape.layers[-1]

    def compress_layers(self) -> None:
        """Run or resume: every layer ends as a file in the working folder."""
        layers = self.plan.model.shape.layers
        pending = [layer for layer in layers if not self.work.layer_done(layer)]
        forward, statistics, factor = layer_work(self.plan)
        if done := len(layers) - len(pending):
            work = done * (forward + statistics + factor)
            self.steps.skip(work, f"resuming: {done} of {len(layers)} layers are done already")
        if not pending:
            return
        self._sweep_forward(pending[-1], forward)
        for layer in reversed(pending):
            self._statistics_and_factors(layer, statistics, factor)

    def _sweep_forward(self, last: int, work: float) -> None:
        """Store the input of layers 0 to `last`, and the last layer's output where its gradient is still needed."""
        needs_head = self.plan.needs_fisher and last == self.last and not self.work.has(f"gradient-{last + 1:05d}")
        if not self.work.has("hidden-00000"):
            self.steps.label("embeddings")
            writer = self.work.create("hidden-00000", self.plan.windows)
            for batch in batches(*self.plan.windows[:2]):
                writer.array[batch] = self.streamed.embed(self.tokens[batch])
            writer.publish()
        for layer in range(last + (1 if needs_head else 0)):
            if self.work.has(f"hidden-{layer + 1:05d}"):
                self.steps.skip(work)
                continue
            self._forward_layer(layer, work)
        self.steps.advance(0 if needs_head else work)
        if needs_head:
            self._head_gradient(last + 1)

    def _forward_layer(self, layer: int, work: float) -> None:
        self.steps.label(f"layer {layer + 1}/{self.last + 1}: forward")
        module = self.streamed.load_layer(layer, DenseExperts(self.plan.model.weights(layer), self.activation))
        hidden = self.work.read(f"hidden-{layer:05d}", self.plan.windows)
        writer = self.work.create(f"hidden-{layer + 1:05d}", self.plan.windows)
        for batch in batches(*self.plan.windows[:2]):
            with torch.no_grad():
                writer.array[batch] = self.streamed.run_layer(layer, module, hidden[batch])
            self.steps.advance(work * (batch.stop - batch.start) / self.plan.windows[0])
        writer.publish()

    def _head_gradient(self, number: int) -> None:
        """Gradient of every window's summed log-likelihood at the last layer's output."""
        self.steps.label("head gradient")
        hidden = self.work.read(f"hidden-{number:05d}", self.plan.windows)
        writer = self.work.create(f"gradient-{number:05d}", self.plan.windows)
        for batch in batches(*self.plan.windows[:2]):
            for window in range(batch.start, batch.stop):  # one at a time: logits are as wide as the vocabulary
                inputs = hidden[window : window + 1].clone().requires_grad_()
                loss = next_token_loss(self.streamed.logits(inputs), self.tokens[window : window + 1])
                (writer.array[window : window + 1],) = torch.autograd.grad(-loss, inputs)
        writer.publish()
        self.work.discard(f"hidden-{number:05d}")

    def _statistics_and_factors(self, layer: int, statistics_work: float, factor_work: float) -> None:
        shape, needs_fisher = self.plan.model.shape, self.plan.needs_fisher
        name = f"layer {layer + 1}/{self.last + 1}"
        self.steps.label(f"{name}: statistics")
        weights = self.plan.model.weights(layer)
        statistics = LayerStatistics(
            shape.num_experts,
            shape.hidden_size,
            shape.intermediate_size,
            fisher=needs_fisher,
            gate_weighted=self.plan.recipe.delta.gate_weighted,
        )
        module = self.streamed.load_layer(layer, DenseExperts(weights, self.activation, statistics))
        hidden = self.work.read(f"hidden-{layer:05d}", self.plan.windows)
        upper = self.work.read(f"gradient-{layer + 1:05d}", self.plan.windows) if needs_fisher else None
        writer = self.work.create(f"gradient-{layer:05d}", self.plan.windows) if upper is not None and layer else None
        for batch in batches(*self.plan.windows[:2]):
            inputs = hidden[batch].clone().requires_grad_(needs_fisher)
            with torch.set_grad_enabled(needs_fisher):
                output = self.streamed.run_layer(layer, module, inputs)
            if upper is not None:
                (gradient,) = torch.autograd.grad(output, inputs, upper[batch])
                if writer is not None:
                    writer.array[batch] = gradient
            self.steps.advance(statistics_work * (batch.stop - batch.start) / self.plan.windows[0])
        if writer is not None:
            writer.publish()
        del module
        self.steps.label(f"{name}: merge, prune, factor")
        result = compress_layer(layer, weights, statistics, self.plan.config, self.plan.recipe)
        self.work.save_layer(layer, result.tensors, result.report)
        self.work.discard(f"gradient-{layer + 1:05d}")
        self.work.discard(f"hidden-{layer:05d}")
        self.steps.advance(factor_work)

    def reports(self) -> dict[str, Any]:
        """Per layer: routed tokens per expert and relative errors."""
        return {str(layer): self.work.layer_report(layer) for layer in self.plan.model.shape.layers}
