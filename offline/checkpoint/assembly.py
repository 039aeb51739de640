"""Parts in the working folder -> the checkpoint's tensors: ranks are settled here, and factors cut to them.

Factors are nested: the first r columns of U and rows of V are the best answer of rank r, so what was computed at
the largest rank serves every smaller one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from d2moe_vllm.format.kinds import ROLES, Role, Stored
from offline.io.shards import TORCH_DTYPES
from offline.methods.options import Option
from offline.methods.selection import sensitivities
from offline.plan.allocation import Curves, solve_adaptive
from offline.plan.budget import Budget, solve_paper, solve_stored
from offline.plan.plan import Plan
from offline.plan.selection import settle_layers
from offline.source.sites import SITES
from offline.work.workdir import WorkDir


def settle(plan: Plan, work: WorkDir) -> Budget:
    """The final budget: of the plan, or solved again now that errors and trimmed experts are known."""
    if plan.settled:
        return plan.budget
    if plan.selects:
        return settle_layers(plan, work).budget
    problem = replace(plan.problem, trimmed={layer: trimmed_experts(work, layer) for layer in plan.model.shape.layers})
    if plan.recipe.allocation == "adaptive":
        return solve_adaptive(problem, plan.recipe.ratio, error_curves(plan, work))
    if plan.recipe.accounting == "paper":
        return solve_paper(problem, plan.recipe.ratio)
    return solve_stored(problem, plan.recipe.ratio)


SATURATED = 0.99
"""Share of an output's energy from which on more error costs in proportion only."""


def error_curves(plan: Plan, work: WorkDir) -> Curves:
    """What every projection's error costs at every rank (METHODS 1.4): per expert the mean squared error e of its
    outputs, weighted by what a unit of it costs in log-likelihood, over the share of the outputs' energy E that it
    leaves: s e / (1 - e / E). Small errors cost s e, the second-order estimate; that says too little about
    errors near the whole signal, which then meet in a product of gate and up."""
    curves: dict[tuple[int, Option, Role], Tensor] = {}
    for layer in plan.model.shape.layers:
        sensitivity = work.load_part(layer, "sensitivity")["sensitivity"]
        for expert in range(plan.model.shape.num_experts):
            part = work.load_part(layer, f"{expert:05d}", *_keys(plan, "curve"), *_keys(plan, "energy"))
            for option in plan.problem.options:
                for number, role in enumerate(ROLES):
                    curve, energy = part[f"{option}.{role}.curve"], part[f"{option}.{role}.energy"]
                    share = curve / energy.clamp(min=torch.finfo(torch.float64).tiny)
                    cost = sensitivity[number, expert] * curve / (1 - share.clamp(max=SATURATED))
                    key = (layer, option, role)
                    curves[key] = curves[key] + cost if key in curves else cost
    return curves


def _keys(plan: Plan, kind: str) -> list[str]:
    return [f"{option}.{role}.{kind}" for option in plan.problem.options for role in ROLES]


def trimmed_experts(work: WorkDir, layer: int) -> tuple[int, ...]:
    """The layer's experts that get no delta, known once it is calibrated."""
    return tuple(_facts(work, layer)["trimmed"].tolist())


def _facts(work: WorkDir, layer: int) -> dict[str, Tensor]:
    return work.load_part(layer, "facts")


class Assembly:
    """The expert tensors of a settled budget, cut from the parts when asked for."""

    def __init__(self, plan: Plan, budget: Budget, work: WorkDir) -> None:
        self.plan, self.budget, self.work = plan, budget, work
        self._origins: dict[str, tuple[int, Stored]] = {
            name: (layer, one) for layer in budget.config.layers for name, one in budget.config.stored(layer).items()
        }

    def __contains__(self, name: str) -> bool:
        return name in self._origins

    def tensor(self, name: str) -> Tensor:
        """One tensor of the checkpoint. Raises KeyError for a name that is no expert tensor."""
        layer, one = self._origins[name]
        return self._whole(layer, one).to(TORCH_DTYPES[one.spec.dtype]).contiguous()

    def _whole(self, layer: int, one: Stored) -> Tensor:
        """A tensor cut to its rank; factors are nested, columns lie best first."""
        option, stored = self.budget.choices[layer, SITES[one.role]], self.budget.config.layers[layer][one.role]
        if one.name == "dense":
            return self.plan.model.weight(layer, one.expert, one.role)
        part, key = self.plan.method.place(stored, one.name, one.expert, one.role, option)
        found = self._load(layer, part, key)
        if "columns" in one.kind.sizes:
            # The best ones, in ascending order.
            columns = self._load(layer, part, f"{option}.{one.role}.columns")[: stored.rank]
            order = columns.argsort()
            return (columns if one.name == "delta_columns" else found[:, : stored.rank])[..., order]
        return found.narrow(one.kind.sizes.index("rank"), 0, stored.rank) if "rank" in one.kind.sizes else found

    def _load(self, layer: int, part: str, key: str) -> Tensor:
        return self.work.load_part(layer, part, key)[key]

    def reports(self) -> dict[str, Any]:
        """What d2moe_stats.json tells, per layer."""
        return {str(layer): self._report(layer) for layer in self.budget.config.layers}

    def _report(self, layer: int) -> dict[str, Any]:
        """Routed tokens, kind of base, relative errors and sensitivity per expert."""
        config, work = self.budget.config, self.work
        multiple = self.plan.problem.rank_multiple
        errors: dict[str, list[float]] = {role: [] for role in ROLES}
        for expert in range(config.num_experts):
            for role in ROLES:
                key = f"{self.budget.choices[layer, SITES[role]]}.{role}"
                part = work.load_part(layer, f"{expert:05d}", f"{key}.curve", f"{key}.energy")
                curve, energy = part[f"{key}.curve"], float(part[f"{key}.energy"])
                step = min(-(-config.layers[layer][role].rank // multiple), len(curve) - 1)
                # Rounding can take a tiny error below zero.
                errors[role].append(max(float(curve[step]) / energy, 0.0) ** 0.5 if energy > 0 else 0.0)
        report: dict[str, Any] = {
            "tokens": _facts(work, layer)["tokens"].tolist(),
            "relative_error": errors,
            "base": {role: self.budget.choices[layer, SITES[role]] for role in ROLES},
        }
        report |= self.plan.method.report(work, layer)
        if work.has_part(layer, "sensitivity"):
            values = work.load_part(layer, "sensitivity")["sensitivity"].tolist()
            report["sensitivity"] = dict(zip(ROLES, values, strict=True))
        return report

    def selection(self) -> dict[str, Any] | None:
        """Every layer's sensitivity, where the layers that stay dense were chosen by it."""
        if not self.plan.selects:
            return None
        found = sensitivities(self.work, self.plan.model.shape.layers)
        dense = [layer for layer in found if layer not in self.budget.config.layers]
        return {"sensitivity": {str(layer): value for layer, value in found.items()}, "dense": dense}
