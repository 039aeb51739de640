"""What settling a budget needs to know of a layer: the error that every expert would have at every rank, with every
kind of base that there is to choose from. A few kilobytes a projection stay; all that it was made from is dropped.

The part `measured-<expert>` of a layer holds `<option>.<role>.curve`, float64 [steps + 1], the squared error of the
projection's outputs at 0, 1, 2, ... rank multiples, and `<role>.energy`, float64 [1], what it is a share of.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from d2moe_vllm.format.kinds import Role
from offline.algebra.factorization import error_curve, whitened_energy
from offline.methods.layer import LayerJob, measured_part

Curves = Mapping[str, Tensor]


def save_curves(job: LayerJob, expert: int, found: Curves) -> None:
    """found: curves and energies by their keys; projections that are stored as they are have none, and no error."""
    zero = torch.zeros(1, dtype=torch.float64)
    kept: dict[str, Tensor] = {}
    for role in job.plan.model.shape.roles:
        if f"{role}.energy" not in found:
            kept |= {f"{role}.energy": zero.clone(), f"none.{role}.curve": zero.clone()}
    job.save(measured_part(expert), {**kept, **{key: value.cpu() for key, value in found.items()}})


def curve_of(job: LayerJob, delta: Tensor, gram: Tensor, role: Role, u: Tensor, v: Tensor) -> Tensor:
    """The errors that nested factors leave; delta: [out, in]; gram: [in, in]; u: [out, cap]; v: [cap, in]."""
    return picked(job, role, error_curve(delta, gram, u, v).cpu())


def curve_without(job: LayerJob, delta: Tensor, gram: Tensor, role: Role) -> Tensor:
    """Of an expert that gets no delta: the same error at every rank."""
    steps = -(-job.cap(role) // job.plan.recipe.rank_multiple)
    return whitened_energy(delta, gram) * torch.ones(steps + 1, dtype=torch.float64)


def picked(job: LayerJob, role: Role, errors: Tensor) -> Tensor:
    """errors: float64 [cap + 1], at every rank. Returns those at rank multiples, and at the cap."""
    multiple, cap = job.plan.recipe.rank_multiple, job.cap(role)
    return errors[torch.arange(0, cap + multiple, multiple).clamp(max=cap).unique()]
