"""The shared base of a layer: merged from its experts, then pruned or decomposed, and rounded as it will be stored.

Where the merge wants Fisher information, experts' gradients are taken on the way, and with them what an error of each
expert costs. A merge is made anew in every sweep that needs one: what is merged never waits on disk for a decision.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from d2moe_vllm.format.kinds import Role, roles_of
from offline.algebra.factorization import svd_base
from offline.algebra.merging import MERGES, Merge, MergeOptions
from offline.algebra.pruning import column_scores, select_columns
from offline.errors import InputError
from offline.methods.layer import BASE_PART, Advance, LayerJob
from offline.methods.options import Option
from offline.source.sites import SELECTIONS, SITES, Site
from offline.work.statistics import gradients

Merged = Mapping[Role, Tensor]
"""float32 [out, in] of every projection that gets a base, on the device."""
SENSITIVITY_PART = "sensitivity"
"""A layer's part that holds what a unit of each projection's squared error costs, float64 [projections, experts]
(METHODS 1.4)."""
MERGED_PART = "merged"
"""A layer's part that holds its merged bases, float32 [out, in] by role, from one sweep to the next."""


def merge_experts(job: LayerJob, advance: Advance) -> Merged:
    """The layer's experts as one, the same on every process. Writes the part `sensitivity`, where gradients were
    recorded and it is not there yet. Raises InputError where gradients overflow."""
    group = job.work.group
    roles = job.plan.model.shape.roles
    wanted = [role for role in roles if any(option != "none" for option in job.options[SITES[role]])]
    sensitivity = torch.zeros(len(roles), job.experts, dtype=torch.float64)
    merges = {role: _new_merge(job, role) for role in wanted}
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
    recorded = job.routing.upstream is not None
    if group.first and recorded and not job.work.has_part(job.number, SENSITIVITY_PART):
        job.work.save_part(job.number, SENSITIVITY_PART, {"sensitivity": sensitivity})
    group.barrier()
    return {role: merge.result() for role, merge in merges.items()}


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
            job.gated,
            fisher=bool(merges) and needs.needs_fisher,
            gate_weighted=recipe.delta.gate_weighted,
        )
        fisher = found.fisher
        if sensitivity is not None:
            sensitivity[:, expert] = torch.tensor([found.sensitivity[role] for role in roles_of(weights)])
    total = int(job.tokens.sum())
    for site, roles in job.plan.model.shape.selections.items():
        gram = job.gram(expert, weights, site) if needs.needs_gram and any(role in merges for role in roles) else None
        for role in roles:
            if role in merges:
                merges[role].add(
                    weights[role],
                    tokens=int(job.tokens[expert]),
                    total_tokens=total,
                    fisher=None if fisher is None else fisher[role],
                    gram=gram,
                )


def hold_bases(job: LayerJob, merged: Merged) -> None:
    """Keeps every kind of base that is to be measured in the job's memory."""
    _check_energy(job)
    moments = _pooled(job)
    for site, roles in job.plan.model.shape.selections.items():
        for option in job.options[site]:
            if option != "none":
                stored = _stored(job, merged, option, site, moments, whole=True)
                for role in roles:
                    job.hold_base(option, role, stored[role])


def write_base(job: LayerJob, merged: Merged) -> None:
    """Writes the part `base`: the settled kind of base of every selection that has one, as it will be stored. Raises
    InputError for one that is not finite."""
    _check_energy(job)
    moments = _pooled(job)
    if job.work.group.first:
        tensors: dict[str, Tensor] = {}
        for site, (option,) in job.options.items():
            if option != "none":
                for role, parts in _stored(job, merged, option, site, moments).items():
                    tensors |= {f"{role}.{name}": part.cpu() for name, part in parts.items()}
        job.save(BASE_PART, tensors)
    job.work.group.barrier()


def _pooled(job: LayerJob) -> dict[Site, Tensor]:
    """Where bases are rounded, the second moment of what all experts read, float32 [n, n], the mean over routed tokens
    of what each expert's deltas are fitted by; the same on every process."""
    sites = [site for site, options in job.options.items() if any(option != "none" for option in options)]
    if not job.storing.packed:
        return {}
    sizes = {site: job.plan.model.shape.projection(SELECTIONS[site][0])[1] for site in sites}
    found = {site: torch.zeros(size, size, device=job.routing.device) for site, size in sizes.items()}
    total = max(int(job.tokens.sum()), 1)
    for expert in job.own:
        weights = job.weights(expert)
        for site, moment in found.items():
            moment.add_(job.shrunk_gram(expert, weights, site), alpha=int(job.tokens[expert]) / total)
    job.work.group.sum(list(found.values()))
    return found


def _check_energy(job: LayerJob) -> None:
    if not all(torch.isfinite(energy).all() for energy in job.energy.values()):
        raise InputError(f"layer {job.number}: activations overflow float32 on the calibration text; use another")


def _stored(
    job: LayerJob, merged: Merged, option: Option, site: Site, moments: Mapping[Site, Tensor], *, whole: bool = False
) -> dict[Role, dict[str, Tensor]]:
    """A selection's base as it is stored, by projection and kind; moments: `_pooled`; whole: a pruned one that is not
    rounded may keep all of its columns, so that in memory it is the full one."""
    roles, moment = job.plan.model.shape.selections[site], moments.get(site)
    if option == "svd":
        return {role: _low_rank(job, merged, role, moment) for role in roles}
    columns = _columns(job, merged, site) if option == "pruned" else None
    matrices = [merged[role] for role in roles]
    if columns is not None and (job.storing.packed or not whole):
        picked = columns.long()
        matrices = [matrix[:, picked] for matrix in matrices]
        moment = None if moment is None else moment[picked][:, picked]
    found: dict[Role, dict[str, Tensor]] = {}
    for role, base in zip(roles, job.storing.store(matrices, moment), strict=True):
        found[role] = base.named("base")
        if columns is not None:
            found[role] |= {"base_columns": columns.clone(), "base_norms": base.numbers.norm(dim=0)}
    return found


def _low_rank(job: LayerJob, merged: Merged, role: Role, moment: Tensor | None) -> dict[str, Tensor]:
    rank = job.plan.recipe.base_rank(job.plan.model.shape, role)
    u, v = svd_base(merged[role], job.energy[SITES[role]], rank)
    left, right = job.storing.factors(merged[role], moment, u, v)
    return left.named("base_u") | right.named("base_v")


def _columns(job: LayerJob, merged: Merged, site: Site) -> Tensor:
    """int32, the input columns that a pruned base keeps (METHODS 1.2)."""
    base = job.plan.recipe.base
    squares = [merged[role].double().square().sum(dim=0) for role in job.plan.model.shape.selections[site]]
    joint = torch.stack(squares).sum(dim=0).sqrt().cpu()
    kept = base.columns(len(joint), "pruned").kept
    found = select_columns(column_scores(joint, job.energy[site].sqrt()), kept, base.groups)
    return found.to(job.routing.device)
