"""What a compression's working folder holds at its worst moment, predicted from shapes.

Hidden states and gradients come and go layer by layer, final tensors pile up: the worst moment is the largest sum of
the two, so the sweeps are gone through layer by layer, as they will run.
"""

from __future__ import annotations

from collections.abc import Iterator

from offline.io.units import FLOAT32, FLOAT64
from offline.plan.plan import Plan

PART_BYTES = 4096
"""Of a part's header, with names and checksums of its tensors."""


def work_bytes(plan: Plan, final: int | None = None) -> int:
    """Bytes on disk while running, besides the result: hidden states, gradients, and final tensors. final:
    `final_bytes`, where it is known already."""
    final = final_bytes(plan) if final is None else final
    return _measured(plan) + max(*_measuring(plan), *_writing(plan, final))


def _state(plan: Plan) -> int:
    """Hidden states of all windows, or gradients, at one layer."""
    return plan.activations_dtype.itemsize * plan.tokens * plan.model.shape.model_hidden_size


def _record(plan: Plan, *, backwards: bool) -> int:
    """What reaches one layer's experts, and the gradient at their output."""
    rows = plan.activations_dtype.itemsize * plan.tokens * plan.model.shape.hidden_size
    return rows * (1 + backwards) + 2 * FLOAT32 * plan.tokens * plan.model.shape.experts_per_token


def _measuring(plan: Plan) -> Iterator[int]:
    """What lies there during the first sweep."""
    yield 0
    if plan.measures:
        yield from _backwards(plan, 0, keep=plan.needs_fisher, waiting=plan.layers.waiting_bytes(plan)[0])
    elif not plan.settled:
        states = len(plan.states.start) + 1 if plan.needs_fisher else 2
        yield states * _state(plan) + _record(plan, backwards=False)


def _writing(plan: Plan, final: int) -> Iterator[int]:
    """What lies there while bases are merged, where that is a sweep of its own, and while tensors are written."""
    chosen = plan.problem.shape.layers
    each, waiting = final // len(chosen), plan.layers.waiting_bytes(plan)[1]
    if plan.needs_fisher and not plan.follows:
        yield from _backwards(plan, each, keep=False, waiting=waiting)
        return
    merged = FLOAT32 * plan.model.shape.expert_parameters if plan.merges_apart else 0
    if merged:
        yield from _backwards(plan, merged, keep=False, waiting=0)
    for number in range(len(chosen)):
        arrays = 2 * _state(plan) + _record(plan, backwards=False) + waiting
        yield arrays + (number + 1) * each + (len(chosen) - number) * merged


def _backwards(plan: Plan, part: int, *, keep: bool, waiting: int) -> Iterator[int]:
    """A sweep backwards that leaves `part` bytes of every MoE layer; keep: states and the head's gradient stay;
    waiting: bytes of one layer that wait for their second use."""
    layers, chosen = plan.model.num_layers, plan.problem.shape.layers
    states, state, written = plan.states, _state(plan), 0
    yield (len(states.start) + 1) * state
    for layer in range(layers - 1, chosen[0] - 1, -1):
        kept = sum(states.is_kept(above) for above in range(layer + 1, layers)) if keep else 0
        gradients = 1 + (layer > chosen[0]) + (keep and layer + 1 < layers)
        arrays = (len(states.there(layer)) + kept + gradients) * state
        if layer in chosen:
            written += part
            arrays += _record(plan, backwards=True) + waiting
        yield arrays + written


def final_bytes(plan: Plan) -> int:
    """The final tensors, in their parts, and what is there of one layer only while it is written."""
    config, shape = plan.config, plan.model.shape
    every = ((layer, one) for layer in config.layers for one in config.stored(layer).values())
    size = sum(one.spec.nbytes for layer, one in every if plan.layers.place(plan, layer, one) is not None)
    if not plan.settled and not plan.layers.saves_nothing(plan):  # calibration decides how far the budget is used up
        size += max(int((1 - plan.recipe.ratio) * config.source.bytes) - plan.budget.nbytes, 0)
    size += len(config.layers) * (shape.num_experts * plan.layers.parts + 4) * PART_BYTES
    if plan.recipe.delta.joint:
        size += sum(FLOAT64 * max(plan.caps.values()) * shape.projection(role)[1] for role in shape.roles)
    return size


def _measured(plan: Plan) -> int:
    """What settling needs, which stays to the end."""
    layers, experts = len(plan.model.shape.layers), plan.model.shape.num_experts
    if not plan.measures:
        return layers * PART_BYTES
    return layers * experts * (PART_BYTES + plan.layers.measured_bytes(plan))
