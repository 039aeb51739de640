"""MoE-SVD (METHODS 2): whole experts, one V for all of a projection, and fewer U's than experts if asked; of the layers
that matter least, the others stay dense, bit by bit.

The order of work is joint.py's; what differs is where V comes from and which U goes with it. U's are not merged
here: the most used ones stay as they are, and the other experts take the nearest.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from d2moe_vllm.format.kinds import Role
from offline.algebra.analysis import spectrum
from offline.algebra.factorization import whitened_factors
from offline.algebra.sharing import fitted_u, seed_experts
from offline.methods.base import WITHOUT_BASE, Choice, Method
from offline.methods.factors import Factors
from offline.methods.joint import Common, JointFactors
from offline.methods.layer import LayerJob
from offline.methods.options import Option
from offline.methods.settings import Section, Settings
from offline.source.sites import SITES
from offline.work.statistics import outlier_shares


class MoESVD(Section):
    """MoE-SVD (METHODS 2). Its U's are trimmed by `delta.distinct_u`.

    share_v: where the V that all experts share comes from and what U's go with it: that of the most routed expert with
    every expert's own U (`most_routed`, the paper's) or with U's fitted to it (`refit`), or the best for all experts
    together, also with fitted U's (`joint`). layer_ratio: share of its bytes that a decomposed layer gives up at
    least: so few layers are decomposed, the others stay dense. rank_threshold, outlier_threshold: a singular value
    counts from this share of the largest on, an activation from this many times the mean magnitude on.
    """

    share_v: Literal["most_routed", "refit", "joint"] = "joint"
    layer_ratio: float = Field(default=0.5, gt=0, lt=1)
    rank_threshold: float = Field(default=0.2, gt=0, lt=1)
    outlier_threshold: float = Field(default=3.0, gt=0)


def orthonormal_rows(v: Tensor) -> Tensor:
    """Of the same span, float64. U's that are fitted to a V of nearly dependent rows are large and cancel each other,
    which rounding does not survive."""
    return torch.linalg.qr(v.double().T).Q.T


class SharedVFactors(JointFactors):
    """The factors of one layer, V and U's by recipe.moe_svd.share_v."""

    _projects: ClassVar[bool] = False

    def _best_v(self, option: Option, role: Role) -> tuple[Tensor, Tensor | None, Tensor | None]:
        kind = self.job.plan.recipe.own(MoESVD).share_v
        if kind == "joint":
            v, _, gram = super()._best_v(option, role)
            # In the stored dtype before, as the published figures were measured; of no other consequence.
            return orthonormal_rows(v.to(self.job.plan.torch_dtype)), None, gram
        expert = seed_experts(self.job.tokens.tolist(), 1)[0]
        _, weight, gram = next(self._each(option, role, [expert]))
        _, v = whitened_factors(weight, gram, self.job.cap(role))
        return v if kind == "most_routed" else orthonormal_rows(v), None, self._pooled(option, role)

    def _pooled(self, option: Option, role: Role) -> Tensor | None:
        """The summed second moment of what all experts read; None where nothing is rounded."""
        if not self.storing.packed:
            return None
        size, members = self.job.plan.model.shape.projection(role)[1], self._members
        total = torch.zeros(size, size, dtype=torch.float64, device=self.job.routing.device)
        for expert, _, gram in self._each(option, role, self._own(members)):
            total.add_(gram, alpha=self._weight(expert, members))
        self.job.work.group.sum([total])
        return total

    def _own_u(self, common: Common, delta: Tensor, gram: Tensor) -> Tensor:
        v = common.v.numbers
        if self.job.plan.recipe.own(MoESVD).share_v == "most_routed":
            return whitened_factors(delta, gram, len(v))[0].double()
        return fitted_u(delta, gram, v)

    def _shared_u(self, option: Option, role: Role, members: list[int], common: Common) -> Tensor:
        """The U of the member that founded the cluster, the most routed one."""
        tokens = [int(self.job.tokens[expert]) for expert in members]
        _, weight, gram = next(self._each(option, role, [members[seed_experts(tokens, 1)[0]]]))
        return self._own_u(common, weight, gram)


def sensitivity(job: LayerJob) -> float:
    """This process's share of S = sum_i f_i sum_p r_ip a_ip over experts and their projections.

    f: share of the routed tokens; r: principal rank; a: share of what the projection reads that is beyond
    outlier_threshold times its mean magnitude.
    """
    settings = job.plan.recipe.own(MoESVD)
    total, routed = 0.0, max(int(job.tokens.sum()), 1)
    for expert in job.own:
        weights = job.weights(expert)
        shares = outlier_shares(weights, job.routing, expert, job.gated, settings.outlier_threshold)
        for role in weights:
            rank = principal_rank(weights[role], settings.rank_threshold)
            total += int(job.tokens[expert]) / routed * rank * shares[SITES[role]]
    return total


def principal_rank(weight: Tensor, threshold: float) -> int:
    """How many singular values of `weight` [out, in] are at least `threshold` times the largest; of zeros none."""
    energies = spectrum(weight)
    return int(((energies >= threshold**2 * energies[0]) & (energies > 0)).sum())


def layer_ratio(recipe: Settings) -> float:
    return recipe.own(MoESVD).layer_ratio


class _Method(Method):
    def factors(self, job: LayerJob) -> Factors:
        return SharedVFactors(job)


MOE_SVD = _Method(
    name="moe-svd",
    title="MoE-SVD",
    made="every expert of a decomposed layer is a product of two factors, one of which all experts of the layer share "
    "(MoE-SVD); {dense} of its {layers} MoE layers are unchanged.",
    settings=MoESVD,
    fixed={**WITHOUT_BASE, "delta": {**WITHOUT_BASE["delta"], "share_v": True}},
    until="Which layers are decomposed calibration decides.",
    choice=Choice(layer_ratio, sensitivity),
)
