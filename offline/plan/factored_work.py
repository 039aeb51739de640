"""What measuring and writing low-rank factors take (METHODS 1): memory and operations, predicted from shapes."""

from __future__ import annotations

from collections.abc import Mapping

from d2moe_vllm.format.kinds import Role
from offline.io.units import FLOAT32, FLOAT64
from offline.plan.plan import LayerWork, Plan
from offline.plan.priced_work import gradients, moments, projecting, rounding
from offline.plan.rates import Work

MERGING = {"fisher": 9, "frequency": 6, "ties": 19}
"""float32 matrices that a merge holds for the three projections; the others hold three."""


def factoring_phases(plan: Plan) -> Mapping[str, int]:
    """Bytes at the worst moment of merging, measuring and writing, and of the method's own phases."""
    found = {}
    if plan.recipe.base.kind != "none" or plan.needs_gradient:
        found["merge"] = _merge_bytes(plan)
    if plan.measures:
        found["measure"] = _measure_bytes(plan)
    found["write"] = _write_bytes(plan)
    if plan.recipe.bits != 16 and plan.recipe.base.kind != "none":
        found["bases"] = _based_bytes(plan)
    return found | {name: size + plan.rows_bytes for name, size in plan.method.phases(plan).items()}


def factoring_work(plan: Plan) -> LayerWork:
    """Of merging a layer, measuring it and writing it."""
    shape = plan.model.shape
    hidden, middle = shape.hidden_size, shape.intermediate_size
    count = len(shape.roles)
    merging = Work(touched=10.0 * shape.num_experts * count * hidden * middle)
    merge = gradients(plan, count) if plan.needs_gradient else merging
    grams = moments(plan, "input") + moments(plan, "middle") + (count - 1) * projecting(plan)
    # Per projection an eigenproblem (a fifth of it without vectors) and the products around it, in float64.
    small, products = min(hidden, middle), 2 * 4 * hidden * middle * (hidden + middle)
    each = count * shape.num_experts
    final = each * Work(products=products, eigen=15 * small**3)
    values = plan.recipe.delta.method == "whitened" and not plan.method.joint(plan.recipe)
    curve = each * Work(products=products / 4, eigen=3 * small**3) if values else final
    measure = grams + len(plan.problem.options) * curve if plan.measures else Work()
    write = grams + final + Work(products=plan.method.operations(plan))
    if plan.recipe.bits == 16:
        return LayerWork(merge, measure, write)
    if based := sum(option != "none" for option in plan.problem.options):
        base = grams
        for role in shape.roles:
            base += rounding(*shape.projection(role))
        measure += based * base if plan.measures else Work()
        write += base
    for role in shape.roles:
        write += _rounded_work(plan, role)
    return LayerWork(merge, measure, write)


def _rounded_work(plan: Plan, role: Role) -> Work:
    """Of rounding one projection of a layer: V's, or what experts mix them from, U's fits to them, and U's; or whole
    matrices. At a third of the full ranks, whatever the budget settles: what is planned has to stay so."""
    rows, inputs = plan.model.shape.projection(role)
    experts, rank = plan.model.shape.num_experts, min(rows, inputs) // 3
    if plan.problem.whole(role):
        return experts * rounding(rows, inputs)
    stored = plan.problem.projection(role, plan.problem.options[0], plan.problem.rank_multiple)
    fit = Work(products=2 * 2 * rank * inputs * (inputs + rank + rows), factors=rank**3)
    rights = stored.bases or (1 if stored.shared_v else experts)
    return rights * rounding(rank, inputs) + experts * fit + (stored.distinct_u or experts) * rounding(rows, rank)


def _merge_bytes(plan: Plan) -> int:
    """One expert's weights and Fisher information, the merge's accumulators, and what adding one expert takes."""
    shape, base = plan.model.shape, plan.recipe.base
    hidden, middle = shape.hidden_size, shape.intermediate_size
    matrix = hidden * middle
    fisher = len(shape.roles) * FLOAT32 * matrix if plan.needs_gradient else 0
    merging = FLOAT32 * matrix * (MERGING.get(base.merge, 3) + 3) if base.kind != "none" else 0
    if base.merge == "regmean":  # sums in float64, a Gram matrix, and the solution of the largest
        large = max(hidden, middle)
        merging += FLOAT64 * (2 * hidden**2 + middle**2 + large**2 + 4 * matrix) + FLOAT32 * large**2
    own = shape.expert_parameters * plan.torch_dtype.itemsize
    return own + 2 * FLOAT32 * matrix + fisher + merging + plan.rows_bytes


def _expert_bytes(plan: Plan) -> int:
    """One expert's weights, a delta and its base, one site's Gram matrix, an eigenproblem; sums over experts where
    these share factors."""
    shape, width = plan.model.shape, plan.torch_dtype.itemsize
    hidden, middle = shape.hidden_size, shape.intermediate_size
    large = max(hidden, middle)
    grams = FLOAT32 * (middle**2 + max(middle**2 if hidden > middle else 0, hidden**2))
    eigen = FLOAT64 * 4 * min(hidden, middle) ** 2
    joint = FLOAT64 * 5 * large**2 if plan.method.joint(plan.recipe) else 0
    return shape.expert_parameters * (width + FLOAT32) + grams + eigen + joint + plan.rows_bytes


def _factor_bytes(plan: Plan) -> int:
    """One matrix's factors at the largest rank, and what their error takes."""
    shape, cap = plan.model.shape, max(plan.caps.values())
    hidden, middle = shape.hidden_size, shape.intermediate_size
    factors = (FLOAT64 + FLOAT32 + plan.torch_dtype.itemsize) * cap * (hidden + middle) + FLOAT64 * cap * middle
    return factors + FLOAT64 * (2 * hidden * middle + max(hidden, middle) * 1024)


def _measure_bytes(plan: Plan) -> int:
    """Beside an expert the layer's bases, rounded; where curves are no eigenvalues factors, and the shared ones of a
    selection."""
    shape, delta, width = plan.model.shape, plan.recipe.delta, plan.torch_dtype.itemsize
    hidden, middle = shape.hidden_size, shape.intermediate_size
    bases = shape.expert_parameters * width if plan.recipe.base.kind != "none" else 0
    if not plan.method.joint(plan.recipe):
        return _expert_bytes(plan) + bases + (0 if delta.method == "whitened" else _factor_bytes(plan))
    cap = max(plan.caps.values())
    shared = 2 * cap * ((FLOAT64 + width) * max(hidden, middle) + delta.distinct_u * width * max(hidden, middle))
    return _expert_bytes(plan) + bases + _factor_bytes(plan) + shared


def _write_bytes(plan: Plan) -> int:
    """Beside an expert its factors; the layer's base, where there is room for a layer."""
    shape, width = plan.model.shape, plan.torch_dtype.itemsize
    based = plan.resources.hold_layer and plan.recipe.base.kind != "none"
    bases = shape.expert_parameters * width if based else 0
    rounding = _rounded_factors(plan) if plan.recipe.bits != 16 else 0
    return _expert_bytes(plan) + bases + max(_factor_bytes(plan), rounding)


def _rounding_bytes(inputs: int, numbers: int) -> int:
    """What rounding so many numbers with feedback takes: the inputs' moment in float64, its factor, what is left of the
    numbers, what a scale is tried on, and the codes."""
    return (FLOAT64 + FLOAT32) * inputs**2 + (4 * FLOAT32 + 1) * numbers


def _rounded_factors(plan: Plan) -> int:
    """Beside a matrix and its moment: V and U while they are rounded, and U's fit in float64."""
    shape, cap = plan.model.shape, max(plan.caps.values())
    large, small = max(shape.hidden_size, shape.intermediate_size), min(shape.hidden_size, shape.intermediate_size)
    whole = small * large if any(map(plan.problem.whole, shape.roles)) else 0
    fit = FLOAT64 * (large**2 + small * large + 2 * cap * large + 2 * cap**2)
    return max(_rounding_bytes(large, max(cap * large, whole)), fit + FLOAT32 * cap * large)


def _based_bytes(plan: Plan) -> int:
    """While a layer's bases are rounded: three merged matrices, pooled moments, one expert's where they are summed, and
    those of a selection while they are rounded."""
    shape, options = plan.model.shape, len([option for option in plan.problem.options if option != "none"])
    hidden, middle = shape.hidden_size, shape.intermediate_size
    matrix, large = hidden * middle, max(hidden, middle)
    pooled = FLOAT32 * (hidden**2 + middle**2)
    count = len(shape.roles)
    summed = count * matrix * plan.torch_dtype.itemsize + 2 * FLOAT32 * large**2 + plan.rows_bytes
    held = (count + options) * FLOAT32 * matrix
    return (
        count * FLOAT32 * matrix + pooled + max(summed, held + FLOAT32 * large**2 + _rounding_bytes(large, 2 * matrix))
    )
