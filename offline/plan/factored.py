"""Layers of low-rank factors beside a base, or of what else a method stores by ranks (METHODS 1 to 3)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from d2moe_vllm.format.kinds import Role, Stored, roles_of
from offline.errors import InputError
from offline.io.units import FLOAT64
from offline.methods.bases import MERGED_PART, hold_bases, merge_experts, write_base
from offline.methods.layer import BASE_PART, LayerJob, Progress, expert_part
from offline.methods.options import Option
from offline.methods.storing import DAMPING, damped
from offline.methods.writing import write_experts
from offline.plan.allocation import solve_adaptive
from offline.plan.budget import Budget, Problem, Ranks, solve_paper, solve_stored
from offline.plan.factored_work import factoring_phases, factoring_work
from offline.plan.plan import Layers, LayerWork, Plan
from offline.plan.settling import error_curves, trimmed_experts
from offline.work.workdir import WorkDir


class FactoredLayers(Layers):
    parts: ClassVar[int] = 1

    def first(self, problem: Problem) -> tuple[Budget, Ranks]:
        ratio = problem.recipe.ratio
        budget = solve_paper(problem, ratio) if problem.recipe.accounting == "paper" else _uniform(problem, ratio)
        return budget, _caps(problem, budget)

    def settle(self, plan: Plan, work: WorkDir) -> Plan:
        layers, ratio = plan.model.shape.layers, plan.recipe.ratio
        problem = replace(plan.problem, trimmed={layer: trimmed_experts(work, layer) for layer in layers})
        if plan.measures:
            budget = solve_adaptive(problem, ratio, error_curves(plan, work))
        elif plan.recipe.accounting == "paper":
            budget = solve_paper(problem, ratio)
        else:
            budget = solve_stored(problem, ratio)
        return replace(plan, problem=problem, budget=budget, caps=budget.ranks, final=True)

    def saves_nothing(self, plan: Plan) -> bool:
        """Few bits at full ranks, by over half a point."""
        smaller = plan.budget.stored_ratio > plan.recipe.ratio + 0.005
        return smaller and plan.recipe.bits != 16 and plan.problem.full(plan.budget)

    def measure(self, job: LayerJob, plan: Plan, progress: Progress) -> None:
        """The error at every rank with every kind of base; where only trimmed experts wait, nothing."""
        if plan.measures:
            hold_bases(job, merge_experts(job, progress.begin("merge", "merge")))
            plan.method.factors(job).measure(progress.begin("measure", "measure"))

    def write(self, job: LayerJob, plan: Plan, progress: Progress) -> None:
        if any(option != "none" for (option,) in job.options.values()):
            self._write_base(job, plan, progress)
        write_experts(job, progress.begin("write", "write"))

    def _write_base(self, job: LayerJob, plan: Plan, progress: Progress) -> None:
        """Where an earlier run has not written it."""
        found = job.work.has_part(job.number, BASE_PART)
        job.work.group.barrier()  # before it is written: all see the same
        if plan.merges_apart and not found:
            merged = job.work.load_part(job.number, MERGED_PART)
            write_base(job, {role: merged[role].to(job.routing.device) for role in roles_of(merged)})
        elif not found:
            write_base(job, merge_experts(job, progress.begin("merge", "merge")))
        elif not plan.merges_apart:
            progress.skip("merge")

    def place(self, plan: Plan, layer: int, one: Stored) -> tuple[str, str] | None:
        return plan.method.place(plan.config.layers[layer][one.role], one)

    def figures_part(self, expert: int, role: Role) -> str:
        return expert_part(expert)

    def report(self, plan: Plan, work: WorkDir, layer: int) -> dict[str, Any]:
        """Beside the method's own, where a factorization took more damping than usual: by projection, what of an
        expert's own, or of what all share, and how much."""
        found: dict[str, dict[str, float]] = {}
        for one in plan.config.stored(layer).values():
            place = self.place(plan, layer, one)
            if place is None or one.is_scales or one.kind.packed(plan.config.layers[layer][one.role]) is None:
                continue
            part, key = place[0], place[1] + DAMPING
            taken = damped(work.load_part(layer, part, key))
            if taken is not None:
                mine = found.setdefault(one.role, {})
                mine[str(one.expert)] = max(mine.get(str(one.expert), 0.0), round(taken, 6))
        return plan.method.report(work, layer) | ({"damping": found} if found else {})

    def phases(self, plan: Plan) -> Mapping[str, int]:
        return factoring_phases(plan)

    def work(self, plan: Plan) -> LayerWork:
        return factoring_work(plan)

    def measured_bytes(self, plan: Plan) -> int:
        multiple, first = plan.problem.rank_multiple, plan.problem.shape.layers[0]
        steps = sum(-(-plan.caps[first, role] // multiple) + 2 for role in plan.config.roles)
        return FLOAT64 * steps * len(plan.problem.options)

    def made(self, plan: Plan) -> str:
        layers = len(plan.model.shape.layers)
        down = "unchanged" if plan.recipe.bits == 16 else "whole"
        return plan.method.made.format(dense=layers - len(plan.config.layers), layers=layers, down=down)

    def recipe_line(self, plan: Plan) -> str:
        bits = "" if plan.recipe.bits == 16 else f", {plan.recipe.bits} bits"
        ranks = f", {plan.recipe.allocation} ranks, base {plan.recipe.base.kind}" if plan.method.has_base else ""
        return bits + ranks


def _uniform(problem: Problem, ratio: float) -> Budget:
    """The uniform allocation; where the kind of base is left open, with the first kind that fits."""
    preferred = [option for option in ("pruned", "svd", "none") if option in problem.options]
    for option in preferred[:-1]:
        try:
            return solve_stored(problem, ratio, option)
        except InputError:
            continue
    return solve_stored(problem, ratio, preferred[-1])


def _caps(problem: Problem, budget: Budget) -> dict[tuple[int, Role], int]:
    ranks = {
        (layer, role): budget.config.layers[layer][role].rank
        for layer in problem.shape.layers
        for role in budget.config.roles
    }
    recipe, multiple = problem.recipe, problem.rank_multiple
    if recipe.allocation == "uniform":
        # Which experts are trimmed changes the length of names, and that may be worth one more rank.
        more = multiple if recipe.delta.trim or problem.method.choice else 0
        return {key: min(rank + more, problem.limit(key[1])) for key, rank in ranks.items()}
    smallest: Option = "none" if "none" in problem.options else problem.options[0]
    richest = solve_stored(problem, recipe.ratio, smallest)
    most = {
        role: max(richest.config.layers[layer][role].rank for layer in problem.shape.layers)
        for role in problem.shape.roles
    }
    # Twice the uniform rank leaves the budget room to move, and bounds what is measured.
    return {
        (layer, role): min(math.ceil(2 * most[role] / multiple) * multiple, problem.limit(role))
        for layer, role in ranks
    }
