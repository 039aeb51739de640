"""A layer's final tensors: what experts share, then each expert's own, at the settled rank and rounded as stored.

Every part is written as soon as it is known, so an interrupted layer continues with its next expert, and several
processes share a layer's experts out. An expert's part holds the factors that are its own, and of every projection
`<role>.error` and `<role>.energy`, float64 [1]: the squared error of its outputs, and what that is a share of.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from offline.algebra.factorization import whitened_energy
from offline.methods import METHODS
from offline.methods.factors import Factors
from offline.methods.layer import Advance, LayerJob, expert_part
from offline.methods.storing import Matrix


def write_experts(job: LayerJob, advance: Advance) -> None:
    """Writes a part per expert, and what the method shares among them."""
    factors = METHODS[job.plan.recipe.method].factors(job)
    factors.write(lambda done: advance(factors.share * done))
    for expert in job.own:
        if not job.work.has_part(job.number, expert_part(expert)):
            job.save(expert_part(expert), _written(job, expert, factors))
        advance((1 - factors.share) / len(job.own))
    job.work.group.barrier()


def _written(job: LayerJob, expert: int, factors: Factors) -> dict[str, Tensor]:
    recipe, shape = job.plan.recipe, job.plan.model.shape
    weights = job.weights(expert)
    tensors: dict[str, Tensor] = {}
    for site, roles in job.plan.model.shape.selections.items():
        if METHODS[recipe.method].keeps(recipe, shape, roles[0]):
            zero = torch.zeros(1, dtype=torch.float64)
            tensors |= {f"{role}.{kind}": zero.clone() for role in roles for kind in ("error", "energy")}
            continue
        gram, (option,) = job.shrunk_gram(expert, weights, site), job.options[site]
        for role in roles:
            delta = job.delta(option, role, weights[role])
            made = {} if expert in job.trimmed else factors.factors(option, role, expert, delta, gram)
            for kind in factors.kept:
                tensors |= made[kind].named(f"{role}.{kind}") if kind in made else {}
            for kind, energy in (
                ("error", whitened_energy(_left(delta, made), gram)),
                ("energy", whitened_energy(weights[role].float(), gram)),
            ):
                tensors[f"{role}.{kind}"] = torch.tensor([energy], dtype=torch.float64)
    return {name: tensor.cpu() for name, tensor in tensors.items()}


def _left(delta: Tensor, made: Mapping[str, Matrix]) -> Tensor:
    """What a delta as it is stored leaves of it; float32 [out, in]."""
    if "columns" in made:
        return delta.index_add(1, made["columns"].parts[""].long(), made["u"].numbers, alpha=-1)
    if "dense" in made:
        return delta - made["dense"].numbers
    return delta - made["u"].numbers @ made["v"].numbers if made else delta
