"""Factors that experts of a layer share (METHODS 1.7): one V for all, or fewer U's than experts.

The algebra is in sharing.py; this is its order of work over experts, which are taken one at a time. The part `shared`
of a layer holds, per role and as they will be stored: `shared_v` (Share-V), `delta_u.<j>` and `u_index` (Merge-U); the
part `shared-making` what the experts' own factors are made with while the layer is written: `projector` (Share-V) or
`scale.<j>` (Merge-U). While errors are measured all of it is in memory, at the largest rank, nested, for one selection
and one kind of base at a time; of that the part `measured-shared` keeps which expert joined which U.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from d2moe_vllm.format.kinds import Role
from offline.algebra.factorization import input_moment, output_moment, whitened_energy
from offline.algebra.sharing import least, mean_u, merged_u, seed_experts, shared_v, unexplained
from offline.methods.layer import LayerJob
from offline.methods.measuring import curve_of, curve_without, save_curves
from offline.methods.options import Option
from offline.source.sites import SELECTIONS, SITES, Site

SHARED_PART = "shared"
MAKING_PART = "shared-making"
"""Dropped when the layer is written."""
MEASURED_PART = "measured-shared"
_MAKING = ("projector", "scale")

Common = Mapping[str, Tensor]
"""What all experts of a projection share, by the names in the part."""


@dataclass(frozen=True)
class _Clusters:
    """seeds: the experts that founded them, ascending; joined: int32 [experts], -1 for trimmed ones."""

    seeds: list[int]
    joined: Tensor

    def members(self, number: int) -> list[int]:
        return (self.joined == number).nonzero().flatten().tolist()


@dataclass(frozen=True)
class JointFactors:
    """The shared factors of one layer. Every process sums over its own experts."""

    job: LayerJob
    share: ClassVar[float] = 0.5
    common_kinds: ClassVar[tuple[str, ...]] = ("shared_v", "projector")
    _held: dict[str, Tensor] = field(default_factory=dict)

    def measure(self, advance: Callable[[float], None]) -> None:
        """What experts share depends on all of them: a killed run measures the layer anew."""
        job = self.job
        if job.work.has_part(job.number, MEASURED_PART):
            advance(1)
            return
        found: dict[int, dict[str, Tensor]] = {expert: {} for expert in job.own}
        joined: dict[str, Tensor] = {}
        for site, roles in SELECTIONS.items():
            for option in job.options[site]:
                self._held.update(self._make(option, site))
                for expert in job.own:
                    self._measure(expert, option, site, found[expert])
                    advance(1 / len(job.own) / sum(map(len, job.options.values())))
                joined |= {f"{option}.{role}": self._held[f"{role}.u_index"] for role in self._merged(roles)}
                self._held.clear()
        for expert, curves in found.items():
            save_curves(job, expert, curves)
        job.work.group.barrier()  # the part says that every process has measured its experts
        if job.work.group.first:
            job.save(MEASURED_PART, joined)
        job.work.group.barrier()

    def _measure(self, expert: int, option: Option, site: Site, found: dict[str, Tensor]) -> None:
        job = self.job
        weights = job.weights(expert)
        gram = job.shrunk_gram(expert, weights, site)
        for role in SELECTIONS[site]:
            delta = job.delta(option, role, weights[role])
            if f"{role}.energy" not in found:
                energy = whitened_energy(weights[role].float(), gram)
                found[f"{role}.energy"] = torch.tensor([energy], dtype=torch.float64)
            if expert in job.trimmed:
                found[f"{option}.{role}.curve"] = curve_without(job, delta, gram, role)
            else:
                made = self.factors(option, role, expert, delta, gram)
                found[f"{option}.{role}.curve"] = curve_of(job, delta, gram, role, made["u"], made["v"])

    def write(self, advance: Callable[[float], None]) -> None:
        """Writes the parts `shared-making` and `shared`."""
        job = self.job
        advance(1)
        found = job.work.has_part(job.number, SHARED_PART)
        job.work.group.barrier()  # before it is written: all see the same
        if found:
            return
        tensors: dict[str, Tensor] = {}
        for site, (option,) in job.options.items():
            tensors |= {name: tensor.cpu() for name, tensor in self._make(option, site).items()}
        if job.work.group.first:
            making = {name: tensor for name, tensor in tensors.items() if name.split(".")[1] in _MAKING}
            if making:
                job.save(MAKING_PART, making)
            job.save(SHARED_PART, {name: tensor for name, tensor in tensors.items() if name not in making})
        job.work.group.barrier()

    def _make(self, option: Option, site: Site) -> dict[str, Tensor]:
        """All that the experts of a selection share, `<role>.<kind>`, on the device; of a delta of rank 0 nothing."""
        delta = self.job.plan.recipe.delta
        roles = tuple(role for role in SELECTIONS[site] if self.job.cap(role))
        common = {role: self._share_v(option, role) for role in roles} if delta.share_v else {}
        kinds = self.common_kinds[:1] if delta.distinct_u else self.common_kinds
        tensors = {f"{role}.{kind}": found[kind] for role, found in common.items() for kind in kinds}
        if delta.distinct_u and roles:
            tensors |= self._merge_u(option, roles, common)
        return tensors

    def factors(self, option: Option, role: Role, expert: int, delta: Tensor, gram: Tensor) -> Mapping[str, Tensor]:
        """An expert's u and v as they will be stored, on the device; delta: [out, in]; gram: [in, in]."""
        recipe, dtype = self.job.plan.recipe.delta, self.job.plan.torch_dtype
        if not self.job.cap(role):
            return {}
        if recipe.share_v:
            v = self._load(role, "shared_v")
            if not recipe.distinct_u:
                common = {kind: self._load(role, kind) for kind in self.common_kinds}
                return {"u": self._own_u(common, delta, gram).to(dtype), "v": v}
        place = int(self._load(role, "u_index")[expert])
        u = self._load(role, f"delta_u.{place}")
        if recipe.share_v:
            return {"u": u, "v": v}
        # The stored U carries its scale once; V carries its inverse.
        scale = self._load(role, f"scale.{place}")
        return {"u": u, "v": ((u.double() / scale.square()).T @ delta.double()).to(dtype)}

    @property
    def kept(self) -> tuple[str, ...]:
        """Which factors are an expert's own."""
        delta = self.job.plan.recipe.delta
        return tuple(kind for kind, shared in (("u", delta.distinct_u), ("v", delta.share_v)) if not shared)

    def _load(self, role: Role, kind: str) -> Tensor:
        key = f"{role}.{kind}"
        if key in self._held:
            return self._held[key]
        part = MAKING_PART if kind.split(".")[0] in _MAKING else SHARED_PART
        return self.job.work.load_part(self.job.number, part, key)[key].to(self.job.routing.device)

    def _merged(self, roles: tuple[Role, ...]) -> tuple[Role, ...]:
        """Those whose U's several experts share."""
        return roles if self.job.plan.recipe.delta.distinct_u else ()

    @property
    def _members(self) -> list[int]:
        return [expert for expert in range(self.job.experts) if expert not in self.job.trimmed]

    def _each(self, option: Option, role: Role, experts: list[int]) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(expert, delta [out, in], second moment of its inputs, the mean over its tokens [in, in])."""
        for expert in experts:
            weights = self.job.weights(expert)
            gram = self.job.shrunk_gram(expert, weights, SITES[role])
            yield expert, self.job.delta(option, role, weights[role]), gram

    def _weight(self, expert: int, members: list[int]) -> int:
        """Each expert counts in a sum by what it is used; one that never is has no say, unless none is."""
        return int(self.job.tokens[expert]) if int(self.job.tokens[members].sum()) else 1

    def _own(self, experts: list[int]) -> list[int]:
        own = set(self.job.own)
        return [expert for expert in experts if expert in own]

    def _own_u(self, common: Common, delta: Tensor, gram: Tensor) -> Tensor:
        """An expert's own U beside a shared V, float64 [out, rank]."""
        return delta.double() @ common["projector"]

    def _share_v(self, option: Option, role: Role) -> Common:
        """shared_v in the stored dtype [rank, in], projector float64 [in, rank]."""
        job = self.job
        size = job.plan.model.shape.projection(role)[1]
        gram, moment = (torch.zeros(size, size, dtype=torch.float64, device=job.routing.device) for _ in range(2))
        for expert, delta, own_gram in self._each(option, role, self._own(self._members)):
            gram.add_(own_gram, alpha=self._weight(expert, self._members))
            moment += input_moment(delta, torch.float64)
        job.work.group.sum([gram, moment])
        v, projector = shared_v(gram, moment, job.cap(role), len(self._members))
        return {"shared_v": v.to(job.plan.torch_dtype), "projector": projector}

    def _merge_u(self, option: Option, roles: tuple[Role, ...], common: Mapping[Role, Common]) -> dict[str, Tensor]:
        clusters = self._clusters(option, roles, common)
        tensors: dict[str, Tensor] = {}
        for role in roles:
            tensors[f"{role}.u_index"] = clusters.joined
            for number in range(len(clusters.seeds)):
                members = clusters.members(number)
                u, scale = self._common_u(option, role, members, common)
                tensors[f"{role}.delta_u.{number}"] = u
                if scale is not None:
                    tensors[f"{role}.scale.{number}"] = scale
        return tensors

    def _clusters(self, option: Option, roles: tuple[Role, ...], common: Mapping[Role, Common]) -> _Clusters:
        """Those that were measured, where errors were: ranks were settled by what these leave."""
        job, key = self.job, f"{option}.{roles[0]}"
        tokens = [int(job.tokens[expert]) for expert in self._members]
        seeds = [self._members[place] for place in seed_experts(tokens, job.plan.recipe.delta.distinct_u)]
        if job.work.has_part(job.number, MEASURED_PART):
            return _Clusters(seeds, job.work.load_part(job.number, MEASURED_PART, key)[key])
        return self._join(option, roles, seeds, common)

    def _join(
        self, option: Option, roles: tuple[Role, ...], seeds: list[int], common: Mapping[Role, Common]
    ) -> _Clusters:
        """The most routed experts found clusters, each other one joins where it loses least, in all `roles`
        together: gate and up share one map."""
        job = self.job
        errors = torch.zeros(job.experts, len(seeds), dtype=torch.float64)
        for role in roles:
            founders = [self._founder(option, role, seed, common) for seed in seeds]
            others = [expert for expert in self._members if expert not in seeds]
            for expert, delta, gram in self._each(option, role, self._own(others)):
                for number, u in enumerate(founders):
                    v = common[role]["shared_v"] if common else u.T @ delta.double()
                    errors[expert, number] += unexplained(delta, gram, u, v)
        job.work.group.sum([errors])
        joined = torch.full((job.experts,), -1, dtype=torch.int32)
        for expert in self._members:
            joined[expert] = seeds.index(expert) if expert in seeds else least(errors[expert].tolist())
        return _Clusters(seeds, joined)

    def _founder(self, option: Option, role: Role, seed: int, common: Mapping[Role, Common]) -> Tensor:
        """The U that a cluster starts with, float64 [out, rank]."""
        _, delta, gram = next(self._each(option, role, [seed]))
        if common:
            return self._own_u(common[role], delta, gram)
        return merged_u(output_moment(delta, gram, torch.float64), self.job.cap(role))

    def _common_u(
        self, option: Option, role: Role, members: list[int], common: Mapping[Role, Common]
    ) -> tuple[Tensor, Tensor | None]:
        """A cluster's U in the stored dtype, and the scale that it carries for its V's (None with a shared V)."""
        job, dtype = self.job, self.job.plan.torch_dtype
        if common:
            return self._shared_u(option, role, members, common[role]).to(dtype), None
        rows = job.plan.model.shape.projection(role)[0]
        moment = torch.zeros(rows, rows, dtype=torch.float64, device=job.routing.device)
        for expert, delta, gram in self._each(option, role, self._own(members)):
            moment.add_(output_moment(delta, gram, torch.float64), alpha=self._weight(expert, members))
        job.work.group.sum([moment])
        u = merged_u(moment, job.cap(role))
        squares = torch.zeros(u.shape[1], dtype=torch.float64, device=u.device)
        for expert in self._own(members):
            squares += (u.T @ job.delta(option, role, job.weights(expert)[role]).double()).square().sum(dim=1)
        job.work.group.sum([squares])
        # As in single factors, U's columns and V's rows get the same norm, here in the mean over members.
        scale = (squares / len(members)).sqrt().sqrt()
        scale = torch.where(scale > 0, scale, 1.0)
        return (u * scale).to(dtype), scale

    def _shared_u(self, option: Option, role: Role, members: list[int], common: Common) -> Tensor:
        """A cluster's U beside a shared V, float64 [out, rank]; members: the experts in it, ascending."""
        # A layer's members are few and their U's small: every process takes the mean of all.
        each = self._each(option, role, members)
        return mean_u((self._own_u(common, delta, gram), int(self.job.tokens[e])) for e, delta, gram in each)
