"""The loop over layers. One decoder layer's weights are in memory at a time, one expert's statistics.

Where gradients are needed (Fisher information, adaptive ranks) two sweeps: forwards to store every layer's input,
then backwards, where each layer is run once more with its experts watched, merged and factored, and its input's
gradient handed down. A layer's statistics and result exist only while it is the current one.
Without gradients one sweep forwards does it. Where calibration follows the compression, factors are left to a
last sweep forwards, in which every layer sees what the compressed layers before it give. Where calibration chooses
the layers, a sweep forwards looks at them all, and the chosen ones are then watched once more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from d2moe_vllm.hf.experts import D2Experts
from offline.checkpoint.assembly import Assembly, trimmed_experts
from offline.checkpoint.experts import compressed_experts
from offline.io.progress import Steps
from offline.methods.compression import build_bases, factor_experts, merge_experts
from offline.methods.layer import LayerJob
from offline.methods.selection import PART, look_at
from offline.plan.plan import BATCH_TOKENS, Plan
from offline.plan.resources import layer_work
from offline.plan.selection import settle_layers
from offline.source.layerwise import LayerwiseModel, next_token_loss, read_hf_config
from offline.source.sites import Site
from offline.work.activations import Rows
from offline.work.statistics import DenseExperts, Recorder, Routing
from offline.work.workdir import WorkDir


def batches(windows: int, length: int, tokens: int = BATCH_TOKENS) -> Iterator[slice]:
    """Windows that run together, about `tokens` tokens at a time."""
    step = max(1, tokens // length)
    for start in range(0, windows, step):
        yield slice(start, min(start + step, windows))


def _hidden(layer: int) -> str:
    return f"hidden-{layer:05d}"


def _gradient(layer: int) -> str:
    return f"gradient-{layer:05d}"


def _following(layer: int) -> str:
    return f"following-{layer:05d}"


Name = Callable[[int], str]


@dataclass
class Run:
    """One compression, from tokens to the parts of every layer in the working folder."""

    plan: Plan
    tokens: Tensor
    work: WorkDir
    steps: Steps
    device: torch.device
    streamed: LayerwiseModel = field(init=False)

    def __post_init__(self) -> None:
        model = self.plan.model
        config = read_hf_config(model.folder)
        self.streamed = LayerwiseModel(model.reader, model.family, config, self.device)
        self.activation = ACT2FN[config.hidden_act]
        self.layers = model.num_layers
        self.moe = set(model.shape.layers)
        self.costs = layer_work(self.plan)
        # Windows are shared out in whole batches, so that every process count makes the same sums.
        every = list(batches(*self.plan.windows, self.plan.resources.batch_tokens))
        self.batches = [every[number] for number in self.work.group.own(range(len(every)))]

    def compress_layers(self) -> None:
        """Run or resume: every MoE layer ends as parts in the working folder."""
        self.streamed.prepare((batch.stop - batch.start, self.plan.windows[1]) for batch in self.batches)
        if self.plan.selects:
            self._selected()
        elif self.plan.needs_gradient:
            self._backwards()
            if self.plan.follows:
                self._forwards(_following)
        else:
            self._forwards(_hidden)

    # Sweeps

    def _backwards(self) -> None:
        """Fisher information and merges need the gradient: the dense model forwards, then backwards."""
        merged = "merged" if self.plan.follows else "factored"
        pending = [layer for layer in sorted(self.moe) if not self._done(layer, merged)]
        if not pending:
            self.steps.skip(self.layers * (self.costs.forward + self.costs.record), "resuming: calibration is done")
            return
        if len(pending) < len(self.moe):
            self.steps.skip(0, f"resuming: {len(self.moe) - len(pending)} of {len(self.moe)} MoE layers are done")
        self._store_inputs(pending[-1])
        for layer in range(self._top(pending[-1]), pending[0] - 1, -1):
            if layer in self.moe and not self._done(layer, merged):
                self._record(layer, _hidden, gradient=layer > pending[0])
                job = self._job(layer)
                if not self.work.has_part(layer, "sensitivity"):
                    self._merge(job)
                if self.plan.follows:
                    self._discard_part(layer, "facts")  # the last sweep records anew
                else:
                    self._factor(job)
                self._finish(layer, merged)
            else:
                self._pass_gradient(layer)
            self.work.discard(_gradient(layer + 1), _hidden(layer))
        self.work.discard(_gradient(pending[0]), *(_hidden(layer) for layer in range(pending[0])))

    def _forwards(self, name: Name) -> None:
        """Every layer in turn: watched, merged unless it is already, factored; then its output for the next one."""
        pending = [layer for layer in sorted(self.moe) if not self._done(layer, "factored")]
        if not pending:
            return
        # A layer's input is discarded when its output is there.
        start = next((layer for layer in range(self.layers) if self.work.has(name(layer))), 0)
        if start == 0:
            self._embed(name)
        for layer in range(start, pending[-1] + 1):
            if layer not in self.moe:
                self._plain_forward(layer, name)
            elif not self._done(layer, "factored"):
                self._record(layer, name, gradient=False, forward=not self.plan.follows)
                job = self._job(layer)
                if self.plan.recipe.base.kind != "none" and not self.work.has_part(layer, "merged"):
                    self._merge(job)
                self._factor(job)
                self._finish(layer, "factored")
            if self.plan.follows and layer in self.moe and layer < pending[-1] and not self.work.has(name(layer + 1)):
                self._compressed_forward(layer, name)
            self.work.discard(name(layer))
        self.work.discard(name(pending[-1] + 1))

    def _selected(self) -> None:
        """Every layer is looked at, forwards; then those that matter least are watched once more, and factored."""
        if self.work.has_part(max(self.moe), f"{PART}-done"):
            self.steps.skip(self.layers * self.costs.record, "resuming: layers are chosen")
        else:
            self._embed(_hidden)
            for layer in range(max(self.moe) + 1):
                self._look(layer)
        self.plan = settle_layers(self.plan, self.work)
        for layer in self.plan.problem.shape.layers:
            if not self._done(layer, "factored"):
                self._record(layer, _hidden, gradient=False)
                self._factor(self._job(layer))
                self._finish(layer, "factored")

    def _look(self, layer: int) -> None:
        """One layer forwards; of one with experts, how much it matters."""
        if layer in self.moe and not self._done(layer, PART):
            self._record(layer, _hidden, gradient=False, forward=True)
            look_at(self._job(layer))
            self._discard_part(layer, "facts")  # chosen layers are recorded anew
            self._finish(layer, PART)
        elif layer not in self.moe and not self.work.has(_hidden(layer + 1)):
            self._plain_forward(layer, _hidden)
        else:
            self.steps.skip(self.costs.record)

    def _top(self, last: int) -> int:
        """The layer from which gradients have to come down to layer `last`."""
        return next(layer for layer in range(last, self.layers) if self.work.has(_gradient(layer + 1)))

    # Activations

    def _embed(self, name: Name) -> None:
        if self.work.has(name(0)):
            return
        self.steps.label("embeddings")
        array = self._create(name(0))
        for batch in self.batches:
            self._write(array, batch, self.streamed.embed(self.tokens[batch]))
        self.work.publish(name(0), array)
        self.streamed.release()

    def _store_inputs(self, last: int) -> None:
        """The input of layers 0 to `last`; where no gradient is at hand, of all layers, and the head's gradient."""
        resumed = any(self.work.has(_gradient(layer + 1)) for layer in range(last, self.layers))
        upto = last if resumed else self.layers
        self._embed(_hidden)
        for layer in range(upto):
            if self.work.has(_hidden(layer + 1)):
                self.steps.skip(self.costs.forward)
            else:
                self._plain_forward(layer, _hidden)
        if upto == self.layers:
            self._head_gradient()

    def _plain_forward(self, layer: int, name: Name) -> None:
        """The dense layer's output."""
        self.steps.label(f"layer {layer + 1}/{self.layers}: forward")
        experts = self._experts(layer) if layer in self.moe else None
        self._run(layer, experts, name, self.costs.forward)

    def _compressed_forward(self, layer: int, name: Name) -> None:
        """The output of the layer as it is compressed."""
        self.steps.label(f"layer {layer + 1}/{self.layers}: compressed forward")
        self._run(layer, self._compressed_experts(layer), name, self.costs.forward)

    def _run(self, layer: int, experts: nn.Module | None, name: Name, cost: float) -> None:
        module = self.streamed.load_layer(layer, experts)
        hidden, array = self._array(name(layer)), self._create(name(layer + 1))
        for batch in self.batches:
            with torch.no_grad():
                self._write(array, batch, self.streamed.run_layer(layer, module, self._read(hidden, batch)))
            self._advance(batch, cost)
        self.work.publish(name(layer + 1), array)

    def _head_gradient(self) -> None:
        """Gradient of every window's summed log-likelihood at the last layer's output."""
        if self.work.has(_gradient(self.layers)):
            return
        self.steps.label("head gradient")
        hidden, array = self._array(_hidden(self.layers)), self._create(_gradient(self.layers))
        for batch in self.batches:
            for window in range(batch.start, batch.stop):  # one at a time: logits are as wide as the vocabulary
                one = slice(window, window + 1)
                inputs = self._read(hidden, one).requires_grad_()
                loss = next_token_loss(self.streamed.logits(inputs), self.tokens[one].to(self.device))
                self._write(array, one, torch.autograd.grad(-loss, inputs)[0])
        self.work.publish(_gradient(self.layers), array)
        self.work.discard(_hidden(self.layers))
        self.streamed.release()

    def _pass_gradient(self, layer: int) -> None:
        """The gradient at the input of a layer that is not to be compressed (any more)."""
        if self.work.has(_gradient(layer)):
            return
        self.steps.label(f"layer {layer + 1}/{self.layers}: gradient")
        experts = self._experts(layer) if layer in self.moe else None
        module = self.streamed.load_layer(layer, experts)
        array = self._create(_gradient(layer))
        for batch in self.batches:
            self._through(layer, module, batch, array)
            self._advance(batch, self.costs.record)
        self.work.publish(_gradient(layer), array)

    def _through(self, layer: int, module: nn.Module, batch: slice, array: Rows | None) -> None:
        """One batch forwards and backwards; the input's gradient goes into `array`."""
        inputs = self._read(self._array(_hidden(layer)), batch).requires_grad_()
        with torch.enable_grad():
            output = self.streamed.run_layer(layer, module, inputs)
        upper = self._read(self._array(_gradient(layer + 1)), batch)
        (gradient,) = torch.autograd.grad(output, inputs, upper)
        if array is not None:
            self._write(array, batch, gradient)

    # One MoE layer

    def _record(self, layer: int, name: Name, *, gradient: bool, forward: bool = False) -> None:
        """Runs a layer with its experts watched. gradient: its input's gradient is kept for the layer below;
        forward: its output is kept for the layer above."""
        if self.work.has_part(layer, "facts"):
            self.steps.skip(self.costs.record)
            return
        self.steps.label(f"layer {layer + 1}/{self.layers}: calibration")
        backwards = name is _hidden and self.plan.needs_gradient
        recorder = self._recorder(backwards)
        module = self.streamed.load_layer(layer, self._experts(layer, recorder))
        below = self._create(_gradient(layer)) if gradient else None
        above = self._create(name(layer + 1)) if forward and layer + 1 < self.layers else None
        length = self.plan.windows[1]
        for batch in self.batches:
            recorder.at = slice(batch.start * length, batch.stop * length)
            if backwards:
                self._through(layer, module, batch, below)
            else:
                with torch.no_grad():
                    output = self.streamed.run_layer(layer, module, self._read(self._array(name(layer)), batch))
                if above is not None:
                    self._write(above, batch, output)
            self._advance(batch, self.costs.record)
        for array, title in ((below, _gradient(layer)), (above, name(layer + 1))):
            if array is not None:
                self.work.publish(title, array)
        self._finish_recording(layer, recorder)

    def _recorder(self, backwards: bool) -> Recorder:
        shape, tokens = self.plan.model.shape, self.plan.tokens
        sizes: dict[Site, int] = {"input": shape.hidden_size, "middle": shape.intermediate_size}
        return Recorder(
            self.work.create("inputs", tokens, shape.hidden_size),
            self.work.create("choice", tokens, shape.experts_per_token, torch.int32),
            self.work.create("gates", tokens, shape.experts_per_token),
            self.work.create("upstream", tokens, shape.hidden_size) if backwards else None,
            sizes,
        )

    def _finish_recording(self, layer: int, recorder: Recorder) -> None:
        arrays = {"inputs": recorder.inputs, "choice": recorder.choice, "gates": recorder.gates}
        if recorder.upstream is not None:
            arrays["upstream"] = recorder.upstream
        for name, array in arrays.items():
            self.work.publish(name, array)
        self.work.group.sum(recorder.energy.values())
        choice = self._whole("choice", torch.int32)
        tokens = torch.bincount(choice.flatten(), minlength=self.plan.model.shape.num_experts)
        facts = {"tokens": tokens, **{f"energy.{site}": energy for site, energy in recorder.energy.items()}}
        least = tokens.argsort(stable=True)[: self.plan.recipe.delta.trim].sort().values
        if self.work.group.first:
            self.work.save_part(layer, "facts", {**facts, "trimmed": least})
        self.work.group.barrier()

    def _whole(self, name: str, dtype: torch.dtype) -> Tensor:
        width = self.plan.model.shape.experts_per_token
        return self.work.rows(name, self.plan.tokens, width, dtype).read(slice(0, self.plan.tokens))

    def _job(self, layer: int) -> LayerJob:
        hidden, tokens = self.plan.model.shape.hidden_size, self.plan.tokens
        routing = Routing(
            self.work.rows("inputs", tokens, hidden),
            self._whole("choice", torch.int32),
            self._whole("gates", torch.float32),
            self.work.rows("upstream", tokens, hidden) if self.work.has("upstream") else None,
            self.plan.resources.rows,
            self.device,
        )
        facts = self.work.load_part(layer, "facts")
        energy: dict[Site, Tensor] = {"input": facts["energy.input"], "middle": facts["energy.middle"]}
        trimmed = tuple(facts["trimmed"].tolist())
        return LayerJob(layer, self.plan, self.work, routing, facts["tokens"], trimmed, energy, self.activation)

    def _merge(self, job: LayerJob) -> None:
        self.steps.label(f"layer {job.number + 1}/{self.layers}: merge")
        merge_experts(job, lambda share: self.steps.advance(self.costs.merge * share))

    def _factor(self, job: LayerJob) -> None:
        self.steps.label(f"layer {job.number + 1}/{self.layers}: prune, factor")
        build_bases(job)
        factor_experts(job, lambda share: self.steps.advance(self.costs.factor * share))

    def _finish(self, layer: int, what: str) -> None:
        """Marks a layer as done, and only then discards what it was made from."""
        if self.work.group.first:
            self.work.save_part(layer, f"{what}-done", {"done": torch.ones(1)})
        self.work.discard("inputs", "choice", "gates", "upstream")
        if what == "factored":
            self._discard_part(layer, "merged")
        self.work.group.barrier()

    def _discard_part(self, layer: int, part: str) -> None:
        if self.work.group.first:
            self.work.discard_part(layer, part)
        self.work.group.barrier()

    def _compressed_experts(self, layer: int) -> D2Experts:
        """The layer as the plan's own budget makes it: final where ranks do not wait for all layers' errors."""
        plan = self.plan
        # Which experts are trimmed is known by now.
        problem = replace(plan.problem, trimmed={**plan.problem.trimmed, layer: trimmed_experts(self.work, layer)})
        budget = problem.solve(plan.budget.choices, plan.budget.ranks)
        config, assembly = budget.config, Assembly(plan, budget, self.work)
        return compressed_experts(config, layer, assembly.tensor, self.activation, "off")

    # Bookkeeping

    def _done(self, layer: int, what: str) -> bool:
        return self.work.has_part(layer, f"{what}-done")

    def _experts(self, layer: int, recorder: Recorder | None = None) -> DenseExperts:
        """A layer's dense experts: held in memory where there is room, else read when they are needed."""
        stored = self.plan.model.experts
        take = stored.held if self.plan.resources.hold_layer else stored.fetched
        return DenseExperts(self.plan.model.shape, take(layer, self.device), self.activation, recorder)

    def _create(self, name: str) -> Rows:
        return self.work.create(name, self.plan.tokens, self.plan.model.shape.hidden_size)

    def _array(self, name: str) -> Rows:
        return self.work.rows(name, self.plan.tokens, self.plan.model.shape.hidden_size)

    def _read(self, array: Rows, batch: slice) -> Tensor:
        length = self.plan.windows[1]
        rows = array.read(slice(batch.start * length, batch.stop * length))
        return rows.view(batch.stop - batch.start, length, -1).to(self.device)

    def _write(self, array: Rows, batch: slice, values: Tensor) -> None:
        length = self.plan.windows[1]
        array.write(slice(batch.start * length, batch.stop * length), values.flatten(0, 1))

    def _advance(self, batch: slice, cost: float) -> None:
        share = (batch.stop - batch.start) / self.plan.windows[0] * self.work.group.size
        self.steps.advance(cost * share)
