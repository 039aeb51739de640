"""The visitors that watch a layer's experts while it runs over the calibration text, and then work on that layer; among
them those that compress: every MoE layer ends as parts in the working folder.

Fisher information and what errors cost need the gradient: then merging and factoring are done on a sweep backwards,
else on one forwards. Where calibration follows the compression, factors are left to a last sweep forwards, in which
every layer sees what the compressed layers before it give. Where calibration chooses the layers, a sweep forwards
looks at them all, and the chosen ones are then watched once more.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from d2moe_vllm.hf.experts import D2Experts
from offline.checkpoint.assembly import Assembly, trimmed_experts
from offline.checkpoint.experts import compressed_experts
from offline.io.progress import Steps
from offline.methods.compression import build_bases, factor_experts, merge_experts
from offline.methods.layer import LayerJob
from offline.methods.selection import look_at
from offline.plan.plan import Plan
from offline.plan.resources import layer_work
from offline.plan.selection import settle_layers
from offline.run.sweep import Sweep, Visitor
from offline.source.layerwise import LayerwiseModel, read_hf_config
from offline.source.sites import Site
from offline.work.activations import Rows
from offline.work.statistics import DenseExperts, Recorder, Routing
from offline.work.workdir import WorkDir


def compress_layers(plan: Plan, tokens: Tensor, work: WorkDir, steps: Steps, device: torch.device) -> None:
    """Run or resume. tokens: int64 [windows, seq]. Raises InputError for what cannot be computed with."""
    sweep = open_sweep(plan, tokens, work, steps, device)
    if plan.selects:
        sweep.run(Judging(plan, work, sweep), keep=True)
        sweep.revisit(Factoring(settle_layers(plan, work), work, sweep))
        return
    if plan.needs_gradient and plan.follows:
        sweep.run(Merging(plan, work, sweep))
    sweep.run(Factoring(plan, work, sweep), states="following" if plan.follows else "hidden")


def open_sweep(plan: Plan, tokens: Tensor, work: WorkDir, steps: Steps, device: torch.device) -> Sweep:
    """A sweep of the plan's dense model over calibration windows, int64 [windows, seq], that can be resumed."""
    source, costs = plan.model, layer_work(plan)
    model = LayerwiseModel(source.reader, source.family, read_hf_config(source.folder), device)

    def experts(layer: int) -> DenseExperts | None:
        return dense_experts(plan, model, layer) if layer in source.shape.layers else None

    return Sweep(model, experts, tokens, work, steps, costs.forward, costs.record, plan.resources.batch_tokens)


def dense_experts(plan: Plan, model: LayerwiseModel, layer: int, recorder: Recorder | None = None) -> DenseExperts:
    """A layer's experts: held in memory where there is room, else read when they are needed."""
    stored = plan.model.experts
    take = stored.held if plan.resources.hold_layer else stored.fetched
    return DenseExperts(plan.model.shape, take(layer, model.device), model.activation, recorder)


class Calibration(Visitor):
    """Records what reaches the experts of every MoE layer. All of it is discarded when the layer is finished, but the
    part `facts` (routed tokens, energies, trimmed experts)."""

    def __init__(self, plan: Plan, work: WorkDir, sweep: Sweep) -> None:
        self.plan, self.work, self.sweep = plan, work, sweep
        self.layers = plan.model.shape.layers
        self._recorder: Recorder | None = None

    @abstractmethod
    def work_on(self, job: LayerJob) -> None:
        """What is done with a layer; a killed run does it once more, with the parts it left."""

    def done(self, layer: int) -> bool:
        return self.work.has_part(layer, f"{self.name}-done")

    def recorded(self, layer: int) -> bool:
        return self.work.has_part(layer, "facts")

    def experts(self, layer: int) -> DenseExperts:
        shape = self.plan.model.shape
        sizes: dict[Site, int] = {"input": shape.hidden_size, "middle": shape.intermediate_size}
        self._recorder = Recorder(self._arrays(self.work.create), sizes)
        return dense_experts(self.plan, self.sweep.model, layer, self._recorder)

    def entered(self, rows: slice) -> None:
        if self._recorder:
            self._recorder.at = rows

    def visited(self, layer: int) -> None:
        """Marks the layer as done, and only then discards what it was made from."""
        if self._recorder:
            self._publish(layer, self._recorder)
        self._recorder = None
        self.work_on(self._job(layer))
        if self.work.group.first:
            self.work.save_part(layer, f"{self.name}-done", {"done": torch.ones(1)})
        self.work.discard("inputs", "choice", "gates", "upstream")
        self.work.group.barrier()

    def discard_part(self, layer: int, part: str) -> None:
        if self.work.group.first:
            self.work.discard_part(layer, part)
        self.work.group.barrier()

    def _arrays(self, take: Callable[[str, int, int, torch.dtype], Rows]) -> dict[str, Rows]:
        """What is recorded of every token; take: the working folder's `create` or `rows`."""
        shape = self.plan.model.shape
        hidden, chosen = shape.hidden_size, shape.experts_per_token
        widths = {"inputs": hidden, "choice": chosen, "gates": chosen}
        if self.backwards:
            widths["upstream"] = hidden
        types = {"choice": torch.int32}
        return {name: take(name, self.plan.tokens, widths[name], types.get(name, torch.float32)) for name in widths}

    def _publish(self, layer: int, recorder: Recorder) -> None:
        for name, array in recorder.arrays.items():
            self.work.publish(name, array)
        self.work.group.sum(recorder.energy.values())
        choice = self._arrays(self.work.rows)["choice"].read(slice(0, self.plan.tokens))
        tokens = torch.bincount(choice.flatten(), minlength=self.plan.model.shape.num_experts)
        facts = {"tokens": tokens, **{f"energy.{site}": energy for site, energy in recorder.energy.items()}}
        least = tokens.argsort(stable=True)[: self.plan.recipe.delta.trim].sort().values
        if self.work.group.first:
            self.work.save_part(layer, "facts", {**facts, "trimmed": least})
        self.work.group.barrier()

    def _job(self, layer: int) -> LayerJob:
        arrays, every, model = self._arrays(self.work.rows), slice(0, self.plan.tokens), self.sweep.model
        choice, gates = arrays["choice"].read(every), arrays["gates"].read(every)
        rows = self.plan.resources.rows
        routing = Routing(arrays["inputs"], choice, gates, arrays.get("upstream"), rows, model.device)
        facts = self.work.load_part(layer, "facts")
        energy: dict[Site, Tensor] = {"input": facts["energy.input"], "middle": facts["energy.middle"]}
        trimmed = tuple(facts["trimmed"].tolist())
        return LayerJob(layer, self.plan, self.work, routing, facts["tokens"], trimmed, energy, model.activation)


class Judging(Calibration):
    """How much each layer matters."""

    name = "judged"

    def work_on(self, job: LayerJob) -> None:
        look_at(job)
        self.discard_part(job.number, "facts")  # chosen layers are recorded anew


class Merging(Calibration):
    """The base of every layer, and what its errors cost."""

    name = "merged"

    def __init__(self, plan: Plan, work: WorkDir, sweep: Sweep) -> None:
        super().__init__(plan, work, sweep)
        self.backwards = plan.needs_gradient
        self.costs = layer_work(plan)
        # The last part that a merge writes.
        self._last = "sensitivity" if plan.needs_gradient else "merged" if plan.recipe.base.kind != "none" else None

    def work_on(self, job: LayerJob) -> None:
        self.merge(job)
        self.discard_part(job.number, "facts")  # the last sweep records anew

    def merge(self, job: LayerJob) -> None:
        if self._last and not self.work.has_part(job.number, self._last):
            self.sweep.label(job.number, "merge")
            merge_experts(job, lambda share: self.sweep.steps.advance(self.costs.merge * share))


class Factoring(Merging):
    """Bases and factors of every layer, merged first where it is not yet."""

    name = "factored"

    def __init__(self, plan: Plan, work: WorkDir, sweep: Sweep) -> None:
        super().__init__(plan, work, sweep)
        self.layers = plan.problem.shape.layers
        self.replaces = plan.follows
        self.backwards = plan.needs_gradient and not plan.follows

    def work_on(self, job: LayerJob) -> None:
        self.merge(job)
        self.sweep.label(job.number, "prune, factor")
        build_bases(job)
        factor_experts(job, lambda share: self.sweep.steps.advance(self.costs.factor * share))

    def visited(self, layer: int) -> None:
        super().visited(layer)
        self.discard_part(layer, "merged")

    def replacement(self, layer: int) -> D2Experts:
        """The layer as the plan's own budget makes it: final where ranks do not wait for all layers' errors."""
        plan = self.plan
        # Which experts are trimmed is known by now.
        problem = replace(plan.problem, trimmed={**plan.problem.trimmed, layer: trimmed_experts(self.work, layer)})
        budget = problem.solve(plan.budget.choices, plan.budget.ranks)
        config, assembly = budget.config, Assembly(plan, budget, self.work)
        return compressed_experts(config, layer, assembly.tensor, self.sweep.model.activation, "off")
