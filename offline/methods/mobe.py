"""MoBE (METHODS 3): gate and up mixed from bases, down as it is.

The algebra is in mixing.py; this is its order of work over experts, and what it declares. A part `fit-<role>` holds a
projection's bases and alphas as they will be stored, and how the fit went; an expert's own part its A and its alphas.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from d2moe_vllm.format.config import Function, Projection
from d2moe_vllm.format.kinds import Role, Stored
from offline.algebra.factorization import input_moment, whitened_energy
from offline.algebra.mixing import Fit, Target, add_gradient, clusters, fit, mix, start
from offline.algebra.sharing import fitted_u, shared_v
from offline.errors import InputError
from offline.methods.base import WITHOUT_BASE, Asked, Method
from offline.methods.factors import Factors
from offline.methods.layer import LayerJob, Plan, expert_part
from offline.methods.options import Option
from offline.methods.settings import Section, Settings
from offline.methods.storing import Matrix, storage_of
from offline.source.families import MoEShape
from offline.source.sites import SELECTIONS
from offline.work.workdir import WorkDir

ROLES: tuple[Role, ...] = SELECTIONS["input"]
ENDED = ("converged", "max_steps", "diverged")
FLOAT32, FLOAT64 = 4, 8


class MoBE(Section):
    """MoBE (METHODS 3). bases: matrices per layer and projection that experts mix from; `auto` is a quarter of the
    experts, at least two. groups: experts mix from the bases of their own group only, of so many. weighting: what the
    error is measured by: each expert's `own` second moment of inputs, one `pooled` over all experts, or `none`.

    learning_rate: Adam's, relative to the size of what it changes. A fit ends after max_steps, or where `window` steps
    lowered the squared error by less than this `tolerance`, relative.
    """

    bases: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    function: Function = "silu"
    groups: int = Field(default=1, ge=1)
    weighting: Literal["own", "pooled", "none"] = "own"
    learning_rate: float = Field(default=0.07, gt=0)
    max_steps: int = Field(default=400, ge=0)
    window: int = Field(default=25, ge=1)
    tolerance: float = Field(default=1e-3, ge=0)


def fit_part(role: Role) -> str:
    return f"fit-{role}"


@dataclass
class MixedFactors:
    """The bases of one layer. Every process has its own experts; gradients are summed over all."""

    job: LayerJob
    share: ClassVar[float] = 0.9
    kept: ClassVar[tuple[str, ...]] = ("u", "alpha", "dense")
    _counts: dict[int, float] = field(default_factory=dict)
    _energies: dict[tuple[int, Role], float] = field(default_factory=dict)
    _grams: dict[int, Tensor] = field(default_factory=dict)
    _weights: dict[tuple[int, Role], Tensor] = field(default_factory=dict)

    def measure(self, advance: Callable[[float], None]) -> None:
        """Ranks are uniform: never asked for."""
        raise NotImplementedError

    def write(self, advance: Callable[[float], None]) -> None:
        """Writes the parts `fit-gate` and `fit-up`."""
        job = self.job
        for role in ROLES:
            if job.work.has_part(job.number, fit_part(role)):
                advance(1 / len(ROLES))
                continue
            found = self._fit(role, lambda share: advance(share / len(ROLES)))
            alpha = found.logits.softmax(dim=1).to(job.plan.torch_dtype)
            bases = self._stored_bases(found.bases, alpha)
            if job.work.group.first:
                log = [found.start, found.end, found.steps, found.halvings, ENDED.index(found.ended)]
                tensors = {**bases.named("bases"), "alpha": alpha, "log": torch.tensor(log, dtype=torch.float64)}
                job.save(fit_part(role), {name: tensor.cpu() for name, tensor in tensors.items()})
            job.work.group.barrier()
        for held in (self._counts, self._energies, self._grams, self._weights):
            held.clear()

    def factors(self, option: Option, role: Role, expert: int, delta: Tensor, gram: Tensor) -> dict[str, Matrix]:
        """u is A, the best for the rounded bases and alphas, and rounded by what it reads; v what these mix to, which
        is not stored. down is rounded as a whole, by what it reads, whatever the fit is weighted by."""
        job, storing = self.job, self.job.storing
        if role not in ROLES:
            return {"dense": storing.store([delta], gram)[0]}
        names = storing.names("bases")
        part = job.work.load_part(job.number, fit_part(role), *names, "alpha")
        alpha = part["alpha"][expert]
        device = delta.device
        bases = storing.open({name: part[name].to(device) for name in names}, "bases", delta.shape[1]).numbers
        v = Matrix({"": mix(bases, alpha.to(device).float(), job.plan.recipe.own(MoBE).function)})
        metric = gram if self._weighted else torch.eye(len(gram), device=device)
        (u,) = storing.store([fitted_u(delta, metric, v.numbers)], storing.seen(v, metric))
        return {"u": u, "v": v, "alpha": Matrix({"": alpha})}

    def _stored_bases(self, bases: Tensor, alpha: Tensor) -> Matrix:
        """bases: float32 [m, r, in]; alpha: [experts, m], as stored.

        Rounded, an error of basis j reaches expert i's V as alpha_ij times it, to first order and with one slope of the
        function for all numbers, which near zero it has. So what basis j reads has the second moment
        sum_i tokens_i alpha_ij² G_i. With weighting `none` there is no moment: to nearest.
        """
        job, storing = self.job, self.job.storing
        if not storing.packed:
            return storing.store([bases], None)[0]
        rounded: list[Matrix] = []
        for basis, shares in zip(bases, alpha.float().square().unbind(dim=1), strict=True):
            moment = None
            if self._weighted:
                moment = torch.zeros(bases.shape[2], bases.shape[2], dtype=torch.float64, device=bases.device)
                for expert in job.own:
                    moment.add_(self._grams[expert], alpha=self._counts[expert] * float(shares[expert]))
                job.work.group.sum([moment])
            rounded += storing.store([basis], moment)
        parts = {name: torch.stack([one.parts[name] for one in rounded]) for name in rounded[0].parts}
        return Matrix(parts, rounded[0].how, rounded[0].inputs)

    @property
    def _weighted(self) -> bool:
        return self.job.plan.recipe.own(MoBE).weighting != "none"

    def _fit(self, role: Role, advance: Callable[[float], None]) -> Fit:
        job, settings = self.job, self.job.plan.recipe.own(MoBE)
        if not self._counts:
            self._prepare()
        bases, logits = start(self._vs(role), job.experts, settings.function, settings.groups)

        def step(bases: Tensor, logits: Tensor) -> tuple[float, list[Tensor]]:
            gradients = [torch.zeros_like(bases), torch.zeros_like(logits)]
            sums = torch.zeros(2, dtype=torch.float64)
            for expert in job.own:
                target = self._target(expert, role)
                error = add_gradient(bases, logits, target, settings.function, gradients)
                sums += target.count * torch.tensor([error, target.energy], dtype=torch.float64)
            job.work.group.sum([sums, *gradients])
            error, energy = sums.tolist()
            return error / (energy or 1.0), [gradient.div_(energy or 1.0) for gradient in gradients]

        found = fit(
            bases,
            logits,
            step,
            learning_rate=settings.learning_rate,
            max_steps=settings.max_steps,
            window=settings.window,
            tolerance=settings.tolerance,
            advance=advance,
        )
        if not math.isfinite(found.start):
            raise InputError(
                f"layer {job.number} {role}: the fit cannot start, its error is not finite; use another text, or "
                "mobe.weighting none"
            )
        return found

    def _prepare(self) -> None:
        """What experts count, and their second moments. Unweighted, an expert counts as any other."""
        job, weighting = self.job, self.job.plan.recipe.own(MoBE).weighting
        if weighting == "none":
            self._counts.update(dict.fromkeys(range(job.experts), 1.0))
            return
        # One that no token reached still has to come out as something.
        self._counts.update({expert: max(float(job.tokens[expert]), 1.0) for expert in range(job.experts)})
        size = job.plan.model.shape.hidden_size
        pooled = torch.zeros(size, size, device=job.routing.device)
        for expert in job.own:
            gram = job.shrunk_gram(expert, job.weights(expert), "input")
            if weighting == "own":
                self._grams[expert] = gram
            else:
                pooled.add_(gram, alpha=self._counts[expert])
        if weighting == "pooled":
            job.work.group.sum([pooled])
            pooled.div_(sum(self._counts.values()))
            self._grams.update(dict.fromkeys(job.own, pooled))

    def _vs(self, role: Role) -> Tensor:
        """float64 [m, r, in], of each starting cluster the V of the best factors with one V for all its experts."""
        job, device = self.job, self.job.routing.device
        size, rank = job.plan.model.shape.hidden_size, job.cap(role)
        own, found = set(job.own), []
        for members in clusters(job.experts, int(job.plan.recipe.own(MoBE).bases)):
            gram, moment = (torch.zeros(size, size, dtype=torch.float64, device=device) for _ in range(2))
            for expert in members:
                if expert in own:
                    metric = self._grams.get(expert)
                    gram += torch.eye(size, device=device) if metric is None else self._counts[expert] * metric
                    moment += input_moment(self._weight(expert, role), torch.float64)
            job.work.group.sum([gram, moment])
            found.append(shared_v(gram, moment, rank, len(members))[0])
        return torch.stack(found)

    def _target(self, expert: int, role: Role) -> Target:
        weight, gram = self._weight(expert, role), self._grams.get(expert)
        if (expert, role) not in self._energies:
            wide = whitened_energy(weight, gram) if gram is not None else float(weight.double().square().sum())
            self._energies[expert, role] = wide
        return Target(expert, weight, gram, self._energies[expert, role], self._counts[expert])

    def _weight(self, expert: int, role: Role) -> Tensor:
        """float32 [out, in]; kept as stored where the plan has room for a layer."""
        job = self.job
        if (found := self._weights.get((expert, role))) is None:
            found = job.plan.model.weight(job.number, expert, role).to(job.routing.device)
            if job.plan.hold_layer:
                self._weights[expert, role] = found
        return found.float()


class _Method(Method):
    def resolve(self, recipe: Asked, experts: int) -> Asked:
        settings = recipe.own(MoBE)
        if settings.bases != "auto":
            return recipe
        return recipe.model_copy(update={self.section: settings.model_copy(update={"bases": max(experts // 4, 2)})})

    def check(self, recipe: Settings, experts: int) -> None:
        settings = recipe.own(MoBE)
        bases, groups = int(settings.bases), settings.groups
        if bases > experts:
            raise InputError(f"mobe.bases {bases} exceeds the {experts} experts that mix from them; choose fewer")
        if bases % groups:
            raise InputError(f"mobe.groups {groups} does not divide mobe.bases {bases}; choose a divisor")

    def joint(self, recipe: Settings) -> bool:
        return True

    def projection(self, recipe: Settings, shape: MoEShape, role: Role, option: Option, rank: int) -> Projection:
        storage = storage_of(int(recipe.bits), recipe.group_size)
        if role not in ROLES:
            return Projection(delta="dense", delta_storage=storage, bias=shape.biased)
        settings = recipe.own(MoBE)
        return Projection(
            rank=rank,
            delta="bases",
            delta_storage=storage,
            bases=int(settings.bases),
            function=settings.function,
            bias=shape.biased,
        )

    def phases(self, plan: Plan) -> dict[str, int]:
        """Bases with gradients and Adam's moments, the best so far, second moments of inputs, one expert at work."""
        shape, settings, rank = plan.model.shape, plan.recipe.own(MoBE), max(plan.caps.values())
        hidden, matrix = shape.hidden_size, shape.hidden_size * shape.intermediate_size
        own = -(-shape.num_experts // plan.processes)
        bases = FLOAT32 * (8 * int(settings.bases) + 8) * rank * hidden
        starting = FLOAT64 * (3 * int(settings.bases) * rank * hidden + 6 * hidden**2)
        grams = FLOAT32 * hidden**2 * {"own": own, "pooled": 1, "none": 0}[settings.weighting]
        held = 2 * own * matrix * plan.torch_dtype.itemsize if plan.hold_layer else 0
        working = FLOAT32 * 5 * matrix + FLOAT64 * (5 * rank**2 + 2 * rank * shape.intermediate_size)
        return {"fit": max(bases, starting) + grams + held + working}

    def operations(self, plan: Plan) -> float:
        """Steps over gate and up, where none ends early."""
        shape, settings, rank = plan.model.shape, plan.recipe.own(MoBE), max(plan.caps.values())
        hidden, middle = shape.hidden_size, shape.intermediate_size
        grams = 0 if settings.weighting == "none" else 2 * rank * hidden**2 + middle * hidden**2
        small = rank**2 * (3 * hidden + 2 * middle + rank)
        each = 2 * (2 * rank * hidden * middle + grams + small + 4 * int(settings.bases) * rank * hidden)
        return 2.0 * settings.max_steps * shape.num_experts * each

    def factors(self, job: LayerJob) -> Factors:
        return MixedFactors(job)

    def place(self, stored: Projection, one: Stored) -> tuple[str, str] | None:
        if one.kind.name == "bases":
            return fit_part(one.role), one.name
        if one.kind.name == "a":
            return expert_part(one.expert), f"{one.role}.u{one.name.removeprefix('a')}"
        return super().place(stored, one)

    def report(self, work: WorkDir, layer: int) -> dict[str, Any]:
        """How the fits went; errors are relative, before rounding, over all experts together."""
        fits = {}
        for role in ROLES:
            start, end, steps, halvings, ended = work.load_part(layer, fit_part(role), "log")["log"].tolist()
            fits[role] = {
                "start_error": start**0.5,
                "error": end**0.5,
                "steps": int(steps),
                "learning_rate_halved": int(halvings),
                "ended": ENDED[int(ended)],
            }
        return {"fit": fits}


MOBE = _Method(
    name="mobe",
    title="MoBE",
    made="every expert's gate and up are a product of a factor of its own and one that is mixed from bases which all "
    "experts of the layer share (MoBE, arXiv 2508.05257); down is {down}.",
    settings=MoBE,
    needs_gate="mixes gate and up from bases",
    fixed={**WITHOUT_BASE, "delta": {**WITHOUT_BASE["delta"], "share_v": False, "distinct_u": 0}},
    hint=", fewer mobe.bases or another method: MoBE leaves `down` whole",
)
