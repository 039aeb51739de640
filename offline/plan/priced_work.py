"""What measuring and writing whole deltas take (METHODS 4): memory and operations, predicted from shapes.

What is large is float64: rounding with feedback, and refitting, factor a second moment of `down`'s inputs, two matrices
of which are held at a time.
"""

from __future__ import annotations

from collections.abc import Mapping

from offline.algebra.losses import SAMPLE
from offline.io.units import FLOAT32, FLOAT64
from offline.methods.pricing import ways
from offline.plan.plan import Plan

STEP = 6e6
"""Float32 operations that go by while a column is rounded, besides those of its numbers: a dozen calls of torch."""
TRIED = 200
"""Operations for every number that is rounded: twenty scales are tried for it."""


def rounding_phases(plan: Plan) -> Mapping[str, int]:
    """Bytes at the worst moment of looking at a layer's experts and its bases, of measuring and of writing an
    expert."""
    shape, recipe = plan.model.shape, plan.recipe
    hidden, middle = shape.hidden_size, shape.intermediate_size
    matrix, large = hidden * middle, max(hidden, middle)
    bits = {way.base for way in ways(recipe)} - {0}
    kinds = len(bits)
    expert = 3 * matrix * plan.torch_dtype.itemsize
    moment, factors = FLOAT32 * large**2, (FLOAT64 + FLOAT32) * large**2
    moments = FLOAT32 * (hidden**2 + middle**2)
    # Sums of a merge: three float32 matrices of each projection by Fisher information, else one.
    sums = 3 if plan.needs_fisher else 1
    pooled = moments if bits else 0
    gradients = 2 * FLOAT32 * matrix
    look = expert + gradients + pooled + moments
    if bits:
        look += FLOAT32 * matrix * 3 * sums + (3 * FLOAT32 * matrix if plan.needs_fisher else 0)
    held = 3 * matrix * kinds  # codes
    # What is rounded, what is left of it, and its codes, of gate and up together where these are larger.
    based = 3 * FLOAT32 * matrix + pooled + factors + held + kinds * (2 * FLOAT32 + 1) * matrix
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


def rounding(rows: int, inputs: int) -> float:
    """Operations of rounding one matrix with feedback: its moment's factorizations in float64, a step for each column,
    what columns lose spread over those to come, and scales."""
    return 2 * 4 / 3 * inputs**3 + STEP * inputs + rows * inputs * (inputs / 2 + TRIED)


def rounding_work(plan: Plan) -> tuple[float, float]:
    """Operations of a layer's measuring and of its writing, as float32 ones, besides Grams and gradients."""
    shape, recipe = plan.model.shape, plan.recipe
    hidden, middle, experts = shape.hidden_size, shape.intermediate_size, shape.num_experts
    bases = len({way.base for way in ways(recipe)} - {0})
    # Three factorizations in float64, of gate and up's inputs and of down's.
    factors = 2 * 4 / 3 * (hidden**3 + middle**3)
    columns = STEP * (hidden + middle)

    def numbers(rows: int, matrices: int) -> float:
        """Rounding so many rows of gate and up, or of down."""
        return matrices * rows * ((2 * hidden**2 + middle**2) / 2 + TRIED * (2 * hidden + middle))

    whole = hidden * middle * (hidden + middle / 2) + TRIED * 3 * hidden * middle
    measure = experts * (factors + columns + numbers(min(SAMPLE, hidden, middle), len(ways(recipe))))
    measure += bases * (whole + columns) + factors
    refit = 2 * (middle**3 / 3 + 2 * hidden * middle**2)
    write = experts * (factors + columns + whole + refit)
    if bases:
        write += experts * refit + 2 * (whole + columns) + factors
    return measure, write
