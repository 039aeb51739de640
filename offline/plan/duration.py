"""Time of a compression, predicted from shapes and from how fast a machine does what it consists of (rates.py): this
one, as it is measured, where no other rates are given.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from offline.plan.budget import Choices
from offline.plan.plan import Plan
from offline.plan.rates import Rates, Work, measured
from offline.plan.resources import outside_and_inside


@dataclass(frozen=True)
class LayerSeconds:
    """Of one MoE layer on one process: running it over the calibration windows once, or forwards and back; merging;
    measuring; writing. A layer without experts costs at most `forward` or `backward`. head: the gradient above the last
    layer, of all windows."""

    forward: float
    backward: float
    head: float
    merge: float
    measure: float
    write: float


def layer_seconds(plan: Plan, device: str = "cpu", rates: Rates | None = None) -> LayerSeconds:
    size = plan.activations_dtype.itemsize
    forward, states = running(plan), Work(bytes=size * plan.tokens * plan.model.shape.model_hidden_size)
    own, rates = plan.layers.work(plan), rates or measured(device, plan.resources.products)
    # Backwards a layer runs once more, and every product has one for its input's gradient; what is recorded is written.
    costs = (forward + states, 2 * forward + 3 * states, head(plan) + states, own.merge, own.measure, own.write)
    return LayerSeconds(*(one.seconds(rates) for one in costs))


def running(plan: Plan) -> Work:
    """A layer forwards over all windows."""
    shape = plan.model.shape
    rows = plan.tokens * shape.experts_per_token
    _, inside, _ = outside_and_inside(plan.model.other_tensors, plan.model.family, plan.model.num_layers)
    attention = 2 * plan.tokens * (inside + 2 * plan.windows[1] * shape.model_hidden_size)
    products = 2 * rows * shape.expert_parameters + attention
    batches = -(-plan.tokens // plan.resources.batch_tokens)
    own = Work(products, touched=rows * (8 * shape.intermediate_size + 4 * shape.hidden_size))
    return own + batches * widening(plan)


def widening(plan: Plan) -> Work:
    """A layer's experts from 16 bits to float32, once; every batch of rows does it again."""
    shape = plan.model.shape
    return Work(touched=1.5 * shape.num_experts * shape.expert_parameters)


EMBEDDINGS = ("embed_tokens.weight", ".embeddings.weight")
"""How the name of the vocabulary's tensor ends, [vocabulary, hidden]."""


def head(plan: Plan) -> Work:
    """Logits of all windows, and the gradient of their loss."""
    tensors = plan.model.other_tensors.items()
    vocabulary, hidden = next(spec.shape for name, spec in tensors if name.endswith(EMBEDDINGS))
    return Work(2 * 2 * plan.tokens * hidden * vocabulary, touched=8 * plan.tokens * vocabulary)


@dataclass(frozen=True)
class SweepSeconds:
    """Of a whole run, what its sweeps take, with all that is done at layers."""

    measure: float = 0.0
    merge: float = 0.0
    write: float = 0.0

    @property
    def total(self) -> float:
        return self.measure + self.merge + self.write


def backward_seconds(plan: Plan, costs: LayerSeconds, *, first: bool) -> float:
    """Of a sweep backwards over all layers; first: the one that makes what others start from, hidden states and the
    head's gradient."""
    layers = plan.model.num_layers
    forwards = plan.states.recomputed(first=first) + (layers if first else 0)
    return layers * costs.backward + forwards * costs.forward + (costs.head if first else 0.0)


def sweep_seconds(plan: Plan, device: str = "cpu", rates: Rates | None = None) -> SweepSeconds:
    """At most: a settled budget may need less of it."""
    costs, layers = layer_seconds(plan, device, rates), plan.model.num_layers
    moe, chosen, forward = len(plan.model.shape.layers), len(plan.problem.shape.layers), layers * costs.forward
    measure = merge = write = 0.0
    if plan.measures:
        measure = backward_seconds(plan, costs, first=True) + moe * (costs.merge + costs.measure)
    elif not plan.settled:
        measure = forward
    if plan.needs_fisher:
        # Where only routed tokens were measured, hidden states are there and no gradient is.
        known = forward if measure and not plan.measures else 0
        merge = backward_seconds(plan, costs, first=not plan.measures) - known + chosen * costs.merge
    if plan.merges_apart or not plan.needs_fisher:
        # Following, every layer but the last runs once more as it has become.
        write = forward + ((chosen - 1) * costs.forward if plan.follows else 0)
        if plan.recipe.base.kind != "none" and not plan.needs_fisher:
            write += chosen * costs.merge
    else:
        merge, write = 0.0, merge
    return SweepSeconds(measure, merge, write + chosen * costs.write)


def total_seconds(plan: Plan, device: str = "cpu") -> float:
    """What the work of one process comes to, which several share."""
    return sweep_seconds(plan, device).total


STARTING = 5.0
"""Seconds in which a run opens the model and draws its windows."""


class Estimate(NamedTuple):
    """Seconds of a run on this machine by the clock; least: where no layer gets a base, most: where each gets one."""

    least: float
    most: float

    def __str__(self) -> str:
        low, high = (f"{seconds:.0f}" for seconds in self)
        return f"{high} s" if low == high else f"{low} to {high} s"


def estimate_seconds(plan: Plan, device: str = "cpu", rates: Rates | None = None) -> Estimate:
    rates = rates or measured(device, plan.resources.products)
    most = sweep_seconds(plan, device, rates)
    least = most.total
    if plan.has_bases and not plan.settled and not plan.follows:
        choices: Choices = dict.fromkeys(plan.budget.choices, "none")
        without = replace(plan, final=True, budget=replace(plan.budget, choices=choices))
        least = most.measure + sweep_seconds(without, device, rates).write
    # The checkpoint is written from the working folder, which is checked.
    around = STARTING + 2 * plan.budget.nbytes / rates.bytes
    return Estimate(*(seconds / plan.resources.processes + around for seconds in (least, most.total)))
