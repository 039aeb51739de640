"""Which layers are decomposed (MoE-SVD, METHODS 2): those that matter least; the others stay dense, bit by bit.

How many is known from the ratio alone (`plan.first_selection`), which ones after every layer has been looked at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from d2moe_vllm.format.config import ROLES
from offline.algebra.analysis import spectrum
from offline.methods.layer import LayerJob
from offline.plan.budget import solve_stored
from offline.plan.plan import Plan, restrict
from offline.source.sites import SITES
from offline.work.statistics import outlier_shares
from offline.work.workdir import WorkDir

PART = "selection"
"""A layer's part that holds its sensitivity."""


def look_at(job: LayerJob) -> None:
    """Writes the part `selection`: float64 [1], S = sum_i f_i sum_p r_ip a_ip over experts and their projections.

    f: share of the routed tokens; r: principal rank; a: share of what the projection reads that is beyond
    outlier_threshold times its mean magnitude.
    """
    settings = job.plan.recipe.moe_svd
    total = torch.zeros(1, dtype=torch.float64)
    routed = max(int(job.tokens.sum()), 1)
    for expert in job.own:
        weights = job.weights(expert)
        shares = outlier_shares(weights, job.routing, expert, job.activation, settings.outlier_threshold)
        for role in ROLES:
            rank = principal_rank(weights[role], settings.rank_threshold)
            total += int(job.tokens[expert]) / routed * rank * shares[SITES[role]]
    job.work.group.sum([total])
    if job.work.group.first:
        job.save(PART, {"sensitivity": total})
    job.work.group.barrier()


def principal_rank(weight: Tensor, threshold: float) -> int:
    """How many singular values of `weight` [out, in] are at least `threshold` times the largest; of zeros none."""
    energies = spectrum(weight)
    return int(((energies >= threshold**2 * energies[0]) & (energies > 0)).sum())


def sensitivities(work: WorkDir, layers: Sequence[int]) -> dict[int, float]:
    """Of every layer, once all have been looked at."""
    return {layer: float(work.load_part(layer, PART)["sensitivity"]) for layer in layers}


def least_sensitive(found: Mapping[int, float], count: int) -> tuple[int, ...]:
    """The `count` layers with the lowest figure, ascending; of equals the lower number."""
    return tuple(sorted(sorted(found, key=lambda layer: (found[layer], layer))[:count]))


def settle_layers(plan: Plan, work: WorkDir) -> Plan:
    """The plan with the layers that calibration chose, and their exact ranks. Raises InputError where longer names
    leave no room for the smallest ranks."""
    found = sensitivities(work, plan.model.shape.layers)
    problem = restrict(plan.problem, plan.model, least_sensitive(found, len(plan.problem.shape.layers)))
    budget = solve_stored(problem, plan.recipe.ratio)
    return replace(plan, problem=problem, budget=budget, caps=budget.ranks)
