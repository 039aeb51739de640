"""Parts in the working folder -> the checkpoint's tensors: a part holds them as they are stored, this knows which."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from d2moe_vllm.format.kinds import Stored
from d2moe_vllm.ops.packing import from_bits
from offline.io.shards import TORCH_DTYPES
from offline.methods.bases import SENSITIVITY_PART
from offline.methods.selection import sensitivities
from offline.plan.plan import Plan
from offline.source.sites import SITES
from offline.work.workdir import WorkDir

FACTS_PART = "facts"
"""A layer's part that holds what a sweep saw of its routing."""


class Assembly:
    """The expert tensors of a settled plan, read from the parts when asked for."""

    def __init__(self, plan: Plan, work: WorkDir) -> None:
        self.plan, self.work, self.config = plan, work, plan.budget.config
        self._origins: dict[str, tuple[int, Stored]] = {
            name: (layer, one) for layer in self.config.layers for name, one in self.config.stored(layer).items()
        }

    def __contains__(self, name: str) -> bool:
        return name in self._origins

    def tensor(self, name: str) -> Tensor:
        """One tensor of the checkpoint. Raises KeyError for a name that is no expert tensor, InputError where its part
        is damaged."""
        layer, one = self._origins[name]
        if one.kind.name == "bias":
            return self._bias(layer, one).to(TORCH_DTYPES[one.spec.dtype]).contiguous()
        place = self.plan.layers.place(self.plan, layer, one)
        if place is None:
            found = self.plan.model.weight(layer, one.expert, one.role)
        else:
            part, key = place
            found = self.work.load_part(layer, part, key)[key]
        return found.to(TORCH_DTYPES[one.spec.dtype]).contiguous()

    def _bias(self, layer: int, one: Stored) -> Tensor:
        """As it is in the source, of the channels that the expert keeps."""
        found = self.plan.model.bias(layer, one.expert, one.role)
        if found is None:
            raise ValueError(f"layer {layer}: the source's experts have no biases")
        if self.config.layers[layer].channels is None or one.role == "down":
            return found
        kept = self.tensor(self.config.tensor_name(layer, one.expert, "down", "channels"))
        return found[from_bits(kept, self.config.intermediate_size)]

    def reports(self) -> dict[str, Any]:
        """What d2moe_stats.json tells, per layer."""
        return {str(layer): self._report(layer) for layer in self.config.layers}

    def _report(self, layer: int) -> dict[str, Any]:
        """Routed tokens, kind of base, relative errors and sensitivity per expert."""
        work, choices = self.work, self.plan.budget.choices
        roles = self.config.roles
        errors: dict[str, list[float]] = {role: [] for role in roles}
        for expert in range(self.config.num_experts):
            for role in roles:
                name = self.plan.layers.figures_part(expert, role)
                part = work.load_part(layer, name, f"{role}.error", f"{role}.energy")
                error, energy = (float(part[f"{role}.{kind}"]) for kind in ("error", "energy"))
                errors[role].append((error / energy) ** 0.5 if energy > 0 else 0.0)
        report: dict[str, Any] = {
            "tokens": work.load_part(layer, FACTS_PART, "tokens")["tokens"].tolist(),
            "relative_error": errors,
            "base": {role: choices[layer, SITES[role]] for role in roles},
        }
        report |= self.plan.layers.report(self.plan, work, layer)
        if work.has_part(layer, SENSITIVITY_PART):
            values = work.load_part(layer, SENSITIVITY_PART)["sensitivity"].tolist()
            report["sensitivity"] = dict(zip(roles, values, strict=True))
        return report

    def selection(self) -> dict[str, Any] | None:
        """Every layer's sensitivity, where the layers that stay dense were chosen by it."""
        if not self.plan.selects:
            return None
        found = sensitivities(self.work, self.plan.model.shape.layers)
        dense = [layer for layer in found if layer not in self.config.layers]
        return {"sensitivity": {str(layer): value for layer, value in found.items()}, "dense": dense}
