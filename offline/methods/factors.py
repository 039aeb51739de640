"""How a layer's experts become factors: what a method hands to the layer's steps, and each expert on its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from d2moe_vllm.format.kinds import Role
from offline.algebra.factorization import DELTAS, column_factors
from offline.methods.layer import LayerJob
from offline.methods.options import Option


class Factors(Protocol):
    """How one layer's experts are factored."""

    @property
    def share(self) -> float:
        """Of the work, how much `write` does."""

    @property
    def kept(self) -> Sequence[str]:
        """Which of the factors are an expert's own, and go into its part."""

    def write(self, advance: Callable[[float], None]) -> None:
        """Writes what the experts share, before any expert's own factors are asked for; tells what share is done."""

    def factors(self, option: Option, role: Role, expert: int, delta: Tensor, gram: Tensor) -> dict[str, Tensor]:
        """An expert's u and v (or columns), and what else is kept, as stored, at the largest rank, the best first, on
        the device; delta: float32 [out, in], from the option's base; gram: float32 [in, in]."""


@dataclass(frozen=True)
class OwnFactors:
    """Every expert on its own, by delta.method (METHODS 1.3)."""

    job: LayerJob
    share: ClassVar[float] = 0.0
    kept: ClassVar[Sequence[str]] = ("u", "v", "columns")

    def write(self, advance: Callable[[float], None]) -> None:
        """Nothing is shared."""

    def factors(self, option: Option, role: Role, expert: int, delta: Tensor, gram: Tensor) -> dict[str, Tensor]:
        recipe, dtype, cap = self.job.plan.recipe, self.job.plan.torch_dtype, self.job.cap(role)
        if recipe.delta.method == "prune":
            u, columns = column_factors(delta, gram, cap, recipe.base.groups)
            best = best_first(u.norm(dim=0) * gram.diagonal()[columns.long()].sqrt(), recipe.base.groups)
            return {"u": u[:, best].to(dtype), "columns": columns[best]}
        u, v = DELTAS[recipe.delta.method](delta, gram, cap)
        return {"u": u.to(dtype), "v": v.to(dtype)}


def best_first(scores: Tensor, groups: int) -> Tensor:
    """An order in which the first r of scored columns, r a multiple of groups, are the best r, evenly over groups.

    scores: [kept], the groups' columns one after the other.
    """
    ranked = scores.view(groups, -1).argsort(dim=1, descending=True, stable=True)
    starts = torch.arange(groups, device=scores.device).unsqueeze(1) * ranked.shape[1]
    return (ranked + starts).T.flatten()
