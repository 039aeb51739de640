"""MoBE's arithmetic (METHODS 3): W_i = A_i f(sum_j alpha_ij B_j), its start at a singular value decomposition's error,
and the fit. Pure functions; which experts there are, and who has them, is mobe.py's business.

A_i is not iterated. For given V_i = f(sum_j alpha_ij B_j) the best A_i has a closed form, and the error's gradient with
A_i there is its gradient at fixed A_i (variable projection), so that Adam moves the bases and the logits of the
alphas only. sigma, which normalizes W_i in the paper, drops out: A_i takes up any scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from d2moe_vllm.ops.reference import FUNCTIONS
from offline.algebra.sharing import RIDGE

OWN = 0.75
"""An expert's alpha for the basis that it starts with, where it can mix from several."""
LARGEST = 0.2
"""Of the values f takes at the start: where SiLU still has an inverse, and both functions are nearly linear."""
NEWTON_STEPS = 60
HALVINGS = 5
"""So often the learning rate is halved, from the best point so far, before a fit that diverges is given up."""
NEAR = 1.01
"""Up to this multiple of the start's error a fit that has not gained anything has found that there is nothing."""

Ended = Literal["converged", "max_steps", "diverged"]


def inverse(function: str, values: Tensor) -> Tensor:
    """z with f(z) = values, float64, on the branch of SiLU that increases; values: above -0.27, for tanh within 1."""
    values = values.double()
    if function == "tanh":
        return torch.atanh(values)
    z = 2 * values
    for _ in range(NEWTON_STEPS):
        sigmoid = torch.sigmoid(z)
        z = z - (z * sigmoid - values) / (sigmoid * (1 + z * (1 - sigmoid)))
    return z


def clusters(experts: int, bases: int) -> list[range]:
    """The experts that start with each basis: consecutive, as even as can be."""
    return [range(j * experts // bases, (j + 1) * experts // bases) for j in range(bases)]


def start(vs: Tensor, experts: int, function: str, groups: int) -> tuple[Tensor, Tensor]:
    """Bases and logits [experts, m] with which every expert's f(sum_j alpha_ij B_j) is its cluster's V, up to a scale.

    vs: [m, r, in], V of each cluster. Alphas are no unit vectors, from which no logit would move, but mix the bases
    of a group; the bases are what makes these mixes come out right. Both are float32.
    """
    count = len(vs)
    scale = LARGEST / vs.double().abs().amax(dim=(1, 2), keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    wanted = inverse(function, vs.double() * scale)
    size = count // groups
    block = torch.full((size, size), (1 - OWN) / max(size - 1, 1), dtype=torch.float64)
    block.fill_diagonal_(OWN if size > 1 else 1.0)
    alpha = torch.block_diag(*[block] * groups).to(vs.device)
    bases = torch.linalg.solve(alpha, wanted.flatten(1)).view_as(wanted)
    places = [j for j, members in enumerate(clusters(experts, count)) for _ in members]
    return bases.float(), alpha[places].log().float()


def mix(bases: Tensor, alpha: Tensor, function: str) -> Tensor:
    """f(sum_j alpha_j B_j) [r, in] of bases [m, r, in] and one expert's alpha [m]."""
    return FUNCTIONS[function](torch.tensordot(alpha, bases, dims=1))


@dataclass(frozen=True)
class Projected:
    """What the best A for one expert's V explains of ||W G^(1/2)||_F^2, and the gradient of what is left by V."""

    explained: float
    gradient: Tensor


def project(weight: Tensor, gram: Tensor | None, v: Tensor) -> Projected:
    """weight: float32 or float64 [out, in]; gram: symmetric [in, in] in that dtype, None for the identity; v: [r, in].

    Products run in the weight's dtype, the r x r system in float64. NaN where something overflows.
    """
    seen = v if gram is None else v @ gram
    inner = (seen @ v.T).double()
    inner.diagonal().add_(RIDGE * inner.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny))
    cross = weight @ seen.T
    root, failed = torch.linalg.cholesky_ex(inner)
    if failed:
        return Projected(math.nan, torch.full_like(v, math.nan))
    a = torch.cholesky_solve(cross.double().T, root).T.to(weight.dtype)
    # In two parts, so that the gram meets r rows and not the weight's.
    gradient = 2 * ((a.T @ a) @ seen - _times(a.T @ weight, gram))
    return Projected(float((a * cross).sum(dtype=torch.float64)), gradient)


def _times(matrix: Tensor, gram: Tensor | None) -> Tensor:
    return matrix if gram is None else matrix @ gram


@dataclass(frozen=True)
class Target:
    """One expert's weight [out, in], the second moment of its inputs (None: the identity), ||W G^(1/2)||_F^2, and how
    much it counts."""

    expert: int
    weight: Tensor
    gram: Tensor | None
    energy: float
    count: float


def add_gradient(bases: Tensor, logits: Tensor, target: Target, function: str, into: list[Tensor]) -> float:
    """||(W - A V) G^(1/2)||_F^2 with the best A. Adds the gradients of count times that to into[0], of the bases, and
    into[1], of the logits."""
    expert = target.expert
    alpha = logits[expert].softmax(dim=0)
    mixed = torch.tensordot(alpha, bases, dims=1).requires_grad_()
    with torch.enable_grad():
        v = FUNCTIONS[function](mixed)
    found = project(target.weight, target.gram, v.detach())
    (back,) = torch.autograd.grad(v, mixed, target.count * found.gradient)
    into[0] += alpha[:, None, None] * back
    slopes = torch.tensordot(bases, back, dims=2)
    into[1][expert] += alpha * (slopes - alpha @ slopes)
    return max(target.energy - found.explained, 0.0) if math.isfinite(found.explained) else math.nan


@dataclass(frozen=True)
class Fit:
    """bases, logits: the best that were seen. start, end: squared error over the weights' energy."""

    bases: Tensor
    logits: Tensor
    start: float
    end: float
    steps: int
    halvings: int
    ended: Ended


Step = Callable[[Tensor, Tensor], tuple[float, list[Tensor]]]
"""(bases, logits) -> squared relative error, gradients of both."""


def fit(
    bases: Tensor,
    logits: Tensor,
    step: Step,
    *,
    learning_rate: float,
    max_steps: int,
    window: int,
    tolerance: float,
    advance: Callable[[float], None],
) -> Fit:
    """Adam from a start, until `window` steps lower the error by less than `tolerance` of it.

    At the end of a window that is NaN or above the start it goes on from the best point with half the learning rate;
    after HALVINGS of these it is given up. What comes out is the best point, never worse than the start.
    """
    error, gradients = step(bases, logits)
    first = best = error
    kept = (bases.clone(), logits.clone())
    halvings, steps = 0, 0
    ended: Ended = "max_steps"
    adam = _adam(bases, logits, learning_rate)
    last = best
    while steps < max_steps:
        steps += 1
        for (tensor,), gradient in zip((group["params"] for group in adam.param_groups), gradients, strict=True):
            tensor.grad = gradient
        adam.step()
        error, gradients = step(bases, logits)
        advance(1 / max_steps)
        if error < best:
            best, kept = error, (bases.clone(), logits.clone())
        if math.isfinite(error) and steps % window:
            continue
        if not error <= first:
            halvings += 1
            if halvings > HALVINGS:
                # Small steps around a start that is an optimum rise above it, too.
                ended = "converged" if error <= NEAR * first else "diverged"
                break
            bases, logits = (tensor.clone() for tensor in kept)
            error, gradients = step(bases, logits)
            adam = _adam(bases, logits, learning_rate / 2**halvings)
        elif best > last * (1 - tolerance):
            ended = "converged"
            break
        last = best
    advance(1 - steps / max(max_steps, 1))
    return Fit(*kept, first, best, steps, halvings, ended)


def _adam(bases: Tensor, logits: Tensor, learning_rate: float) -> torch.optim.Adam:
    size = float(bases.double().square().mean().sqrt()) or 1.0
    return torch.optim.Adam(
        [{"params": [bases], "lr": learning_rate * size}, {"params": [logits], "lr": learning_rate}]
    )
