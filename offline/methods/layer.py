"""One layer to be compressed: what its steps read and write. Weights, Grams, bases and deltas come one at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from d2moe_vllm.format.kinds import Role
from d2moe_vllm.ops.reference import Gated
from offline.algebra.factorization import shrink_gram
from offline.errors import InputError
from offline.methods.options import Option
from offline.methods.settings import Settings
from offline.methods.storing import Storing
from offline.source.dense import DenseModel
from offline.source.sites import SELECTIONS, Site
from offline.work.statistics import Routing, Weights, mean_gram
from offline.work.workdir import WorkDir


class Plan(Protocol):
    """What methods know of the plan. caps: by layer the rank of a projection once the budget is settled, before that
    the largest that it may get, up to which errors are measured; torch_dtype: of the experts as they are stored;
    hold_layer: there is memory for a layer; processes: on this machine; keeps: whether an expert's Gram at a site waits
    on disk for its next use."""

    @property
    def model(self) -> DenseModel: ...
    @property
    def recipe(self) -> Settings: ...
    @property
    def caps(self) -> Mapping[tuple[int, Role], int]: ...
    @property
    def torch_dtype(self) -> torch.dtype: ...
    @property
    def hold_layer(self) -> bool: ...
    @property
    def processes(self) -> int: ...
    def keeps(self, site: Site) -> bool: ...


Advance = Callable[[float], None]
"""Told which share of a step is done."""


class Progress(Protocol):
    """What a run says of the work on one layer."""

    def begin(self, step: str, *costs: str) -> Advance:
        """A step that people see by its name; costs: what of a layer's planned time it is, by LayerSeconds' names."""

    def skip(self, cost: str) -> None:
        """Work that an earlier run did already."""


BASE_PART = "base"
"""A layer's part that holds its settled base, as it is stored: `<role>.base`, `<role>.base_columns`, ..."""


_STORED: Mapping[Option, tuple[Any, ...]] = {
    "pruned": (("base",), "base_columns"),
    "full": (("base",),),
    "svd": (("base_u", "base_v"),),
}
"""What is needed of a stored base to have it whole: matrices, and what else."""


def expert_part(expert: int) -> str:
    """A layer's part that holds what is an expert's own."""
    return f"{expert:05d}"


def measured_part(expert: int) -> str:
    """A layer's part that holds what an expert's errors would be, of which the budget is settled."""
    return f"measured-{expert:05d}"


def _gram_part(expert: int, site: Site) -> str:
    """A layer's part that holds a Gram from one use to the next."""
    return f"gram-{site}-{expert:05d}"


@dataclass(frozen=True)
class LayerJob:
    """The compression of one layer on this process.

    tokens: int64 [experts], rows routed to each; trimmed: experts that get no delta (METHODS 1.7);
    energy[site]: float64 [n], sums of x² of what the base reads; options: of each selection, the kinds of base to
    measure, or the one that was settled.
    """

    number: int
    plan: Plan
    work: WorkDir
    routing: Routing
    tokens: Tensor
    trimmed: tuple[int, ...]
    energy: Mapping[Site, Tensor]
    gated: Gated
    options: Mapping[Site, tuple[Option, ...]]
    _bases: dict[tuple[Option, Role], Mapping[str, Tensor]] = field(default_factory=dict)

    @property
    def experts(self) -> int:
        return self.plan.model.shape.num_experts

    @property
    def own(self) -> list[int]:
        """The experts of this process."""
        return self.work.group.own(range(self.experts))

    @property
    def storing(self) -> Storing:
        """Of low-rank factors and their base."""
        return Storing(int(self.plan.recipe.bits), self.plan.recipe.group_size, self.plan.torch_dtype)

    def cap(self, role: Role) -> int:
        """The largest rank that a projection of this layer may get."""
        return self.plan.caps[self.number, role]

    def weights(self, expert: int) -> Weights:
        model, device = self.plan.model, self.routing.device
        matrices = {role: model.weight(self.number, expert, role).to(device) for role in model.shape.roles}
        return Weights(matrices, model.experts.biases(self.number, device)(expert))

    def gram(self, expert: int, weights: Weights, site: Site) -> Tensor:
        """G of what one expert reads at a site, float32 [n, n]. Raises InputError where it overflows."""
        if self.work.has_part(self.number, part := _gram_part(expert, site)):
            return self.work.load_part(self.number, part)["gram"].to(self.routing.device)
        weighted = self.plan.recipe.delta.gate_weighted
        gram = mean_gram(weights, self.routing, expert, site, self.gated, gate_weighted=weighted)
        return self.finite(gram)

    def keep_gram(self, expert: int, site: Site, gram: Tensor) -> None:
        """For its next use at this layer, where it is less to read than what it was made of."""
        if self.plan.keeps(site):
            self.work.save_part(self.number, _gram_part(expert, site), {"gram": gram.cpu()})

    def drop_grams(self) -> None:
        """Of this process's experts, which are done."""
        for expert in self.own:
            for site in SELECTIONS:
                self.work.discard_part(self.number, _gram_part(expert, site))

    def finite(self, moment: Tensor) -> Tensor:
        """The moment of activations. Raises InputError for one that overflowed."""
        if not torch.isfinite(moment).all():
            raise InputError(f"layer {self.number}: activations overflow float32 on the calibration text; use another")
        return moment

    def base(self, option: Option, role: Role) -> Tensor | None:
        """The whole base [out, in] as it will be stored, float32; None where the option has none."""
        if option == "none":
            return None
        found, (rows, inputs) = self._base_parts(option, role), self.plan.model.shape.projection(role)

        def opened(kind: str, inputs: int) -> Tensor:
            return self.storing.open(found, kind, inputs).numbers

        if option == "svd":
            rank = self.plan.recipe.base_rank(self.plan.model.shape, role)
            return opened("base_u", rank) @ opened("base_v", inputs)
        if option == "full":
            return opened("base", inputs)
        columns = found["base_columns"].long()
        kept = opened("base", len(columns))
        # While several kinds are measured, one whole base serves all of them, where none is rounded.
        kept = kept if kept.shape[1] == len(columns) else kept[:, columns]
        return torch.zeros(rows, inputs, device=kept.device).index_copy_(1, columns, kept)

    def hold_base(self, option: Option, role: Role, parts: Mapping[str, Tensor]) -> None:
        """Keeps a base that is measured, in memory alone, as it would be stored; a pruned one that is not packed may
        have all of its columns, beside the numbers of those that are kept."""
        self._bases[option, role] = {name: part.to(self.routing.device) for name, part in parts.items()}

    def _base_parts(self, option: Option, role: Role) -> Mapping[str, Tensor]:
        """What a base is stored as, on the device; where the plan has room for a layer, read once while it lasts."""
        if (found := self._bases.get((option, role))) is None:
            matrices, *others = _STORED[option]
            names = [*(name for kind in matrices for name in self.storing.names(kind)), *others]
            parts = self.work.load_part(self.number, BASE_PART, *(f"{role}.{name}" for name in names))
            found = {name: parts[f"{role}.{name}"].to(self.routing.device) for name in names}
            if self.plan.hold_layer:
                self._bases[option, role] = found
        return found

    def delta(self, option: Option, role: Role, weight: Tensor) -> Tensor:
        """W_i - W_b, float32 [out, in]."""
        base = self.base(option, role)
        return weight.float() if base is None else weight.float() - base

    def shrunk_gram(self, expert: int, weights: Weights, site: Site) -> Tensor:
        """As `gram`, shrunk by how few tokens the expert saw."""
        return self.shrunk(expert, self.gram(expert, weights, site))

    def shrunk(self, expert: int, gram: Tensor) -> Tensor:
        """In its place."""
        return shrink_gram(gram, int(self.tokens[expert]), self.plan.recipe.delta.shrinkage)

    def is_measured(self, expert: int) -> bool:
        return self.work.has_part(self.number, measured_part(expert))

    def save(self, part: str, tensors: dict[str, Tensor]) -> None:
        """Writes a part. Raises InputError for one that is not finite."""
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise InputError(
                    f"layer {self.number}, {part}: {name} came out as NaN or infinite; try another dtype of the "
                    "source or another text"
                )
        self.work.save_part(self.number, part, {name: tensor.contiguous() for name, tensor in tensors.items()})
