"""What measuring and writing whole deltas take (METHODS 4): memory and operations, predicted from shapes.

What is large is float64: rounding with feedback, and refitting, factor a second moment of `down`'s inputs, two matrices
of which are held at a time. What takes long is products over all rows of an expert.
"""

from __future__ import annotations

from collections.abc import Mapping

from offline.algebra.losses import SAMPLE
from offline.algebra.moments import BLOCK
from offline.io.units import FLOAT32, FLOAT64
from offline.methods.pricing import ways
from offline.plan.plan import Plan
from offline.plan.rates import Work
from offline.source.sites import SELECTIONS, Site


def rounding_phases(plan: Plan) -> Mapping[str, int]:
    """Bytes at the worst moment of looking at a layer's experts and its bases, of measuring and of writing an
    expert."""
    shape, recipe = plan.model.shape, plan.recipe
    hidden, middle = shape.hidden_size, shape.intermediate_size
    matrix, large, count = hidden * middle, max(hidden, middle), len(shape.roles)
    bits = {way.base for way in ways(recipe)} - {0}
    kinds = len(bits)
    expert = count * matrix * plan.torch_dtype.itemsize
    moment, factors = FLOAT32 * large**2, (FLOAT64 + FLOAT32) * large**2
    moments = FLOAT32 * (hidden**2 + middle**2)
    # Sums of a merge: three float32 matrices of each projection by Fisher information, else one.
    sums = 3 if plan.needs_fisher else 1
    pooled = moments if bits else 0
    gradients = 2 * FLOAT32 * matrix
    look = expert + gradients + pooled + moments
    if bits:
        look += FLOAT32 * matrix * count * sums + (count * FLOAT32 * matrix if plan.needs_fisher else 0)
    held = count * matrix * kinds  # codes
    # What is rounded, what is left of it, and its codes, of gate and up together where these are larger.
    based = count * FLOAT32 * matrix + pooled + factors + held + kinds * (2 * FLOAT32 + 1) * matrix
    deltas = (2 * kinds + 3) * FLOAT32 * matrix
    tried = 4 * FLOAT32 * SAMPLE * large * 2 * len(ways(recipe))
    measure = expert + held + moment + max(factors + deltas / 2, deltas) + tried
    written = 2 * FLOAT32 * matrix if bits else 0
    refit = FLOAT64 * middle**2 + 2 * FLOAT64 * matrix + 2 * FLOAT32 * matrix + FLOAT32 * middle**2
    write = expert + written + max(moment + factors + 4 * FLOAT32 * matrix, refit)
    found = {"look": look, "measure": int(measure), "write": write}
    if bits:
        base = expert + 2 * sums * FLOAT32 * matrix + pooled + max(refit + written, moment + gradients)
        found |= {"bases": based, "base": base + FLOAT32 * matrix}
    return {name: size + plan.rows_bytes for name, size in found.items()}


def rounding(rows: int, inputs: int) -> Work:
    """Of rounding one matrix with feedback: its moment's factorizations in float64, a step for each column, and what
    columns lose spread over those to come."""
    return factoring(inputs) + Work(columns=inputs) + rounded(rows, inputs)


def factoring(inputs: int) -> Work:
    """Of one moment, for feedback: a factorization, and the factor's inverse."""
    return Work(factors=inputs**3, touched=4 * inputs**2)


def rounded(rows: int, inputs: int) -> Work:
    """Of so many rows, besides the loop over columns, which all matrices that go together share."""
    return Work(products=rows * inputs**2, numbers=rows * inputs)


def refitting(plan: Plan) -> Work:
    """Of down to what its channels have become, for every expert: a factorization and a solution in float64."""
    hidden, middle = plan.model.shape.hidden_size, plan.model.shape.intermediate_size
    each = Work(products=4 * hidden * middle**2, factors=middle**3 / 3 + 2 * hidden * middle**2)
    return plan.model.shape.num_experts * each


def measuring_work(plan: Plan) -> Work:
    """Of a layer: gradients and moments in one pass over the experts' rows; then what sampled rows lose by every way of
    storing them, and before that the bases that there are to choose from."""
    shape, every = plan.model.shape, ways(plan.recipe)
    hidden, middle, experts = shape.hidden_size, shape.intermediate_size, shape.num_experts
    first = len(shape.roles) - 1
    found = gradients(plan, first + 1 if plan.needs_fisher else 0) + moments(plan, "input") + moments(plan, "middle")
    found += _again(plan, "input") + _again(plan, "middle")
    sample = min(SAMPLE, hidden, middle) * len([way for way in every if way.delta not in (0, 16)])
    each = factoring(hidden) + factoring(middle) + Work(columns=hidden + middle)
    found += experts * (each + rounded(first * sample, hidden) + rounded(sample, middle))
    bases = {way.base for way in every} - {0}
    return found + (each if bases else Work()) + len(bases) * _whole(plan)


def writing_work(plan: Plan) -> Work:
    """Of a layer whose experts keep all of their channels; with a base where there may be one."""
    shape = plan.model.shape
    hidden, middle, experts = shape.hidden_size, shape.intermediate_size, shape.num_experts
    each = factoring(hidden) + factoring(middle) + Work(columns=hidden + middle)
    # What every error is a share of, and the error: products with the moments, by half.
    errors = Work(products=4 * middle * hidden**2)
    found = moments(plan, "input") + outputs(plan) + refitting(plan) + experts * (each + _whole(plan) + errors)
    if plan.has_bases:
        found += _again(plan, "input") + refitting(plan) + each + _whole(plan)
        found += Work() if plan.keeps("middle") else outputs(plan)
    if plan.needs_fisher:
        found += gradients(plan, len(shape.roles) - 1) + gradients(plan, 1)
    return found


def _whole(plan: Plan) -> Work:
    """Of one expert's matrices while they are rounded."""
    shape = plan.model.shape
    hidden, middle = shape.hidden_size, shape.intermediate_size
    return rounded((len(shape.roles) - 1) * middle, hidden) + rounded(hidden, middle)


# Over the rows of a layer's experts


def projecting(plan: Plan) -> Work:
    """One projection of all rows that are routed to a layer's experts."""
    shape = plan.model.shape
    rows = plan.tokens * shape.experts_per_token
    return Work(2 * rows * shape.hidden_size * shape.intermediate_size)


def gradients(plan: Plan, fisher: int) -> Work:
    """Of a layer's experts, what they read the input with and the way back through down; fisher: of so many
    projections."""
    shape = plan.model.shape
    rows = plan.tokens * shape.experts_per_token
    touched = Work(touched=rows * (16 * shape.intermediate_size + 8 * shape.hidden_size))
    return (len(shape.roles) + fisher) * projecting(plan) + touched


def moments(plan: Plan, site: Site) -> Work:
    """Of what a layer's experts read at a site, once."""
    shape = plan.model.shape
    rows, size = plan.tokens * shape.experts_per_token, shape.projection(SELECTIONS[site][0])[1]
    blocks = -(-size // BLOCK)
    return Work(rows * size**2 * (blocks + 1) / blocks, touched=2 * rows * size)


def _again(plan: Plan, site: Site) -> Work:
    """A moment for its second use: read, or made again with gate and up, or up alone."""
    shape = plan.model.shape
    if plan.keeps(site):
        return Work(bytes=2 * FLOAT32 * shape.num_experts * shape.projection(SELECTIONS[site][0])[1] ** 2)
    return moments(plan, site) + ((len(shape.roles) - 1) * projecting(plan) if site == "middle" else Work())


def outputs(plan: Plan) -> Work:
    """What a layer's experts gave, and what their channels have become: its projections as they were and as they are,
    and two moments."""
    shape = plan.model.shape
    rows = plan.tokens * shape.experts_per_token
    return (
        2 * len(shape.roles) * projecting(plan)
        + moments(plan, "middle")
        + Work(touched=rows * 12 * shape.intermediate_size)
    )
