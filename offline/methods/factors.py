"""How a layer's experts become factors: what a method hands to the two sweeps, and each expert on its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from d2moe_vllm.format.kinds import Role
from offline.algebra.factorization import DELTAS, column_factors, whitened_curve, whitened_energy
from offline.methods.layer import LayerJob
from offline.methods.measuring import curve_of, curve_without, picked, save_curves
from offline.methods.options import Option
from offline.methods.storing import Matrix


class Factors(Protocol):
    """How one layer's experts are factored."""

    @property
    def share(self) -> float:
        """Of the work of the final factors, how much `write` does."""

    @property
    def kept(self) -> Sequence[str]:
        """Which of the factors are an expert's own, and go into its part."""

    def measure(self, advance: Callable[[float], None]) -> None:
        """Writes the parts `measured-<expert>` of this process's experts, for all kinds of base that there are to
        choose from, up to the caps; tells what share is done. Not asked for where the budget is settled."""

    def write(self, advance: Callable[[float], None]) -> None:
        """Writes what the experts share, before any expert's own factors are asked for; tells what share is done."""

    def factors(self, option: Option, role: Role, expert: int, delta: Tensor, gram: Tensor) -> Mapping[str, Matrix]:
        """An expert's final u and v (or ascending columns, or the matrix as a whole), and what else is kept, as stored,
        on the device; delta: float32 [out, in], from the settled base; gram: float32 [in, in]."""


@dataclass(frozen=True)
class OwnFactors:
    """Every expert on its own, by delta.method (METHODS 1.3)."""

    job: LayerJob
    share: ClassVar[float] = 0.0
    kept: ClassVar[Sequence[str]] = ("u", "v", "columns")

    def measure(self, advance: Callable[[float], None]) -> None:
        """An expert at a time: a killed run measures on with its next one."""
        for expert in self.job.own:
            if not self.job.is_measured(expert):
                self._measure(expert)
            advance(1 / len(self.job.own))

    def _measure(self, expert: int) -> None:
        job, found = self.job, {}
        weights = job.weights(expert)
        for site, roles in job.plan.model.shape.selections.items():
            gram = job.shrunk_gram(expert, weights, site)
            for role in roles:
                energy = whitened_energy(weights[role].float(), gram)
                found[f"{role}.energy"] = torch.tensor([energy], dtype=torch.float64)
                for option in job.options[site]:
                    delta = job.delta(option, role, weights[role])
                    curve = curve_without if expert in job.trimmed else self._curve
                    found[f"{option}.{role}.curve"] = curve(job, delta, gram, role)
        save_curves(job, expert, found)

    def _curve(self, job: LayerJob, delta: Tensor, gram: Tensor, role: Role) -> Tensor:
        """Of factors that are orthogonal where the error is measured from eigenvalues alone, else from factors."""
        recipe, cap = job.plan.recipe, job.cap(role)
        if recipe.delta.method == "whitened":
            return picked(job, role, whitened_curve(delta, gram, cap))
        if recipe.delta.method == "prune":
            u, columns = column_factors(delta, gram, cap, recipe.base.groups)
            best = best_first(u.norm(dim=0) * gram.diagonal()[columns.long()].sqrt(), recipe.base.groups)
            v = torch.zeros(cap, delta.shape[1], device=delta.device)
            v[torch.arange(cap), columns[best].long()] = 1.0
            return curve_of(job, delta, gram, role, u[:, best].to(job.plan.torch_dtype), v)
        u, v = DELTAS[recipe.delta.method](delta, gram, cap)
        return curve_of(job, delta, gram, role, u.to(job.plan.torch_dtype), v.to(job.plan.torch_dtype))

    def write(self, advance: Callable[[float], None]) -> None:
        """Nothing is shared."""

    def factors(self, option: Option, role: Role, expert: int, delta: Tensor, gram: Tensor) -> Mapping[str, Matrix]:
        recipe, storing, rank = self.job.plan.recipe, self.job.storing, self.job.cap(role)
        if not rank:
            return {}
        if recipe.delta.method == "prune":
            u, columns = column_factors(delta, gram, rank, recipe.base.groups)
            picked = columns.long()
            return {"u": storing.store([u], gram[picked][:, picked])[0], "columns": Matrix({"": columns})}
        u, v = DELTAS[recipe.delta.method](delta, gram, rank)
        left, right = storing.factors(delta, gram, u, v)
        return {"u": left, "v": right}


def best_first(scores: Tensor, groups: int) -> Tensor:
    """An order in which the first r of scored columns, r a multiple of groups, are the best r, evenly over groups.

    scores: [kept], the groups' columns one after the other.
    """
    ranked = scores.view(groups, -1).argsort(dim=1, descending=True, stable=True)
    starts = torch.arange(groups, device=scores.device).unsqueeze(1) * ranked.shape[1]
    return (ranked + starts).T.flatten()
