"""Layers of whole deltas in few bits, with some of the channels, perhaps a base, under one price (METHODS 4)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from d2moe_vllm.format.kinds import Role, Stored, width
from offline.io.units import FLOAT32, FLOAT64
from offline.methods.layer import LayerJob, Progress
from offline.methods.priced import half_of, half_part, place_of, write_priced
from offline.methods.pricing import layer_costs, measure_priced, ways
from offline.methods.storing import DAMPING, damped
from offline.plan.budget import Budget, Problem, Ranks
from offline.plan.plan import Layers, LayerWork, Plan
from offline.plan.priced_work import measuring_work, rounding_phases, writing_work
from offline.plan.pricing import saves_nothing, solve_priced, typical_costs
from offline.plan.rates import Work
from offline.work.workdir import WorkDir


class PricedLayers(Layers):
    parts: ClassVar[int] = 2

    def first(self, problem: Problem) -> tuple[Budget, Ranks]:
        """What layers of typical costs would choose."""
        budget = solve_priced(problem, typical_costs(problem)).budget
        return budget, budget.ranks

    def settle(self, plan: Plan, work: WorkDir) -> Plan:
        shape = plan.model.shape
        costs = {layer: layer_costs(plan.recipe, work, layer, shape.num_experts) for layer in shape.layers}
        found = solve_priced(plan.problem, costs)
        return replace(plan, budget=found.budget, chosen=found.chosen, final=True)

    def saves_nothing(self, plan: Plan) -> bool:
        return saves_nothing(plan.problem, plan.budget)

    def measure(self, job: LayerJob, plan: Plan, progress: Progress) -> None:
        measure_priced(job, progress.begin("measure", "merge", "measure"))

    def write(self, job: LayerJob, plan: Plan, progress: Progress) -> None:
        merge = ("merge",) if plan.needs_fisher else ()
        write_priced(job, plan.chosen[job.number], progress.begin("write", "write", *merge))

    def place(self, plan: Plan, layer: int, one: Stored) -> tuple[str, str] | None:
        return place_of(plan.config.layers[layer], one)

    def figures_part(self, expert: int, role: Role) -> str:
        return half_part(expert, half_of(role))

    def report(self, plan: Plan, work: WorkDir, layer: int) -> dict[str, Any]:
        """Where a factorization took more damping than usual: by projection, the experts and how much."""
        found: dict[str, dict[str, float]] = {}
        config, entry = plan.config, plan.config.layers[layer]
        for role in config.roles:
            key = f"{role}.dense{DAMPING}"
            for expert in range(config.num_experts if entry[role].delta_storage is not None else 0):
                if not width(entry, expert, config.intermediate_size):
                    continue
                taken = damped(work.load_part(layer, half_part(expert, half_of(role)), key))
                if taken is not None:
                    found.setdefault(role, {})[str(expert)] = round(taken, 6)
        return {"damping": found} if found else {}

    def phases(self, plan: Plan) -> Mapping[str, int]:
        return rounding_phases(plan)

    def work(self, plan: Plan) -> LayerWork:
        return LayerWork(Work(), measuring_work(plan), writing_work(plan))

    def measured_bytes(self, plan: Plan) -> int:
        return FLOAT64 * (3 * plan.model.shape.intermediate_size + 2 * len(ways(plan.recipe)))

    def waiting_bytes(self, plan: Plan) -> tuple[int, int]:
        shape = plan.model.shape
        hidden, middle = shape.hidden_size, shape.intermediate_size
        inputs, middles = hidden**2 * plan.keeps("input"), middle**2 * plan.keeps("middle")
        # Where bases are written Grams of gate and up's inputs, then what down reads and has to give.
        write = max(inputs, middles + hidden * middle * plan.keeps("middle")) if plan.has_bases else 0
        each = FLOAT32 * shape.num_experts
        return each * (inputs + middles), each * write

    def made(self, plan: Plan) -> str:
        return (
            "per MoE layer whole experts, or their deltas from one shared base, in few bits and without the channels "
            "that cost least."
        )

    def recipe_line(self, plan: Plan) -> str:
        return f", bits {plan.recipe.bits}, one price over bits, channels and base"
