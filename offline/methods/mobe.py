"""MoBE's factors of one layer (METHODS 3): gate and up mixed from bases, down as it is.

The algebra is in mixing.py; this is its order of work over experts. A part `fit-<role>` holds a projection's bases and
alphas as they will be stored, and how the fit went; an expert's own part its A and its alphas.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from d2moe_vllm.format.config import Role
from offline.algebra.factorization import input_moment, whitened_energy
from offline.algebra.mixing import Fit, Target, add_gradient, clusters, fit, mix, start
from offline.algebra.sharing import fitted_u, shared_v
from offline.errors import InputError
from offline.methods.layer import LayerJob
from offline.plan.budget import Option
from offline.source.sites import SELECTIONS

ROLES: tuple[Role, ...] = SELECTIONS["input"]
ENDED = ("converged", "max_steps", "diverged")


def fit_part(role: Role) -> str:
    return f"fit-{role}"


@dataclass
class MixedFactors:
    """The bases of one layer. Every process has its own experts; gradients are summed over all."""

    job: LayerJob
    share: ClassVar[float] = 0.9
    kept: ClassVar[tuple[str, ...]] = ("u", "alpha")
    _counts: dict[int, float] = field(default_factory=dict)
    _energies: dict[tuple[int, Role], float] = field(default_factory=dict)
    _grams: dict[int, Tensor] = field(default_factory=dict)
    _weights: dict[tuple[int, Role], Tensor] = field(default_factory=dict)

    def write(self, advance: Callable[[float], None]) -> None:
        """Writes the parts `fit-gate` and `fit-up`."""
        job = self.job
        for role in ROLES:
            if job.work.has_part(job.number, fit_part(role)):
                advance(1 / len(ROLES))
                continue
            found = self._fit(role, lambda share: advance(share / len(ROLES)))
            if job.work.group.first:
                dtype = job.plan.torch_dtype
                log = [found.start, found.end, found.steps, found.halvings, ENDED.index(found.ended)]
                tensors = {"bases": found.bases.to(dtype), "alpha": found.logits.softmax(dim=1).to(dtype)}
                tensors["log"] = torch.tensor(log, dtype=torch.float64)
                job.save(fit_part(role), {name: tensor.cpu() for name, tensor in tensors.items()})
            job.work.group.barrier()
        for held in (self._counts, self._energies, self._grams, self._weights):
            held.clear()

    def factors(self, option: Option, role: Role, expert: int, delta: Tensor, gram: Tensor) -> dict[str, Tensor]:
        """u is A, the best for the rounded bases and alphas; v what these mix to, which is not stored."""
        job = self.job
        part = job.work.load_part(job.number, fit_part(role), "bases", "alpha")
        alpha = part["alpha"][expert]
        device = delta.device
        v = mix(part["bases"].to(device).float(), alpha.to(device).float(), job.plan.recipe.mobe.function)
        metric = gram if self._weighted else torch.eye(len(gram), device=device)
        return {"u": fitted_u(delta, metric, v).to(job.plan.torch_dtype), "v": v, "alpha": alpha}

    @property
    def _weighted(self) -> bool:
        return self.job.plan.recipe.mobe.weighting != "none"

    def _fit(self, role: Role, advance: Callable[[float], None]) -> Fit:
        job, settings = self.job, self.job.plan.recipe.mobe
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
        job, weighting = self.job, self.job.plan.recipe.mobe.weighting
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
        size, rank = job.plan.model.shape.hidden_size, job.plan.cap(job.number, role)
        own, found = set(job.own), []
        for members in clusters(job.experts, int(job.plan.recipe.mobe.bases)):
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
            if job.plan.resources.hold_layer:
                self._weights[expert, role] = found
        return found.float()
