"""The three steps of a layer: merge, prune, factor, an expert at a time. What the calibration recorded goes in, parts
in the working folder come out, which `assembly.py` turns into the checkpoint's tensors once all ranks are decided.

Every part is written as soon as it is known, so an interrupted layer continues with its next expert, and
several processes share a layer's experts out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from d2moe_vllm.format.kinds import ROLES, Role
from offline.algebra.factorization import error_curve, svd_base, whitened_energy
from offline.algebra.merging import MERGES, Merge, MergeOptions
from offline.algebra.pruning import column_scores, select_columns
from offline.errors import InputError
from offline.methods import METHODS
from offline.methods.factors import Factors
from offline.methods.layer import LayerJob
from offline.methods.options import Option
from offline.source.sites import SELECTIONS, Site
from offline.work.statistics import gradients

Advance = Callable[[float], None]
"""Told which share of a step is done."""


def merge_experts(job: LayerJob, advance: Advance) -> None:
    """Writes the parts `merged` (float32 [out, in] per role, where there is a base) and `sensitivity` (float64
    [3, experts], where gradients were recorded)."""
    recipe, group = job.plan.recipe, job.work.group
    needs_base = recipe.base.kind != "none"
    sensitivity = torch.zeros(len(ROLES), job.experts, dtype=torch.float64)
    merges = {role: _new_merge(job, role) for role in ROLES} if needs_base else {}
    for number in range(max((merge.passes for merge in merges.values()), default=1)):
        for merge in merges.values() if number else ():
            merge.next_pass()
        for expert in job.own:
            _add_expert(job, expert, merges, sensitivity if number == 0 else None)
            advance(1 / len(job.own))
        for merge in merges.values():
            group.sum(merge.state())
    group.sum([sensitivity])
    if not torch.isfinite(sensitivity).all():
        raise InputError(f"layer {job.number}: gradients overflow on the calibration text; use another text")
    if group.first:
        if merges:
            job.work.save_part(job.number, "merged", {role: merge.result().cpu() for role, merge in merges.items()})
        if job.routing.upstream is not None:
            job.work.save_part(job.number, "sensitivity", {"sensitivity": sensitivity})
    group.barrier()


def _new_merge(job: LayerJob, role: Role) -> Merge:
    base = job.plan.recipe.base
    out_features, in_features = job.plan.model.shape.projection(role)
    options = MergeOptions(
        fisher_epsilon=base.fisher_epsilon,
        frequency_power=base.frequency_power,
        regmean_shrinkage=base.regmean_shrinkage,
        ties_density=base.ties_density,
        device=job.routing.device,
    )
    return MERGES[base.merge](out_features, in_features, job.experts, options)


def _add_expert(job: LayerJob, expert: int, merges: Mapping[Role, Merge], sensitivity: Tensor | None) -> None:
    recipe, weights = job.plan.recipe, job.weights(expert)
    needs = MERGES[recipe.base.merge]
    fisher = None
    if job.routing.upstream is not None and (needs.needs_fisher or sensitivity is not None):
        found = gradients(
            weights,
            job.routing,
            expert,
            job.activation,
            fisher=bool(merges) and needs.needs_fisher,
            gate_weighted=recipe.delta.gate_weighted,
        )
        fisher = found.fisher
        if sensitivity is not None:
            sensitivity[:, expert] = torch.tensor([found.sensitivity[role] for role in ROLES])
    total = int(job.tokens.sum())
    for site, roles in SELECTIONS.items():
        gram = job.gram(expert, weights, site) if merges and needs.needs_gram else None
        for role in roles:
            if role in merges:
                merges[role].add(
                    weights[role],
                    tokens=int(job.tokens[expert]),
                    total_tokens=total,
                    fisher=None if fisher is None else fisher[role],
                    gram=gram,
                )


def build_bases(job: LayerJob) -> None:
    """Writes a part `base-<option>` per kind of base that the budget may choose, rounded as it will be stored."""
    if not all(torch.isfinite(energy).all() for energy in job.energy.values()):
        raise InputError(f"layer {job.number}: activations overflow float32 on the calibration text; use another")
    if job.work.group.first:
        for option in job.plan.recipe.options:
            if option != "none" and not job.work.has_part(job.number, f"base-{option}"):
                tensors: dict[str, Tensor] = {}
                for site in SELECTIONS:
                    tensors |= _base(job, option, site)
                job.save(f"base-{option}", tensors)
    job.work.group.barrier()


def _base(job: LayerJob, option: Option, site: Site) -> dict[str, Tensor]:
    merged = job.work.load_part(job.number, "merged", *SELECTIONS[site])
    recipe, shape, dtype = job.plan.recipe, job.plan.model.shape, job.plan.torch_dtype
    tensors: dict[str, Tensor] = {}
    if option == "svd":
        for role in SELECTIONS[site]:
            base = merged[role]
            u, v = svd_base(base.to(job.routing.device), job.energy[site], recipe.base_rank(shape, role))
            tensors |= {f"{role}.base_u": u.to(dtype).cpu(), f"{role}.base_v": v.to(dtype).cpu()}
        return tensors
    joint = torch.stack([base.double().square().sum(dim=0) for base in merged.values()]).sum(dim=0).sqrt()
    kept = recipe.base.columns(len(joint), option).kept
    scores = column_scores(joint, job.energy[site].sqrt())
    columns = select_columns(scores, kept, recipe.base.groups)
    for role in SELECTIONS[site]:
        stored = merged[role][:, columns.long()].to(dtype)
        tensors |= {
            f"{role}.base": stored,
            f"{role}.base_columns": columns.clone(),
            f"{role}.base_norms": stored.float().norm(dim=0),
        }
    return tensors


def factor_experts(job: LayerJob, advance: Advance) -> None:
    """Writes a part per expert: factors at the largest rank they may get, and their error at every rank."""
    factors = METHODS[job.plan.recipe.method].factors(job)
    factors.write(lambda done: advance(factors.share * done))
    for expert in job.own:
        if not job.work.has_part(job.number, f"{expert:05d}"):
            job.save(f"{expert:05d}", _factor_expert(job, expert, factors))
        advance((1 - factors.share) / len(job.own))
    job.work.group.barrier()


def _factor_expert(job: LayerJob, expert: int, factors: Factors) -> dict[str, Tensor]:
    recipe, shape = job.plan.recipe, job.plan.model.shape
    weights = job.weights(expert)
    tensors: dict[str, Tensor] = {}
    for site, roles in SELECTIONS.items():
        if METHODS[recipe.method].keeps(recipe, shape, roles[0]):
            zero = torch.zeros(1, dtype=torch.float64)
            tensors |= {f"none.{role}.{kind}": zero.clone() for role in roles for kind in ("curve", "energy")}
            continue
        gram = job.shrunk_gram(expert, weights, site)
        for role in roles:
            energy = whitened_energy(weights[role].float(), gram)
            for option in recipe.options:
                delta = job.delta(option, role, weights[role])
                made = {} if expert in job.trimmed else factors.factors(option, role, expert, delta, gram)
                found = {kind: made[kind] for kind in factors.kept if kind in made}
                found["curve"] = _curve(job, delta, gram, role, made)
                found["energy"] = torch.tensor([energy], dtype=torch.float64)
                tensors |= {f"{option}.{role}.{kind}": value.cpu() for kind, value in found.items()}
    return tensors


def _curve(job: LayerJob, delta: Tensor, gram: Tensor, role: Role, found: Mapping[str, Tensor]) -> Tensor:
    """float64 [steps + 1]: squared whitened error at 0, 1, 2, ... rank multiples."""
    multiple, cap = job.plan.recipe.rank_multiple, job.cap(role)
    if "u" not in found:
        return whitened_energy(delta, gram) * torch.ones(-(-cap // multiple) + 1, dtype=torch.float64)
    if "columns" in found:
        v = torch.zeros(cap, delta.shape[1], device=delta.device)
        v[torch.arange(cap), found["columns"].long()] = 1.0
    else:
        v = found["v"]
    curve = error_curve(delta, gram, found["u"], v)
    picks = torch.arange(0, cap + multiple, multiple).clamp(max=cap).unique()
    return curve.cpu()[picks]
