"""The final tensors of a layer of whole deltas: few bits, some of the channels, perhaps a base (METHODS 4.2).

In this order, as every step is made for what the ones before it have left: gate and up lose the channels that go, their
base is merged of what stays and rounded, their deltas are taken against the rounded base and rounded; then down is
refitted to what gate and up have become, its base merged of that and rounded, and its deltas rounded. Every part is
written as soon as it is known, so an interrupted layer continues with its next expert, and several processes share a
layer's experts out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from d2moe_vllm.format.config import Layer
from d2moe_vllm.format.kinds import HALVES, Role, Stored
from d2moe_vllm.ops.packing import to_bits
from offline.algebra.channels import refit_outputs
from offline.algebra.factorization import whitened_energy
from offline.algebra.merging import MERGES, Merge, MergeOptions
from offline.algebra.price import Settled
from offline.methods.layer import Advance, LayerJob, expert_part
from offline.methods.settings import Base
from offline.methods.storing import Matrix, Storing
from offline.source.sites import Site
from offline.work.statistics import Outputs, Weights, gradients, outputs


def base_part(half: str) -> str:
    """A layer's part that holds the base of a half, as it is stored."""
    return f"base-{half}"


def half_part(expert: int, half: str) -> str:
    """A layer's part that holds what is an expert's own of a half."""
    return f"{expert_part(expert)}-{half}"


def _outputs_part(expert: int) -> str:
    """A layer's part that holds what an expert's channels have become, from the base's merge to the deltas."""
    return f"outputs-{expert:05d}"


def new_merge(job: LayerJob, role: Role, partial: Literal["", "rows", "columns"] = "") -> Merge:
    """An empty merge of a projection; partial: whether experts may lack some rows or columns."""
    base: Base = job.plan.recipe.base
    options = MergeOptions(
        fisher_epsilon=base.fisher_epsilon,
        frequency_power=base.frequency_power,
        partial=partial,
        device=job.routing.device,
    )
    return MERGES[base.merge](*job.plan.model.shape.projection(role), job.experts, options)


def half_of(role: Role) -> str:
    return next(half for half, roles in HALVES.items() if role in roles)


def place_of(layer: Layer, one: Stored) -> tuple[str, str]:
    """(part, key) of a stored tensor among the layer's parts, where it lies as it is stored."""
    half = half_of(one.role)
    if one.kind.name == "base_channels":
        return base_part("w2" if layer.down.has_base else "w13"), one.name
    if one.kind.owner == "layer":
        return base_part(half), f"{one.role}.{one.name}"
    return half_part(one.expert, half), one.name if one.kind.content == "mask" else f"{one.role}.{one.name}"


def write_priced(job: LayerJob, settled: Settled, advance: Advance) -> None:
    """Writes a layer's bases and every expert's deltas and channels."""
    _Writer(job, settled, advance).write()


@dataclass(frozen=True)
class _Writer:
    """One layer. settled.kept: bool [experts, intermediate]."""

    job: LayerJob
    settled: Settled
    advance: Advance

    def write(self) -> None:
        steps = sum(2 if self.settled.ways[half].base else 1 for half in HALVES)
        for half in HALVES:
            if self.settled.ways[half].base:
                if not self.job.work.has_part(self.job.number, base_part(half)):
                    self._write_base(half, 1 / steps)
                else:
                    self.advance(1 / steps)
            self._write_deltas(half, 1 / steps)
            self.job.work.group.barrier()
            self.job.drop_grams()
        for expert in self.job.own:
            self.job.work.discard_part(self.job.number, _outputs_part(expert))

    def kept(self, expert: int) -> Tensor:
        return self.settled.kept[expert].to(self.job.routing.device)

    @property
    def union(self) -> Tensor:
        """The channels that any expert keeps, which a base has; bool [intermediate]."""
        return self.settled.kept.any(dim=0).to(self.job.routing.device)

    # Bases

    def _write_base(self, half: str, share: float) -> None:
        """Merges a half's base of what stays of the experts, and rounds it for what all of them read together."""
        job = self.job
        roles = job.plan.model.shape.halves[half]
        merges = {role: new_merge(job, role, "columns" if half == "w2" else "rows") for role in roles}
        size = job.plan.model.shape.projection(roles[0])[1]
        pooled = torch.zeros(size, size, device=job.routing.device)
        total = int(job.tokens.sum())
        for expert in job.own:
            weights, tokens, kept = job.weights(expert), int(job.tokens[expert]), self.kept(expert)
            found, gram, fisher = self._to_merge(half, expert, weights)
            for role in roles:
                own = None if fisher is None else fisher[role]
                merges[role].add(found[role], tokens, total, own, kept=kept)
            pooled.add_(gram, alpha=tokens / max(total, 1))
            self.advance(share / len(job.own))
        for merge in merges.values():
            job.work.group.sum(merge.state())
        job.work.group.sum([pooled])
        if job.work.group.first:
            job.save(base_part(half), self._rounded_base(half, merges, pooled))
        job.work.group.barrier()

    def _to_merge(
        self, half: str, expert: int, weights: Weights
    ) -> tuple[Mapping[Role, Tensor], Tensor, Mapping[Role, Tensor] | None]:
        """An expert's projections of a half in their whole size, the second moment of what they read, and their Fisher
        information where the merge wants it. Keeps for the deltas what was computed of the expert's rows."""
        job, recipe, fisher = self.job, self.job.plan.recipe, None
        sites: Sequence[Site] = ["input"] if half == "w13" else []
        grams: Mapping[Site, Tensor] = {}
        if MERGES[recipe.base.merge].needs_fisher:
            told = gradients(
                weights, job.routing, expert, job.gated, fisher=job.plan.model.shape.halves[half],
                gate_weighted=recipe.delta.gate_weighted, sites=sites,
            )  # fmt: skip
            fisher, grams = told.fisher, told.grams
        if half == "w13":
            gram = job.finite(grams["input"]) if grams else job.gram(expert, weights, "input")
            job.keep_gram(expert, "input", gram)
            return weights, job.shrunk(expert, gram), fisher
        kept = self.kept(expert)
        seen = self._outputs(expert, weights)
        self._keep_outputs(expert, seen)
        down = self._refitted(expert, weights, seen)
        places = kept.nonzero()[:, 0]
        whole = torch.zeros(weights["down"].shape, device=down.device).index_copy_(1, places, down)
        moment = self._shrunk(expert, seen.moment)
        gram = torch.zeros(len(kept), len(kept), device=down.device)
        gram[places[:, None], places] = moment
        return {"down": whole}, gram, fisher

    def _rounded_base(self, half: str, merges: Mapping[Role, Merge], pooled: Tensor) -> dict[str, Tensor]:
        union, bits = self.union, self.settled.ways[half].base
        roles = list(merges)
        if half == "w13":
            found = self._storing(bits).store([merges[role].result()[union] for role in roles], pooled)
        else:
            whole = merges["down"].result()[:, union].contiguous()
            found = self._storing(bits).store([whole], pooled[union][:, union])
        tensors = {"base_channels": to_bits(union).cpu()}
        for role, one in zip(roles, found, strict=True):
            tensors |= {name: tensor.cpu() for name, tensor in one.named(f"{role}.base").items()}
        return tensors

    def _base(self, half: str, role: Role) -> Tensor | None:
        """The stored base of a projection, float32, in the size of its union of channels; None without one."""
        if not (bits := self.settled.ways[half].base):
            return None
        inputs = int(self.union.sum()) if half == "w2" else self.job.plan.model.shape.hidden_size
        return self._opened(base_part(half), f"{role}.base", bits, inputs)

    # Deltas

    def _write_deltas(self, half: str, share: float) -> None:
        job = self.job
        for expert in job.own:
            if not job.work.has_part(job.number, half_part(expert, half)):
                write = self._gate_and_up if half == "w13" else self._down
                job.save(half_part(expert, half), {name: tensor.cpu() for name, tensor in write(expert).items()})
            self.advance(share / len(job.own))

    def _gate_and_up(self, expert: int) -> dict[str, Tensor]:
        job, kept = self.job, self.kept(expert)
        weights = job.weights(expert)
        gram = job.shrunk_gram(expert, weights, "input")
        roles, within = weights.first, kept[self.union]
        bases = {role: self._base("w13", role) for role in roles}
        deltas = []
        for role in roles:
            base = bases[role]
            own = weights[role][kept].float()
            deltas.append(own if base is None else own - base[within])
        found: dict[str, Tensor] = {}
        for role, delta, stored in zip(roles, deltas, self._delta("w13", deltas, gram), strict=True):
            found |= {} if stored is None else stored.named(f"{role}.dense")
            left = weights[role].float().clone()  # of a model in float32 it would be the weight itself
            left[kept] = delta if stored is None else delta - stored.numbers
            found |= _figures(role, whitened_energy(left, gram), whitened_energy(weights[role].float(), gram))
        return found

    def _down(self, expert: int) -> dict[str, Tensor]:
        weights, kept = self.job.weights(expert), self.kept(expert)
        seen = self._outputs(expert, weights)
        down = self._refitted(expert, weights, seen)
        base = self._base("w2", "down")
        before = torch.zeros_like(down) if base is None else base[:, kept[self.union]]
        delta = down - before
        (stored,) = self._delta("w2", [delta], self._shrunk(expert, seen.moment))
        found = {} if stored is None else stored.named("down.dense")
        written = before if stored is None else before + stored.numbers
        found |= _figures("down", max(seen.error(written), 0.0), seen.energy)
        return {**found, "channels": to_bits(kept)}

    def _delta(self, half: str, deltas: list[Tensor], gram: Tensor) -> Sequence[Matrix | None]:
        """The deltas as stored; None for those that are not."""
        bits = self.settled.ways[half].delta
        return self._storing(bits).store(deltas, gram) if bits else [None for _ in deltas]

    def _refitted(self, expert: int, weights: Weights, seen: Outputs) -> Tensor:
        """down, float32 [hidden, kept], as it best gives what the expert gave from what its channels have become."""
        tokens, strength = int(self.job.tokens[expert]), self.job.plan.recipe.delta.shrinkage
        return refit_outputs(weights["down"], self.kept(expert), seen.moment, seen.cross, tokens, strength)

    def _outputs(self, expert: int, weights: Weights) -> Outputs:
        """What the expert gave, and what its channels have become: as its base's merge kept it, or made anew."""
        job, kept, way = self.job, self.kept(expert), self.settled.ways["w13"]
        if job.work.has_part(job.number, _outputs_part(expert)):
            found = job.work.load_part(job.number, _outputs_part(expert))
            moment, cross = (found[name].to(job.routing.device) for name in ("moment", "cross"))
            return Outputs(moment, cross, float(found["energy"]))
        stored = Weights({}, {role: weights.biases[role][kept] for role in weights.first if role in weights.biases})
        for role in weights.first:
            base, hidden = self._base("w13", role), job.plan.model.shape.hidden_size
            own = None if base is None else base[kept[self.union]]
            if way.delta:
                delta = self._opened(half_part(expert, "w13"), f"{role}.dense", way.delta, hidden)
                own = delta if own is None else own + delta
            assert own is not None, "a half has a base or deltas"
            stored[role] = own
        weighted = job.plan.recipe.delta.gate_weighted
        seen = outputs(weights, stored, job.routing, expert, job.gated, gate_weighted=weighted)
        job.finite(seen.moment)
        job.finite(seen.cross)
        return seen

    def _keep_outputs(self, expert: int, seen: Outputs) -> None:
        """For the expert's deltas, as Grams are kept."""
        if self.job.plan.keeps("middle"):
            energy = torch.tensor([seen.energy], dtype=torch.float64)
            tensors = {"moment": seen.moment.cpu(), "cross": seen.cross.cpu(), "energy": energy}
            self.job.work.save_part(self.job.number, _outputs_part(expert), tensors)

    def _shrunk(self, expert: int, moment: Tensor) -> Tensor:
        return self.job.shrunk(expert, moment.clone()) if len(moment) else moment

    # Numbers

    def _storing(self, bits: int) -> Storing:
        return Storing(bits, self.job.plan.recipe.group_size, self.job.plan.torch_dtype)

    def _opened(self, part: str, key: str, bits: int, inputs: int) -> Tensor:
        """A stored matrix of the working folder as numbers, float32, on the device."""
        job, storing = self.job, self._storing(bits)
        found = job.work.load_part(job.number, part, *storing.names(key))
        tensors = {name: tensor.to(job.routing.device) for name, tensor in found.items()}
        return storing.open(tensors, key, inputs).numbers


def _figures(role: Role, error: float, energy: float) -> dict[str, Tensor]:
    """Squared error of a projection's outputs, and what it is a share of."""
    figures = {"error": error, "energy": energy}
    return {f"{role}.{name}": torch.tensor([value], dtype=torch.float64) for name, value in figures.items()}
