"""The visitors that watch a layer's experts while it runs over the calibration text, and then work on that layer; among
them those that compress: every MoE layer ends as its final tensors, parts in the working folder.

Settle, then write. Where ranks, kinds of base, trimmed experts or the layers themselves wait for what calibration
tells, a first sweep measures it, layer by layer, and keeps a few kilobytes of each projection. Then the budget is
settled for all layers at once, and a second sweep writes every layer's final tensors: what is not chosen is never on
disk. Fisher information and what errors cost need the gradient: such sweeps run backwards, the others forwards, and a
base is merged in the sweep that needs it. Where calibration follows the compression, the writing sweep runs forwards,
every layer seeing what the final layers before it give; bases that need Fisher information are then merged beforehand.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from d2moe_vllm.hf.experts import D2Experts
from offline.checkpoint.assembly import FACTS_PART, Assembly
from offline.checkpoint.experts import compressed_experts
from offline.io.progress import Steps
from offline.methods.bases import MERGED_PART, merge_experts
from offline.methods.joint import MAKING_PART
from offline.methods.layer import Advance, LayerJob
from offline.methods.options import Option
from offline.methods.selection import look_at
from offline.plan.duration import LayerSeconds, layer_seconds, sweep_seconds
from offline.plan.plan import Plan
from offline.plan.settling import MEASURED_PART, settle
from offline.run.sweep import Sweep, Visitor
from offline.source.layerwise import LayerwiseModel, read_hf_config
from offline.source.sites import SELECTIONS, Site
from offline.work.activations import Rows
from offline.work.statistics import DenseExperts, Recorder, Routing
from offline.work.workdir import WorkDir


def compress_layers(plan: Plan, tokens: Tensor, work: WorkDir, steps: Steps, device: torch.device) -> Plan:
    """Run or resume; returns the settled plan, whose tensors lie in `work`. tokens: int64 [windows, seq]. Raises
    InputError for what cannot be computed with."""
    sweep, costs = open_sweep(plan, tokens, work, steps, device), sweep_seconds(plan, device.type)
    if not plan.settled:
        measuring = Judging(plan, work, sweep) if plan.selects else Measuring(plan, work, sweep)
        sweep.run(measuring, keep=plan.needs_fisher, work=costs.measure)
        steps.label("settling the budget")
        plan = settle(plan, work)
        steps.reach(costs.measure)
    if plan.merges_apart:
        sweep.run(Merging(plan, work, sweep), work=costs.merge)
    steps.reach(costs.measure + costs.merge)
    writing = Writing(plan, work, sweep)
    if not writing.backwards:
        sweep.forget("gradient", *(["hidden"] if plan.follows else []))
    sweep.run(writing, states="following" if plan.follows else "hidden", work=costs.write)
    steps.reach(costs.total)
    return plan


def open_sweep(plan: Plan, tokens: Tensor, work: WorkDir, steps: Steps, device: torch.device) -> Sweep:
    """A sweep of the plan's dense model over calibration windows, int64 [windows, seq], that can be resumed."""
    source, costs = plan.model, layer_seconds(plan, device.type)
    model = LayerwiseModel(source.reader, source.family, read_hf_config(source.folder), device)

    def experts(layer: int) -> DenseExperts | None:
        return dense_experts(plan, model, layer) if layer in source.shape.layers else None

    at_once, dtype = plan.resources, plan.activations_dtype
    return Sweep(
        model,
        experts,
        tokens,
        work,
        steps,
        costs.forward,
        costs.backward,
        at_once.batch_tokens,
        at_once.products,
        dtype,
        at_once.every,
        costs.head,
    )


def dense_experts(plan: Plan, model: LayerwiseModel, layer: int, recorder: Recorder | None = None) -> DenseExperts:
    """A layer's experts: held in memory where there is room, else read when they are needed."""
    stored = plan.model.experts
    take = stored.held if plan.resources.hold_layer else stored.fetched
    biases = stored.biases(layer, model.device)
    return DenseExperts(plan.model.shape, take(layer, model.device), model.gated, recorder, biases)


class LayerProgress:
    """What is being done at a layer, and how much of the planned time it is."""

    def __init__(self, sweep: Sweep, costs: LayerSeconds, layer: int) -> None:
        self._sweep, self._costs, self._layer = sweep, costs, layer

    def begin(self, step: str, *costs: str) -> Advance:
        self._sweep.label(self._layer, step)
        work = sum(getattr(self._costs, cost) for cost in costs)
        return lambda share: self._sweep.steps.advance(work * share)

    def skip(self, cost: str) -> None:
        self._sweep.steps.skip(getattr(self._costs, cost))


class Calibration(Visitor):
    """Records what reaches the experts of every MoE layer. All of it is discarded when the layer is finished, but the
    part `facts` (routed tokens, energies of what a base reads, the least routed experts). passing: parts that are
    dropped when the work on a layer is done: the next sweep records anew."""

    passing: Sequence[str] = (FACTS_PART,)

    def __init__(self, plan: Plan, work: WorkDir, sweep: Sweep) -> None:
        self.plan, self.work, self.sweep = plan, work, sweep
        self.layers = plan.model.shape.layers
        self._recorder: Recorder | None = None

    @abstractmethod
    def work_on(self, job: LayerJob) -> None:
        """What is done with a layer; a killed run does it once more, with the parts it left."""

    def progress(self, job: LayerJob) -> LayerProgress:
        return LayerProgress(self.sweep, layer_seconds(self.plan, self.sweep.model.device.type), job.number)

    def done(self, layer: int) -> bool:
        return self.work.has_part(layer, f"{self.name}-done")

    def recorded(self, layer: int) -> bool:
        return self.work.has_part(layer, FACTS_PART)

    def experts(self, layer: int) -> DenseExperts:
        shape = self.plan.model.shape
        sizes: dict[Site, int] = {"input": shape.hidden_size, "middle": shape.intermediate_size}
        self._recorder = Recorder(self._arrays(self.work.create), sizes)
        return dense_experts(self.plan, self.sweep.model, layer, self._recorder)

    def entered(self, rows: slice) -> None:
        if self._recorder:
            self._recorder.at = rows

    def visited(self, layer: int) -> None:
        """Marks the layer as done, and only then discards the arrays that it was made from."""
        if self._recorder:
            self._publish(layer, self._recorder)
        self._recorder = None
        self.work_on(self._job(layer))
        if self.work.group.first:
            for part in self.passing:  # before: nobody would look at a finished layer again
                self.work.discard_part(layer, part)
            self.work.save_part(layer, f"{self.name}-done", {"done": torch.ones(1)})
        self.work.discard("inputs", "choice", "gates", "upstream")
        self.work.group.barrier()

    def options(self, layer: int) -> dict[Site, tuple[Option, ...]]:
        """The kinds of base that are made for each selection."""
        return dict.fromkeys(SELECTIONS, self.plan.recipe.options)

    def _arrays(self, take: Callable[[str, int, int, torch.dtype], Rows]) -> dict[str, Rows]:
        """What is recorded of every token; take: the working folder's `create` or `rows`."""
        shape = self.plan.model.shape
        hidden, chosen = shape.hidden_size, shape.experts_per_token
        widths = {"inputs": hidden, "choice": chosen, "gates": chosen}
        if self.backwards:
            widths["upstream"] = hidden
        types = {"choice": torch.int32, "gates": torch.float32}
        usual = self.plan.activations_dtype
        return {name: take(name, self.plan.tokens, widths[name], types.get(name, usual)) for name in widths}

    def _publish(self, layer: int, recorder: Recorder) -> None:
        for name, array in recorder.arrays.items():
            self.work.publish(name, array)
        self.work.group.sum(recorder.energy.values())
        choice = self._arrays(self.work.rows)["choice"].read(slice(0, self.plan.tokens))
        tokens = torch.bincount(choice.flatten(), minlength=self.plan.model.shape.num_experts)
        facts = {"tokens": tokens, **{f"energy.{site}": energy for site, energy in recorder.energy.items()}}
        least = tokens.argsort(stable=True)[: self.plan.recipe.delta.trim].sort().values
        if self.work.group.first:
            self.work.save_part(layer, FACTS_PART, {**facts, "trimmed": least})
        self.work.group.barrier()

    def _job(self, layer: int) -> LayerJob:
        arrays, every, model = self._arrays(self.work.rows), slice(0, self.plan.tokens), self.sweep.model
        choice, gates = arrays["choice"].read(every), arrays["gates"].read(every)
        rows, products = self.plan.resources.rows, self.plan.resources.products
        routing = Routing(arrays["inputs"], choice, gates, arrays.get("upstream"), rows, model.device, products)
        facts = self.work.load_part(layer, FACTS_PART)
        energy: dict[Site, Tensor] = {"input": facts["energy.input"], "middle": facts["energy.middle"]}
        trimmed = self.trimmed(layer, facts)
        kinds, gated = self.options(layer), model.gated
        return LayerJob(layer, self.plan, self.work, routing, facts["tokens"], trimmed, energy, gated, kinds)

    def trimmed(self, layer: int, facts: Mapping[str, Tensor]) -> tuple[int, ...]:
        """The experts that get no delta."""
        return tuple(facts["trimmed"].tolist())


class Judging(Calibration):
    """How much each layer matters, of methods that compress some of them."""

    name = "judged"

    def work_on(self, job: LayerJob) -> None:
        look_at(job)


class Measuring(Calibration):
    """What settling the budget needs: what errors would cost, or who is routed how often."""

    name = "measured"

    def __init__(self, plan: Plan, work: WorkDir, sweep: Sweep) -> None:
        super().__init__(plan, work, sweep)
        self.backwards = plan.measures

    def work_on(self, job: LayerJob) -> None:
        self.plan.layers.measure(job, self.plan, self.progress(job))
        if self.work.group.first:
            trimmed = torch.tensor(job.trimmed, dtype=torch.int64)
            self.work.save_part(job.number, MEASURED_PART, {"tokens": job.tokens, "trimmed": trimmed})
        self.work.group.barrier()


class Settled(Calibration):
    """Works by a settled plan."""

    def __init__(self, plan: Plan, work: WorkDir, sweep: Sweep) -> None:
        super().__init__(plan, work, sweep)
        self.layers = plan.problem.shape.layers

    def options(self, layer: int) -> dict[Site, tuple[Option, ...]]:
        return {site: (self.plan.budget.choices[layer, site],) for site in SELECTIONS}

    def trimmed(self, layer: int, facts: Mapping[str, Tensor]) -> tuple[int, ...]:
        return self.plan.budget.config.layers[layer].trimmed


class Merging(Settled):
    """The bases of every layer, for a writing sweep that runs the other way."""

    name = "merged"
    backwards = True

    def work_on(self, job: LayerJob) -> None:
        if not self.work.has_part(job.number, MERGED_PART):
            merged = merge_experts(job, self.progress(job).begin("merge", "merge"))
            if self.work.group.first:
                self.work.save_part(job.number, MERGED_PART, {role: base.cpu() for role, base in merged.items()})
        self.work.group.barrier()


class Writing(Settled):
    """The final tensors of every layer."""

    name = "written"
    passing = (MAKING_PART, MERGED_PART)

    def __init__(self, plan: Plan, work: WorkDir, sweep: Sweep) -> None:
        super().__init__(plan, work, sweep)
        self.replaces = plan.follows
        self.backwards = plan.needs_fisher and not plan.follows

    def work_on(self, job: LayerJob) -> None:
        self.plan.layers.write(job, self.plan, self.progress(job))

    def replacement(self, layer: int) -> D2Experts:
        """The layer as it will be."""
        assembly = Assembly(self.plan, self.work)
        return compressed_experts(assembly.config, layer, assembly.tensor, self.sweep.model.activation, "off")
