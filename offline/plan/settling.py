"""Between the two sweeps of a compression: the budget of all layers at once, from what was measured of each.

The price per byte is one for the whole model, so nothing can be written before every layer has been measured; what
settling needs of a layer is small.
"""

from __future__ import annotations

import torch
from torch import Tensor

from d2moe_vllm.format.kinds import Role
from offline.methods.bases import SENSITIVITY_PART
from offline.methods.layer import measured_part
from offline.methods.options import Option
from offline.plan.allocation import Curves
from offline.plan.plan import Plan
from offline.plan.selection import settle_layers
from offline.work.workdir import WorkDir

MEASURED_PART = "measured"
"""A layer's part that holds what its routing decided: `tokens`, int64 [experts], and `trimmed`, int64 [delta.trim], the
experts without deltas."""
SATURATED = 0.99
"""Share of an output's energy from which on more error costs in proportion only."""


def settle(plan: Plan, work: WorkDir) -> Plan:
    """The plan with its final budget: its own, or solved again now that every layer has been measured.
    Raises InputError where the ratio cannot be reached after all."""
    if plan.settled:
        return plan
    if plan.selects:
        return settle_layers(plan, work)
    return plan.layers.settle(plan, work)


def error_curves(plan: Plan, work: WorkDir) -> Curves:
    """What every projection's error costs at every rank (METHODS 1.4): per expert the mean squared error e of its
    outputs, weighted by what a unit of it costs in log-likelihood, over the share of the outputs' energy E that it
    leaves: s e / (1 - e / E). Small errors cost s e, the second-order estimate; that says too little about
    errors near the whole signal, which then meet in a product of gate and up."""
    curves: dict[tuple[int, Option, Role], Tensor] = {}
    for layer in plan.model.shape.layers:
        sensitivity = work.load_part(layer, SENSITIVITY_PART)["sensitivity"]
        for expert in range(plan.model.shape.num_experts):
            part = work.load_part(layer, measured_part(expert))
            for option in plan.problem.options:
                for number, role in enumerate(plan.model.shape.roles):
                    curve, energy = part[f"{option}.{role}.curve"], part[f"{role}.energy"]
                    share = curve / energy.clamp(min=torch.finfo(torch.float64).tiny)
                    cost = sensitivity[number, expert] * curve / (1 - share.clamp(max=SATURATED))
                    key = (layer, option, role)
                    curves[key] = curves[key] + cost if key in curves else cost
    return curves


def trimmed_experts(work: WorkDir, layer: int) -> tuple[int, ...]:
    """The layer's experts that get no delta, known once it is measured."""
    return tuple(work.load_part(layer, MEASURED_PART, "trimmed")["trimmed"].tolist())
