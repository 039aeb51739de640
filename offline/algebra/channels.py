"""What an expert's down projection becomes when channels before it are dropped and what makes them is rounded.

A refit in closed form (METHODS 4.2): least squares of what the expert gave on what its channels have become. So those
that stay take over what goes together with those that went, and mend what gate and up lost by rounding. One moment of
the channels that stay is factored, in float64.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from offline.algebra.rounding import cholesky_

RIDGE = 1e-6
"""Of the mean second moment, added to every channel's, so that a singular one is no special case."""


def refit_outputs(
    weight: Tensor, kept: Tensor, moment: Tensor, cross: Tensor, tokens: int, strength: float = 0.1
) -> Tensor:
    """The down projection that, reading what the channels have become, gives most nearly what the expert gave.

    Least squares with a ridge towards plain dropping: with H' the kept channels as gate and up make them once they are
    stored, and Y what the dense expert gave, it minimises (1 - l) ||Y - W' H'||² / tokens + l m ||W' - W[:, S]||², with
    l as `shrink_gram` shrinks, strength * n / (strength * n + tokens) of n inputs, and m the mean of H''s second
    moment. Where gate and up lost nothing it is W[:, S] <- W G[:, S] (G[S, S])^-1, with G shrunk.

    weight: float [out, in], the dense one; kept: bool [in]; moment: float [kept, kept], mean of h' h'ᵀ; cross: float
    [out, kept], mean of y h'ᵀ, both over `tokens` tokens with the same weights. Returns float32 [out, kept]. No token,
    or channels that are always zero, give plain dropping. Raises ValueError where shapes disagree.
    """
    count = _check(weight, kept)
    if moment.shape != (count, count) or cross.shape != (len(weight), count):
        raise ValueError(
            f"{count} channels are kept of a weight {list(weight.shape)}, the moment is {list(moment.shape)} and "
            f"the cross moment {list(cross.shape)}"
        )
    stays = weight[:, kept].float()
    mean = float(moment.diagonal().double().mean()) if count else 0.0
    if tokens == 0 or mean <= 0:
        return stays
    share = strength * len(kept) / (strength * len(kept) + tokens)
    left = (cross.double() - stays.double() @ moment.double()).mul_(1 - share)

    def shrunk() -> Tensor:
        found = moment.double() * (1 - share)
        found.diagonal().add_(share * mean)
        return found

    return stays + _solve(shrunk, left).float()


def _solve(moment: Callable[[], Tensor], right: Tensor) -> Tensor:
    """right (moment + eps)^-1, float64 [out, n], in the place of `right`; moment: makes it anew, float64 [n, n]."""

    def made() -> Tensor:
        found = moment().mT
        found.diagonal().add_(max(RIDGE * float(found.diagonal().mean()), torch.finfo(torch.float64).tiny))
        return found

    # In place, as in `rounding`: at real sizes each is gigabytes.
    if not cholesky_(root := made()):  # float32 moments may be indefinite by more than the ridge
        return torch.linalg.solve(made(), right, left=False)
    columns = right.contiguous().T
    return torch.cholesky_solve(columns, root, out=columns).T


def _check(weight: Tensor, kept: Tensor) -> int:
    """How many are kept."""
    if kept.shape != weight.shape[1:] or kept.dtype != torch.bool:
        raise ValueError(f"kept is {kept.dtype} {list(kept.shape)}, weight has {weight.shape[1]} inputs")
    return int(kept.sum())
