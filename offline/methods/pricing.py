"""What settling the price needs to know of a layer: what every expert would lose by every way of storing it, and by
every channel that is dropped (METHODS 4.3). A few kilobytes of an expert stay.

The part `measured-<expert>` of a layer holds `channels`, float64 [intermediate], the expected loss of each dropped
channel; `<half>.losses`, float64 [ways], of each way of `ways`, in their order; `<half>.shares`, float64
[intermediate], how these are spread over the channels.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from d2moe_vllm.format.kinds import HALVES, SCALE_DTYPE, Role
from offline.algebra.losses import column_shares, rounding_losses, row_shares
from offline.algebra.merging import MERGES, Merge
from offline.algebra.price import LayerCosts, Way
from offline.algebra.rounding import Rounded, round_matrices
from offline.errors import InputError
from offline.io.shards import TORCH_DTYPES
from offline.methods.layer import Advance, LayerJob, measured_part
from offline.methods.priced import new_merge
from offline.methods.settings import Settings
from offline.source.sites import SELECTIONS, SITES, Site
from offline.work.statistics import Gradients, gradients
from offline.work.workdir import WorkDir

BASES = (4, 3)
"""Bits that a base may have."""
_AUTO = (Way(0, 8), Way(0, 4), Way(0, 3), Way(0, 2), Way(4, 3), Way(4, 2), Way(3, 2), Way(4, 0))
"""What `bits: auto` chooses from. More bits than 8 save nothing that could be measured."""


def ways(recipe: Settings) -> tuple[Way, ...]:
    """How a half of a layer may be stored, under a recipe of whole deltas."""
    if recipe.bits == "auto":
        found: tuple[Way, ...] = _AUTO
    elif recipe.bits == 16:
        found = (Way(0, 16),)
    else:
        bits = int(recipe.bits)
        found = (Way(0, bits), *(Way(base, bits) for base in BASES if base >= bits))
    return tuple(way for way in found if not way.base or recipe.base.kind != "none")


def measure_priced(job: LayerJob, advance: Advance) -> None:
    """Writes the parts `measured-<expert>` of this process's experts. An expert at a time: a killed run measures on
    with its next one. Raises InputError where gradients or activations overflow."""
    every = ways(job.plan.recipe)
    bits = sorted({way.base for way in every} - {0})
    seen, bases = _look(job, bits, lambda share: advance(share / 2))
    for expert in job.own:
        if not job.is_measured(expert):
            job.save(measured_part(expert), _measured(job, expert, every, seen[expert], bases))
        advance(1 / 2 / len(job.own))
    job.drop_grams()
    job.work.group.barrier()


Bases = Mapping[tuple[int, Role], Rounded]
"""By bits and projection, as they would be stored if no channel were dropped."""


def _look(job: LayerJob, bits: list[int], advance: Advance) -> tuple[Mapping[int, Gradients], Bases]:
    """What gradients tell of this process's experts, and the bases that there are to choose from."""
    group, device = job.work.group, job.routing.device
    shape = job.plan.model.shape
    merges = {role: new_merge(job, role) for role in shape.roles} if bits else {}
    sizes = {SITES[role]: shape.projection(role)[1] for role in shape.roles}
    pooled = {site: torch.zeros(size, size, device=device) for site, size in sizes.items()} if bits else {}
    seen: dict[int, Gradients] = {}
    for expert in job.own:
        seen[expert] = _look_at(job, expert, merges, pooled)
        advance(1 / len(job.own))
    if not all(found.finite for found in seen.values()):
        raise InputError(f"layer {job.number}: gradients overflow on the calibration text; use another text")
    for merge in merges.values():
        group.sum(merge.state())
    group.sum(pooled.values())
    # Of a merge that has ended only the result is kept.
    merged = {role: merges.pop(role).result() for role in list(merges)}
    return seen, _bases(job, bits, merged, pooled)


def _look_at(job: LayerJob, expert: int, merges: Mapping[Role, Merge], pooled: Mapping[Site, Tensor]) -> Gradients:
    """Of one expert, in one pass over its rows: adds it to the merges and the pooled moments, and keeps its own for
    later. What is handed back is small: all else goes before the next expert comes, at real sizes it is gigabytes."""
    recipe, weights, tokens = job.plan.recipe, job.weights(expert), int(job.tokens[expert])
    total = max(int(job.tokens.sum()), 1)
    found = gradients(
        weights, job.routing, expert, job.gated, fisher=bool(merges) and MERGES[recipe.base.merge].needs_fisher,
        gate_weighted=recipe.delta.gate_weighted, sites=list(SELECTIONS),
    )  # fmt: skip
    for role, merge in merges.items():
        merge.add(weights[role], tokens, total, None if found.fisher is None else found.fisher[role])
    for site, gram in found.grams.items():
        job.keep_gram(expert, site, job.finite(gram))
        if pooled:
            pooled[site].add_(job.shrunk(expert, gram), alpha=tokens / total)
    return Gradients(None, found.rows, found.channels, {})


def _bases(job: LayerJob, bits: list[int], merged: Mapping[Role, Tensor], pooled: Mapping[Site, Tensor]) -> Bases:
    found: dict[tuple[int, Role], Rounded] = {}
    for roles in job.plan.model.shape.halves.values() if bits else ():
        moment = pooled[SITES[roles[0]]]
        pairs = [(one, role) for one in bits for role in roles]
        rounded = round_matrices(
            [merged[role] for _, role in pairs], moment, [one for one, _ in pairs],
            group_size=job.plan.recipe.group_size, dtype=TORCH_DTYPES[SCALE_DTYPE],
        )  # fmt: skip
        found |= dict(zip(pairs, rounded, strict=True))
    return found


def _measured(job: LayerJob, expert: int, every: tuple[Way, ...], seen: Gradients, bases: Bases) -> dict[str, Tensor]:
    weights = job.weights(expert)
    found = {"channels": seen.channels / 2}
    for half, roles in job.plan.model.shape.halves.items():
        gram = job.shrunk_gram(expert, weights, SITES[roles[0]])
        own = {role: weights[role].float() for role in roles}
        tried = [(way, role) for way in every for role in roles]
        based = {way.base for way in every} - {0}
        deltas = {(base, role): own[role] - bases[base, role].dense() for base in based for role in roles}
        losses = rounding_losses(
            [deltas[way.base, role] if way.base else own[role] for way, role in tried],
            [seen.rows[role] for _, role in tried],
            gram,
            [way.delta for way, _ in tried],
            group_size=job.plan.recipe.group_size,
            dtype=TORCH_DTYPES[SCALE_DTYPE],
        )
        totals = dict.fromkeys(every, 0.0)
        for (way, _), loss in zip(tried, losses, strict=True):
            totals[way] += loss
        found[f"{half}.losses"] = torch.tensor([totals[way] for way in every], dtype=torch.float64)
        rows = [seen.rows[role] for role in roles]
        found[f"{half}.shares"] = column_shares(gram) if half == "w2" else row_shares([*own.values()], rows)
    return {name: tensor.cpu() for name, tensor in found.items()}


def layer_costs(recipe: Settings, work: WorkDir, layer: int, experts: int) -> LayerCosts:
    """What was measured of a layer, for the price."""
    every = ways(recipe)
    parts = [work.load_part(layer, measured_part(expert)) for expert in range(experts)]
    losses = {half: torch.stack([part[f"{half}.losses"] for part in parts]) for half in HALVES}
    return LayerCosts(
        torch.stack([part["channels"] for part in parts]),
        {half: {way: found[:, number] for number, way in enumerate(every)} for half, found in losses.items()},
        {half: torch.stack([part[f"{half}.shares"] for part in parts]) for half in HALVES},
    ).floored()
