"""One layer to be compressed: what its steps read and write. Weights, Grams, bases and deltas come one at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from d2moe_vllm.format.config import ROLES, Role
from offline.algebra.factorization import shrink_gram
from offline.errors import InputError
from offline.plan.budget import Option
from offline.plan.plan import Plan
from offline.source.sites import Site
from offline.work.statistics import Activation, Routing, Weights, mean_gram
from offline.work.workdir import WorkDir


@dataclass(frozen=True)
class LayerJob:
    """The compression of one layer on this process.

    tokens: int64 [experts], rows routed to each; trimmed: experts that get no delta (METHODS 1.7);
    energy[site]: float64 [n], sums of x² of what the base reads.
    """

    number: int
    plan: Plan
    work: WorkDir
    routing: Routing
    tokens: Tensor
    trimmed: tuple[int, ...]
    energy: Mapping[Site, Tensor]
    activation: Activation

    @property
    def experts(self) -> int:
        return self.plan.model.shape.num_experts

    @property
    def own(self) -> list[int]:
        """The experts of this process."""
        return self.work.group.own(range(self.experts))

    def weights(self, expert: int) -> Weights:
        model, device = self.plan.model, self.routing.device
        return {role: model.weight(self.number, expert, role).to(device) for role in ROLES}

    def gram(self, expert: int, weights: Weights, site: Site) -> Tensor:
        """G of what one expert reads at a site, float32 [n, n]. Raises InputError where it overflows."""
        weighted = self.plan.recipe.delta.gate_weighted
        gram = mean_gram(weights, self.routing, expert, site, self.activation, gate_weighted=weighted)
        if not torch.isfinite(gram).all():
            raise InputError(f"layer {self.number}: activations overflow float32 on the calibration text; use another")
        return gram

    def base(self, option: Option, role: Role) -> Tensor | None:
        """The whole base [out, in] as it will be stored, float32; None where the option has none."""
        if option == "none":
            return None
        device = self.routing.device
        if option == "svd":
            parts = self.work.load_part(self.number, "base-svd", f"{role}.base_u", f"{role}.base_v")
            u, v = (part.to(device).float() for part in parts.values())
            return u @ v
        parts = self.work.load_part(self.number, f"base-{option}", f"{role}.base", f"{role}.base_columns")
        whole = torch.zeros(self.plan.model.shape.projection(role), device=device)
        return whole.index_copy_(
            1, parts[f"{role}.base_columns"].long().to(device), parts[f"{role}.base"].to(device).float()
        )

    def delta(self, option: Option, role: Role, weight: Tensor) -> Tensor:
        """W_i - W_b, float32 [out, in]."""
        base = self.base(option, role)
        return weight.float() if base is None else weight.float() - base

    def shrunk_gram(self, expert: int, weights: Weights, site: Site) -> Tensor:
        """As `gram`, shrunk by how few tokens the expert saw."""
        gram = self.gram(expert, weights, site)
        return shrink_gram(gram, int(self.tokens[expert]), self.plan.recipe.delta.shrinkage)

    def save(self, part: str, tensors: dict[str, Tensor]) -> None:
        """Writes a part. Raises InputError for one that is not finite."""
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise InputError(
                    f"layer {self.number}, {part}: {name} came out as NaN or infinite; try another dtype of the "
                    "source or another text"
                )
        self.work.save_part(self.number, part, {name: tensor.contiguous() for name, tensor in tensors.items()})
