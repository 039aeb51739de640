"""MoE-SVD's factors (METHODS 2): whole experts, one V for all of a projection, and fewer U's than experts if asked.

The order of work is joint.py's; what differs is where V comes from and which U goes with it. U's are not merged
here: the most used ones stay as they are, and the other experts take the nearest.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from d2moe_vllm.format.config import Role
from offline.algebra.factorization import whitened_factors
from offline.algebra.sharing import fitted_u, seed_experts
from offline.methods.joint import Common, JointFactors
from offline.plan.budget import Option


def orthonormal_rows(v: Tensor) -> Tensor:
    """Of the same span, float64. U's that are fitted to a V of nearly dependent rows are large and cancel each other,
    which rounding does not survive."""
    return torch.linalg.qr(v.double().T).Q.T


class SharedVFactors(JointFactors):
    """The factors of one layer, V and U's by recipe.moe_svd.share_v."""

    common_kinds: ClassVar[tuple[str, ...]] = ("shared_v",)

    def _share_v(self, option: Option, role: Role) -> Common:
        kind, dtype = self.job.plan.recipe.moe_svd.share_v, self.job.plan.torch_dtype
        if kind == "joint":
            return {"shared_v": orthonormal_rows(super()._share_v(option, role)["shared_v"]).to(dtype)}
        expert = seed_experts(self.job.tokens.tolist(), 1)[0]
        _, weight, gram = next(self._each(option, role, [expert]))
        _, v = whitened_factors(weight, gram, self.job.plan.cap(self.job.number, role))
        return {"shared_v": (v if kind == "most_routed" else orthonormal_rows(v)).to(dtype)}

    def _own_u(self, common: Common, delta: Tensor, gram: Tensor) -> Tensor:
        if self.job.plan.recipe.moe_svd.share_v == "most_routed":
            return whitened_factors(delta, gram, len(common["shared_v"]))[0].double()
        return fitted_u(delta, gram, common["shared_v"])

    def _shared_u(self, option: Option, role: Role, members: list[int], common: Common) -> Tensor:
        """The U of the member that founded the cluster, the most routed one."""
        tokens = [int(self.job.tokens[expert]) for expert in members]
        _, weight, gram = next(self._each(option, role, [members[seed_experts(tokens, 1)[0]]]))
        return self._own_u(common, weight, gram)
