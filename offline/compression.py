"""One layer: merge, prune, factor, an expert at a time. What the calibration recorded goes in, parts in the working
folder come out, which `assembly.py` turns into the checkpoint's tensors once all ranks are decided.

Every part is written as soon as it is known, so an interrupted layer continues with its next expert, and
several processes share a layer's experts out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from d2moe_vllm.checkpoint import ROLES, Role
from offline.budget import Option
from offline.errors import InputError
from offline.factorization import DELTAS, column_factors, error_curve, shrink_gram, svd_base, whitened_energy
from offline.merging import MERGES, Merge, MergeOptions
from offline.plan import Plan
from offline.pruning import column_scores, select_columns
from offline.statistics import Activation, Routing, Site, Weights, gradients, mean_gram
from offline.workdir import WorkDir

SELECTIONS: Mapping[Site, tuple[Role, ...]] = {"input": ("gate", "up"), "middle": ("down",)}
"""Projections that share one selection of base columns, so that one gather feeds both (METHODS 1.2)."""


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

    # Merge

    def merge(self, advance: Callable[[float], None]) -> None:
        """Writes the parts `merged` (float32 [out, in] per role) and `sensitivity` (float64 [3, experts])."""
        recipe, group = self.plan.recipe, self.work.group
        needs_base = recipe.base.kind != "none"
        sensitivity = torch.zeros(len(ROLES), self.experts, dtype=torch.float64)
        merges = {role: self._new_merge(role) for role in ROLES} if needs_base else {}
        for number in range(max((merge.passes for merge in merges.values()), default=1)):
            for merge in merges.values() if number else ():
                merge.next_pass()
            for expert in self.own:
                self._add_expert(expert, merges, sensitivity if number == 0 else None)
                advance(1 / len(self.own))
            for merge in merges.values():
                group.sum(merge.state())
        group.sum([sensitivity])
        if not torch.isfinite(sensitivity).all():
            raise InputError(f"layer {self.number}: gradients overflow on the calibration text; use another text")
        if group.first:
            if merges:
                self.work.save_part(
                    self.number, "merged", {role: merge.result().cpu() for role, merge in merges.items()}
                )
            self.work.save_part(self.number, "sensitivity", {"sensitivity": sensitivity})
        group.barrier()

    def _new_merge(self, role: Role) -> Merge:
        base = self.plan.recipe.base
        out_features, in_features = self.plan.model.shape.projection(role)
        options = MergeOptions(
            fisher_epsilon=base.fisher_epsilon,
            frequency_power=base.frequency_power,
            regmean_shrinkage=base.regmean_shrinkage,
            ties_density=base.ties_density,
            device=self.routing.device,
        )
        return MERGES[base.merge](out_features, in_features, self.experts, options)

    def _add_expert(self, expert: int, merges: Mapping[Role, Merge], sensitivity: Tensor | None) -> None:
        recipe, weights = self.plan.recipe, self.weights(expert)
        needs = MERGES[recipe.base.merge]
        fisher = None
        if self.routing.upstream is not None and (needs.needs_fisher or sensitivity is not None):
            found = gradients(
                weights,
                self.routing,
                expert,
                self.activation,
                fisher=bool(merges) and needs.needs_fisher,
                gate_weighted=recipe.delta.gate_weighted,
            )
            fisher = found.fisher
            if sensitivity is not None:
                sensitivity[:, expert] = torch.tensor([found.sensitivity[role] for role in ROLES])
        total = int(self.tokens.sum())
        for site, roles in SELECTIONS.items():
            gram = self._gram(expert, weights, site) if merges and needs.needs_gram else None
            for role in roles:
                if role in merges:
                    merges[role].add(
                        weights[role],
                        tokens=int(self.tokens[expert]),
                        total_tokens=total,
                        fisher=None if fisher is None else fisher[role],
                        gram=gram,
                    )

    def _gram(self, expert: int, weights: Weights, site: Site) -> Tensor:
        weighted = self.plan.recipe.delta.gate_weighted
        gram = mean_gram(weights, self.routing, expert, site, self.activation, gate_weighted=weighted)
        if not torch.isfinite(gram).all():
            raise InputError(f"layer {self.number}: activations overflow float32 on the calibration text; use another")
        return gram

    # Base

    def build_bases(self) -> None:
        """Writes a part `base-<option>` per kind of base that the budget may choose, rounded as it will be stored."""
        if not all(torch.isfinite(energy).all() for energy in self.energy.values()):
            raise InputError(f"layer {self.number}: activations overflow float32 on the calibration text; use another")
        if self.work.group.first:
            for option in self.plan.problem.options:
                if option != "none" and not self.work.has_part(self.number, f"base-{option}"):
                    tensors: dict[str, Tensor] = {}
                    for site in SELECTIONS:
                        tensors |= self._base(option, site)
                    self._save(f"base-{option}", tensors)
        self.work.group.barrier()

    def _base(self, option: Option, site: Site) -> dict[str, Tensor]:
        merged = self.work.load_part(self.number, "merged", *SELECTIONS[site])
        problem, dtype = self.plan.problem, self.plan.torch_dtype
        tensors: dict[str, Tensor] = {}
        if option == "svd":
            for role in SELECTIONS[site]:
                base = merged[role]
                rank = problem.projection(role, option, problem.rank_multiple).base_rank
                u, v = svd_base(base.to(self.routing.device), self.energy[site], rank)
                tensors |= {f"{role}.base_u": u.to(dtype).cpu(), f"{role}.base_v": v.to(dtype).cpu()}
            return tensors
        joint = torch.stack([base.double().square().sum(dim=0) for base in merged.values()]).sum(dim=0).sqrt()
        kept = problem.columns(SELECTIONS[site][0], option).kept
        scores = column_scores(joint, self.energy[site].sqrt())
        columns = select_columns(scores, kept, self.plan.recipe.base.groups)
        for role in SELECTIONS[site]:
            stored = merged[role][:, columns.long()].to(dtype)
            tensors |= {
                f"{role}.base": stored,
                f"{role}.base_columns": columns.clone(),
                f"{role}.base_norms": stored.float().norm(dim=0),
            }
        return tensors

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

    # Deltas

    def factor(self, advance: Callable[[float], None]) -> None:
        """Writes a part per expert: factors at the largest rank they may get, and their error at every rank."""
        for expert in self.own:
            if not self.work.has_part(self.number, f"{expert:05d}"):
                self._save(f"{expert:05d}", self._factor_expert(expert))
            advance(1 / len(self.own))
        self.work.group.barrier()

    def _factor_expert(self, expert: int) -> dict[str, Tensor]:
        weights = self.weights(expert)
        tensors: dict[str, Tensor] = {}
        for site, roles in SELECTIONS.items():
            gram = self.shrunk_gram(expert, weights, site)
            for role in roles:
                energy = whitened_energy(weights[role], gram)
                for option in self.plan.problem.options:
                    delta = self.delta(option, role, weights[role])
                    found = self._deltas(delta, gram, role, expert)
                    found["curve"] = self._curve(delta, gram, role, found)
                    found["energy"] = torch.tensor([energy], dtype=torch.float64)
                    tensors |= {f"{option}.{role}.{kind}": value.cpu() for kind, value in found.items()}
        return tensors

    def shrunk_gram(self, expert: int, weights: Weights, site: Site) -> Tensor:
        gram = self._gram(expert, weights, site)
        return shrink_gram(gram, int(self.tokens[expert]), self.plan.recipe.delta.shrinkage)

    def _deltas(self, delta: Tensor, gram: Tensor, role: Role, expert: int) -> dict[str, Tensor]:
        """Rounded as they will be stored; nothing for an expert that is trimmed."""
        recipe, dtype, cap = self.plan.recipe, self.plan.torch_dtype, self.plan.cap(self.number, role)
        if expert in self.trimmed:
            return {}
        if recipe.delta.method == "prune":
            u, columns = column_factors(delta, gram, cap, recipe.base.groups)
            best = _best_first(u.norm(dim=0) * gram.diagonal()[columns.long()].sqrt(), recipe.base.groups)
            return {"u": u[:, best].to(dtype), "columns": columns[best]}
        u, v = DELTAS[recipe.delta.method](delta, gram, cap)
        return {"u": u.to(dtype), "v": v.to(dtype)}

    def _curve(self, delta: Tensor, gram: Tensor, role: Role, found: Mapping[str, Tensor]) -> Tensor:
        """float64 [steps + 1]: squared whitened error at 0, 1, 2, ... rank multiples."""
        multiple = self.plan.problem.rank_multiple
        cap = self.plan.cap(self.number, role)
        if "u" not in found:
            return whitened_energy(delta, gram) * torch.ones(-(-cap // multiple) + 1, dtype=torch.float64)
        if "columns" in found:
            v = torch.zeros(cap, delta.shape[1], device=delta.device)
            v[torch.arange(cap), found["columns"].long()] = 1.0
        else:
            v = found["v"]
        curve = error_curve(delta, gram, found["u"], v)
        picks = torch.arange(0, cap + multiple, multiple).clamp(max=cap).unique()
        return curve.cpu()[picks]

    def _save(self, part: str, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise InputError(
                    f"layer {self.number}, {part}: {name} came out as NaN or infinite; try another dtype of the "
                    "source or another text"
                )
        self.work.save_part(self.number, part, {name: tensor.contiguous() for name, tensor in tensors.items()})


def _best_first(scores: Tensor, groups: int) -> Tensor:
    """An order in which the first r of scored columns, r a multiple of groups, are the best r, evenly over groups.

    scores: [kept], the groups' columns one after the other.
    """
    ranked = scores.view(groups, -1).argsort(dim=1, descending=True, stable=True)
    starts = torch.arange(groups, device=scores.device).unsqueeze(1) * ranked.shape[1]
    return (ranked + starts).T.flatten()
