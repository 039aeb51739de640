"""What a compression will give and cost, before any work is done."""

from __future__ import annotations

from typing import Any, NamedTuple

from d2moe_vllm.format.config import CheckpointConfig, Pruning, Source, swiglu_of
from d2moe_vllm.format.words import describe
from offline.errors import InputError, UnreachableError
from offline.io.shards import SHARD_BYTES
from offline.methods import METHODS
from offline.methods.settings import ENOUGH_ROWS
from offline.plan.budget import Budget, Problem, Ranks
from offline.plan.disk import work_bytes
from offline.plan.duration import Estimate
from offline.plan.factored import FactoredLayers
from offline.plan.plan import Layers, Plan
from offline.plan.priced import PricedLayers
from offline.plan.recipe import Recipe
from offline.plan.resources import check_resources, keeping_states, peak_memory, phases
from offline.plan.selection import first_selection
from offline.source.dense import DenseModel


def make_plan(
    model: DenseModel,
    recipe: Recipe,
    *,
    memory: int | None = None,
    processes: int = 1,
    allow_larger: bool = False,
    device: str = "cpu",
    shard_bytes: int = SHARD_BYTES,
    first: First | None = None,
) -> Plan:
    """Decide ranks, columns and how much is in memory at once.

    memory: bytes that all processes of this machine may hold together, None for all it has; processes: on this
    machine; allow_larger: a result no smaller than the source is what the user wants (a quantized original, under
    the paper's accounting); device: torch's type of it; first: `first_budget` of the same, where it is there already.
    Raises InputError where the ratio cannot be reached, the memory does not suffice, or the device lacks the products.
    """
    first = first or first_budget(model, recipe, shard_bytes)
    budget, recipe = first.budget, first.problem.recipe
    if budget.nbytes >= model.reader.nbytes and not allow_larger:
        widened = f" (its {model.stored_as} are read as {model.dtype})" if model.stored_as else ""
        raise InputError(
            f"ratio {recipe.ratio:g} would not make the model smaller: {budget.nbytes:,} bytes instead of "
            f"{model.reader.nbytes:,}{widened}; choose a higher ratio, or add --allow-larger"
        )
    plan = Plan(model, recipe, first.problem, budget, first.caps, first.layers)
    return check_resources(plan, memory, processes, device)


class First(NamedTuple):
    """What is known before calibration; problem: with the recipe as the model decides it."""

    problem: Problem
    layers: Layers
    budget: Budget
    caps: Ranks


def first_budget(model: DenseModel, recipe: Recipe, shard_bytes: int = SHARD_BYTES) -> First:
    """The files of a recipe for a model. Raises InputError, and UnreachableError where the ratio cannot be reached."""
    recipe = recipe.resolve(model.shape, model.max_positions)
    base, shape = recipe.base, model.shape
    for role in shape.roles:
        if shape.projection(role)[1] % base.groups:
            sizes = [shape.projection(role)[1] for role in shape.roles]
            works = max(n for n in range(1, base.groups) if not any(size % n for size in sizes))
            raise InputError(
                f"base.groups {base.groups} does not divide {role}'s {shape.projection(role)[1]} inputs, and {works} "
                f"does; give a recipe with `base: {{groups: {works}}}` by --recipe"
            )
    _check_counts(recipe, shape.num_experts)
    if "gate" not in shape.roles and (why := METHODS[recipe.method].needs_gate):
        raise InputError(
            f"method {recipe.method} {why}, and the experts of {model.family.model_type} have no gate; "
            "use another --method"
        )
    problem = _problem(model, recipe, shard_bytes)
    if choice := problem.method.choice:
        problem = first_selection(problem, model, choice)
    layers: Layers = PricedLayers() if recipe.priced else FactoredLayers()
    try:
        budget, caps = layers.first(problem)
    except UnreachableError as error:
        if not model.stored_as:
            raise
        told = str(error).partition(";")[0]
        raise UnreachableError(
            f"{told}, as the source's {model.stored_as} are read as {model.dtype}; choose a lower ratio, fewer --bits, "
            "or give the model that was quantized",
            error.most,
        ) from None
    return First(problem, layers, budget, caps)


def _check_counts(recipe: Recipe, experts: int) -> None:
    delta = recipe.delta
    if delta.trim >= experts:
        raise InputError(f"delta.trim {delta.trim} leaves none of {experts} experts a delta; choose a smaller number")
    if delta.distinct_u > experts - delta.trim:
        raise InputError(
            f"delta.distinct_u {delta.distinct_u} exceeds the {experts - delta.trim} experts that have deltas"
        )
    METHODS[recipe.method].check(recipe, experts)


def _problem(model: DenseModel, recipe: Recipe, shard_bytes: int) -> Problem:
    shape = model.shape
    draft = CheckpointConfig.model_construct(
        method=recipe.method,
        family=model.family.model_type,
        family_row=model.family.row,
        experts=model.family.experts,
        projections=dict(model.family.projections),
        num_experts=shape.num_experts,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        dtype=model.dtype,
        pruning=Pruning(scope=recipe.scope, groups=recipe.base.groups),
        swiglu=swiglu_of(model.family.swiglu),
        layers={},
        source=Source(
            name=model.name, revision=model.revision, parameters=model.reader.parameters, bytes=model.reader.nbytes
        ),
    )
    trimmed = dict.fromkeys(shape.layers, tuple(range(recipe.delta.trim)))
    return Problem(draft, shape, model.other_tensors, recipe, trimmed, shard_bytes)


def summary(plan: Plan, seconds: Estimate) -> dict[str, Any]:
    """What `plan --json` prints; seconds: `duration.estimate_seconds`, which takes a measurement."""
    source, shape, config = plan.config.source, plan.model.shape, plan.config
    first = config.layers[min(config.layers)]
    return {
        "source": {"name": source.name, "parameters": source.parameters, "bytes": source.bytes},
        "result": {
            "parameters": plan.budget.parameters,
            "bytes": plan.budget.nbytes,
            "stored_ratio": plan.budget.stored_ratio,
            "expert_ratio": 1 - config.expert_numbers / (config.layer_numbers * len(config.layers)),
            "expert_bytes": config.expert_bytes,
            "dense_expert_bytes": config.layer_bytes * len(config.layers),
            "files": len(plan.budget.shards),
            "layers": len(config.layers),
            "dense_layers": len(shape.layers) - len(config.layers),
            "final": plan.settled,
            "stores": describe(config),
            "saves_nothing": plan.layers.saves_nothing(plan),
        },
        "left_out": plan.model.left_out,
        "notes": plan.model.remarks,
        "kept_share_of_deltas": {role: plan.budget.kept_share[role] for role in plan.config.roles},
        "first_layer": first.model_dump(mode="json"),
        "intermediate_size": shape.intermediate_size,
        "calibration": {
            "windows": plan.windows[0],
            "seq_len": plan.windows[1],
            "rows_for_each_input": round(shape.rows_for_each_input(plan.tokens), 2),
            "enough_rows": ENOUGH_ROWS,
        },
        "peak_memory_bytes": peak_memory(plan),
        "memory_phases": phases(plan),
        "tokens_at_once": plan.resources.batch_tokens,
        "rows_at_once": plan.resources.rows,
        "products": plan.resources.products,
        "disk_bytes": {
            "work": work_bytes(plan),
            "least_work": work_bytes(keeping_states(plan, 0)),
            "result": plan.budget.nbytes,
        },
        "estimated_seconds": round(seconds.most, 1),
        "least_seconds": round(seconds.least, 1),
        "recipe": plan.recipe.to_json(),
    }
