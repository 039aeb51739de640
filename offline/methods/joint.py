"""Factors that experts of a layer share (METHODS 1.7): one V for all, or fewer U's than experts.

The algebra is in sharing.py; this is its order of work over experts, which are taken one at a time. The part `shared`
of a layer holds, per role and as they will be stored: `shared_v` (Share-V), `delta_u.<j>` and `u_index` (Merge-U); the
part `shared-making` what the experts' own factors are made with while the layer is written: `projector` (Share-V) or
`scale.<j>` (Merge-U). While errors are measured all of it is in memory, at the largest rank, nested, for one selection
and one kind of base at a time; of that the part `measured-shared` keeps which expert joined which U.

Where factors are rounded (METHODS 4.1), what is shared is rounded first, by the pooled second moment of what it reads:
a V by the inputs, a U by what its cluster's V's give. What is an expert's own is then fitted to that in closed form.
Errors are measured before rounding: rounded factors are not nested.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from d2moe_vllm.format.kinds import Role
from offline.algebra.factorization import input_moment, output_moment, whitened_energy
from offline.algebra.sharing import (
    fitted_v,
    least,
    mean_u,
    merged_u,
    refitted_u,
    seed_experts,
    shared_v,
    unexplained,
)
from offline.methods.layer import LayerJob
from offline.methods.measuring import curve_of, curve_without, save_curves
from offline.methods.options import Option
from offline.methods.storing import Matrix, Storing
from offline.source.sites import SITES, Site

SHARED_PART = "shared"
MAKING_PART = "shared-making"
"""Dropped when the layer is written."""
MEASURED_PART = "measured-shared"
_MAKING = ("projector", "scale")


@dataclass(frozen=True)
class Common:
    """What all experts of a projection share: V; projector: float64 [in, rank], gives each its U before V is rounded,
    None where U's are made otherwise."""

    v: Matrix
    projector: Tensor | None = None


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
    measuring: bool = False
    share: ClassVar[float] = 0.5
    _projects: ClassVar[bool] = True
    _held: dict[str, Tensor] = field(default_factory=dict)

    def measure(self, advance: Callable[[float], None]) -> None:
        """What experts share depends on all of them: a killed run measures the layer anew."""
        job = self.job
        if job.work.has_part(job.number, MEASURED_PART):
            advance(1)
        else:
            replace(self, measuring=True)._measure_all(advance)

    def _measure_all(self, advance: Callable[[float], None]) -> None:
        job = self.job
        found: dict[int, dict[str, Tensor]] = {expert: {} for expert in job.own}
        joined: dict[str, Tensor] = {}
        for site, roles in job.plan.model.shape.selections.items():
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
        for role in job.plan.model.shape.selections[site]:
            delta = job.delta(option, role, weights[role])
            if f"{role}.energy" not in found:
                energy = whitened_energy(weights[role].float(), gram)
                found[f"{role}.energy"] = torch.tensor([energy], dtype=torch.float64)
            if expert in job.trimmed:
                found[f"{option}.{role}.curve"] = curve_without(job, delta, gram, role)
            else:
                made = self.factors(option, role, expert, delta, gram)
                u, v = (made[kind].parts[""] for kind in ("u", "v"))
                found[f"{option}.{role}.curve"] = curve_of(job, delta, gram, role, u, v)

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
        roles = tuple(role for role in self.job.plan.model.shape.selections[site] if self.job.cap(role))
        common = {role: self._share_v(option, role) for role in roles} if delta.share_v else {}
        tensors: dict[str, Tensor] = {}
        for role, found in common.items():
            tensors |= found.v.named(f"{role}.shared_v")
            if found.projector is not None and not delta.distinct_u:
                tensors[f"{role}.projector"] = found.projector
        if delta.distinct_u and roles:
            tensors |= self._merge_u(option, roles, common)
        return tensors

    def factors(self, option: Option, role: Role, expert: int, delta: Tensor, gram: Tensor) -> Mapping[str, Matrix]:
        """An expert's u and v as they will be stored, on the device; delta: [out, in]; gram: [in, in]."""
        recipe, storing = self.job.plan.recipe.delta, self.storing
        if not self.job.cap(role):
            return {}
        if recipe.share_v:
            v = self._matrix(role, "shared_v", delta.shape[1])
            if not recipe.distinct_u:
                common = Common(v, self._load(role, "projector") if self._projects else None)
                (u,) = storing.store([self._own_u(common, delta, gram)], storing.seen(v, gram))
                return {"u": u, "v": v}
        place = int(self._load(role, "u_index")[expert])
        u = self._matrix(role, f"delta_u.{place}", self.job.cap(role))
        if recipe.share_v:
            return {"u": u, "v": v}
        if storing.packed:
            return {"u": u, "v": storing.store([fitted_v(delta, u.numbers)], gram)[0]}
        # The stored U carries its scale once; V carries its inverse.
        scale = self._load(role, f"scale.{place}")
        whole = (u.numbers.double() / scale.square()).T @ delta.double()
        return {"u": u, "v": storing.store([whole], None)[0]}

    @property
    def storing(self) -> Storing:
        """Errors are measured before rounding to few bits."""
        return replace(self.job.storing, bits=16) if self.measuring else self.job.storing

    @property
    def kept(self) -> tuple[str, ...]:
        """Which factors are an expert's own."""
        delta = self.job.plan.recipe.delta
        return tuple(kind for kind, shared in (("u", delta.distinct_u), ("v", delta.share_v)) if not shared)

    def _matrix(self, role: Role, kind: str, inputs: int) -> Matrix:
        parts = {name: self._load(role, name) for name in self.storing.names(kind)}
        return self.storing.open(parts, kind, inputs)

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
        assert common.projector is not None
        u = delta.double() @ common.projector
        return refitted_u(u, delta, gram, common.v.numbers) if self.storing.packed else u

    def _share_v(self, option: Option, role: Role) -> Common:
        """V as it is stored, rounded by what all experts read."""
        v, projector, gram = self._best_v(option, role)
        return Common(self.storing.store([v], gram)[0], projector if self._projects else None)

    def _best_v(self, option: Option, role: Role) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """V before it is rounded, float64 [rank, in]; the projector; and the summed second moment of what all experts
        read, by which V is rounded."""
        job = self.job
        size = job.plan.model.shape.projection(role)[1]
        gram, moment = (torch.zeros(size, size, dtype=torch.float64, device=job.routing.device) for _ in range(2))
        for expert, delta, own_gram in self._each(option, role, self._own(self._members)):
            gram.add_(own_gram, alpha=self._weight(expert, self._members))
            moment += input_moment(delta, torch.float64)
        job.work.group.sum([gram, moment])
        v, projector = shared_v(gram, moment, job.cap(role), len(self._members))
        return v, projector, gram

    def _merge_u(self, option: Option, roles: tuple[Role, ...], common: Mapping[Role, Common]) -> dict[str, Tensor]:
        clusters = self._clusters(option, roles, common)
        tensors: dict[str, Tensor] = {}
        for role in roles:
            tensors[f"{role}.u_index"] = clusters.joined
            for number in range(len(clusters.seeds)):
                members = clusters.members(number)
                u, scale = self._common_u(option, role, members, common)
                tensors |= u.named(f"{role}.delta_u.{number}")
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
                    v = common[role].v.numbers if common else u.T @ delta.double()
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
    ) -> tuple[Matrix, Tensor | None]:
        """A cluster's U as it is stored, and the scale that it carries for its V's (None with a shared V, and where it
        is rounded)."""
        job, storing = self.job, self.storing
        if common:
            u = self._shared_u(option, role, members, common[role])
            return storing.store([u], self._seen(option, role, members, common[role].v))[0], None
        rows = job.plan.model.shape.projection(role)[0]
        moment = torch.zeros(rows, rows, dtype=torch.float64, device=job.routing.device)
        for expert, delta, gram in self._each(option, role, self._own(members)):
            moment.add_(output_moment(delta, gram, torch.float64), alpha=self._weight(expert, members))
        job.work.group.sum([moment])
        u = merged_u(moment, job.cap(role))
        if storing.packed:
            return storing.store([u], u.T @ moment @ u)[0], None
        squares = torch.zeros(u.shape[1], dtype=torch.float64, device=u.device)
        for expert in self._own(members):
            squares += (u.T @ job.delta(option, role, job.weights(expert)[role]).double()).square().sum(dim=1)
        job.work.group.sum([squares])
        # As in single factors, U's columns and V's rows get the same norm, here in the mean over members.
        scale = (squares / len(members)).sqrt().sqrt()
        scale = torch.where(scale > 0, scale, 1.0)
        return storing.store([u * scale], None)[0], scale

    def _seen(self, option: Option, role: Role, members: list[int], v: Matrix) -> Tensor | None:
        """The summed second moment of what a cluster's U reads beside a shared V; None where nothing is rounded."""
        if not self.storing.packed:
            return None
        size = self.job.cap(role)
        total = torch.zeros(size, size, dtype=torch.float64, device=self.job.routing.device)
        for expert, _, gram in self._each(option, role, self._own(members)):
            total.add_(self.storing.seen(v, gram), alpha=self._weight(expert, members))
        self.job.work.group.sum([total])
        return total

    def _shared_u(self, option: Option, role: Role, members: list[int], common: Common) -> Tensor:
        """A cluster's U beside a shared V, float64 [out, rank]; members: the experts in it, ascending."""
        # A layer's members are few and their U's small: every process takes the mean of all.
        each = self._each(option, role, members)
        return mean_u((self._own_u(common, delta, gram), int(self.job.tokens[e])) for e, delta, gram in each)
