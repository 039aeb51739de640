"""What one pass over the calibration windows tells about one layer's experts: Fisher, Grams, routing counts.

Only rows that the router sends to an expert count for it. Everything is accumulated in float32; no weight
gradient is ever formed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from d2moe_vllm.checkpoint import ROLES, Role

Site = Literal["input", "middle"]
"""Where a projection reads: gate and up from the layer's input, down from the expert's activations."""
SITES: Mapping[Role, Site] = {"gate": "input", "up": "input", "down": "middle"}


class LayerStatistics:
    """Sums over all calibration tokens of one layer.

    tokens: int64 [experts]; gram[site][expert]: float32 [n, n], sum of x xᵀ, weighted by the squared gate if
    so asked; energy[site]: float32 [n], sum of x² of what the base reads there: every token's input, and the
    gate-weighted mix of the experts' activations (METHODS 1.2); fisher[role][expert]: float32 [out, in], or
    None where not asked for.
    """

    def __init__(self, experts: int, hidden: int, intermediate: int, *, fisher: bool, gate_weighted: bool) -> None:
        sizes: dict[Site, int] = {"input": hidden, "middle": intermediate}
        self.gate_weighted = gate_weighted
        self.tokens = torch.zeros(experts, dtype=torch.int64)
        self.gram = {site: [torch.zeros(n, n) for _ in range(experts)] for site, n in sizes.items()}
        self.energy = {site: torch.zeros(n) for site, n in sizes.items()}
        self.fisher: dict[Role, list[Tensor]] | None = None
        if fisher:
            out = {"gate": intermediate, "up": intermediate, "down": hidden}
            self.fisher = {role: [torch.zeros(out[role], sizes[SITES[role]]) for _ in range(experts)] for role in ROLES}

    @torch.no_grad()
    def add_inputs(self, expert: int, site: Site, rows: Tensor, gates: Tensor) -> None:
        """rows: [tokens, n] that expert reads at a site; gates: [tokens, 1]."""
        weighted = rows * gates if self.gate_weighted else rows
        self.gram[site][expert].addmm_(weighted.T, weighted)
        if site == "input":
            self.tokens[expert] += len(rows)

    @torch.no_grad()
    def add_energy(self, site: Site, rows: Tensor) -> None:
        """rows: [tokens, n] that the base reads at a site."""
        self.energy[site] += rows.square().sum(dim=0)

    def gradient_hook(self, expert: int, role: Role, rows: Tensor) -> Callable[[Tensor], None]:
        """A hook for the projection's output [tokens, out]; rows [tokens, in] is what it read.

        Adds F = (Δ∘Δ)ᵀ (x∘x), Δ being the gradient of the windows' summed log-likelihood: squared per
        position, so that the result does not depend on how windows are batched (METHODS 1.1).
        """
        assert self.fisher is not None
        total, squares = self.fisher[role][expert], rows.detach().square()

        @torch.no_grad()
        def hook(gradient: Tensor) -> None:
            total.addmm_(gradient.square().T, squares)

        return hook

    def mean_gram(self, expert: int, site: Site) -> Tensor:
        """G = X Xᵀ / tokens, float64 [n, n]."""
        return self.gram[site][expert].double() / max(int(self.tokens[expert]), 1)


class _Project(torch.autograd.Function):
    """rows [n, in] @ weight [out, in]ᵀ in float32. Keeps the weight as it is stored for the way back and widens
    it once more there: autograd's own product would keep a float32 copy of every expert alive."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return linear(rows, weight.float())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return gradients[0] @ weight.float(), None


class DenseExperts(nn.Module):
    """The dense experts of one layer in float32, optionally watched by `statistics`.

    weights: per role and expert [out, in], kept in the stored dtype and widened one matrix at a time.
    Fits where transformers' decoder layers of all families call their experts.
    """

    def __init__(
        self,
        weights: Mapping[Role, Sequence[Tensor]],
        activation: Callable[[Tensor], Tensor],
        statistics: LayerStatistics | None = None,
    ) -> None:
        super().__init__()
        self._weights, self._activation, self._statistics = weights, activation, statistics

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states: [tokens, hidden]; top_k_index, top_k_weights: [tokens, k]. Returns [tokens, hidden]."""
        statistics = self._statistics
        output = torch.zeros_like(hidden_states)
        mix = None
        if statistics is not None:
            statistics.add_energy("input", hidden_states)
            mix = hidden_states.new_zeros(len(hidden_states), self._weights["down"][0].shape[1])
        for expert in range(len(self._weights["gate"])):
            token, slot = (top_k_index == expert).nonzero(as_tuple=True)
            if not len(token):
                continue
            rows, gates = hidden_states[token], top_k_weights[token, slot, None]
            gate, up = self._project("gate", expert, rows), self._project("up", expert, rows)
            middle = self._activation(gate) * up
            result = self._project("down", expert, middle)
            output = output.index_add(0, token, gates * result)
            if statistics is not None and mix is not None:
                statistics.add_inputs(expert, "input", rows, gates)
                statistics.add_inputs(expert, "middle", middle, gates)
                mix.index_add_(0, token, (gates * middle).detach())
        if statistics is not None and mix is not None:
            statistics.add_energy("middle", mix)
        return output

    def _project(self, role: Role, expert: int, rows: Tensor) -> Tensor:
        result = _Project.apply(rows, self._weights[role][expert])
        statistics = self._statistics
        if statistics is not None and statistics.fisher is not None and result.requires_grad:
            result.register_hook(statistics.gradient_hook(expert, role, rows))
        return result
