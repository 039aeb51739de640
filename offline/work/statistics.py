"""What the calibration text tells about one layer's experts: Fisher, Grams, routing counts.

Two steps. While the layer runs over all windows, what reaches its experts is written down (`Recorder`). Then
each expert is taken alone over the rows that were routed to it, so that memory holds one expert's statistics
whatever their number. Everything is accumulated in float32, whatever products are computed in; no weight gradient is
ever formed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from d2moe_vllm.format.kinds import Role, halves_of, roles_of
from d2moe_vllm.ops.reference import Gated
from offline.algebra.moments import Moment
from offline.algebra.products import Products, multiplying
from offline.source.families import MoEShape
from offline.source.sites import SELECTIONS, Site
from offline.work.activations import Rows

SUMMED_ROWS = 512
"""That are widened to float64 at a time."""


class Weights(dict[Role, Tensor]):
    """One expert's projections, [out, in] each, in their stored dtype; biases: [out], of those that have one."""

    def __init__(self, matrices: Mapping[Role, Tensor], biases: Mapping[Role, Tensor] | None = None) -> None:
        super().__init__(matrices)
        self.biases: Mapping[Role, Tensor] = biases or {}

    @property
    def first(self) -> tuple[Role, ...]:
        """Those that read the layer's input: gate and up, or up alone."""
        return halves_of(self)["w13"]

    def gives(self, role: Role, rows: Tensor) -> Tensor:
        """What a projection gives for rows [n, in], in float32."""
        bias = self.biases.get(role)
        return linear(rows, self[role].float(), None if bias is None else bias.float())


def _no_biases(expert: int) -> dict[Role, Tensor]:
    return {}


class Recorder:
    """Writes down what reaches the experts of a layer; `at` is set before each batch of windows.

    arrays: inputs and, where the gradient is wanted, upstream: [tokens, hidden], the experts' input and the gradient of
    the summed log-likelihood at their output; choice int32, gates float32: [tokens, k]. energy[site]: float64 [n],
    sum of x² of what the base reads there: every token's input, and the gate-weighted mix of the experts'
    activations (METHODS 1.2).
    """

    def __init__(self, arrays: Mapping[str, Rows], sizes: Mapping[Site, int]) -> None:
        self.arrays = arrays
        self.energy = {site: torch.zeros(size, dtype=torch.float64) for site, size in sizes.items()}
        self.at = slice(0, 0)

    @torch.no_grad()
    def routed(self, hidden: Tensor, choice: Tensor, gates: Tensor) -> None:
        self.arrays["inputs"].write(self.at, hidden)
        self.arrays["choice"].write(self.at, choice.to(torch.int32))
        self.arrays["gates"].write(self.at, gates.float())
        self._add_energy("input", hidden)

    @torch.no_grad()
    def mixed(self, mix: Tensor) -> None:
        self._add_energy("middle", mix)

    def watch(self, output: Tensor) -> None:
        if "upstream" in self.arrays and output.requires_grad:
            at, upstream = self.at, self.arrays["upstream"]
            output.register_hook(lambda gradient: upstream.write(at, gradient))

    def _add_energy(self, site: Site, rows: Tensor) -> None:
        self.energy[site] += rows.square().sum(dim=0).cpu().double()


class _Project(torch.autograd.Function):
    """rows [n, in] @ weight [out, in]ᵀ in float32, of what `fetch` gives. It is fetched once more on the way back:
    autograd's own product would keep a float32 copy of every expert alive."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, fetch: Callable[[], Tensor]) -> Tensor:
        ctx.fetch = fetch
        return linear(rows, fetch())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] @ ctx.fetch(), None


class _Widened:
    """A matrix in float32, until the next one is asked for: all in the same place. What is allocated and freed for each
    leaves a hole that autograd's next small tensor breaks, so that the next matrix does not fit into it."""

    def __init__(self) -> None:
        self._room = torch.empty(0)

    def __call__(self, weight: Tensor) -> Tensor:
        if weight.dtype == torch.float32:
            return weight
        if self._room.numel() < weight.numel() or self._room.device != weight.device:
            self._room = torch.empty(weight.numel(), device=weight.device)
        return self._room[: weight.numel()].view(weight.shape).copy_(weight)


class DenseExperts(nn.Module):
    """The dense experts of one layer in float32, optionally watched by a recorder.

    fetch: (expert, role) -> weight [out, in] in its stored dtype, from memory or from disk; it is asked for one
    matrix at a time, which is widened then. biases: of an expert, those that it has. Fits where transformers' decoder
    layers of all families call their experts.
    """

    def __init__(
        self,
        shape: MoEShape,
        fetch: Callable[[int, Role], Tensor],
        gated: Gated,
        recorder: Recorder | None = None,
        biases: Callable[[int], Mapping[Role, Tensor]] = _no_biases,
    ) -> None:
        super().__init__()
        self._shape, self._fetch, self._gated, self._recorder = shape, fetch, gated, recorder
        self._biases, self._widened = biases, _Widened()

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor | None = None, top_k_weights: Tensor | None = None
    ) -> Tensor:
        """hidden_states: [tokens, hidden]; top_k_index, top_k_weights: [tokens, k]. Returns [tokens, hidden].

        Without the last two, hidden_states is all tokens once for each expert, times the router's weight, 0 where a
        token does not go: [experts * tokens, hidden], and so is what is returned. A token's input is then what its one
        expert sees, and its gate 1. Raises ValueError where a token goes to several."""
        if top_k_index is not None and top_k_weights is not None:
            return self._run(hidden_states, top_k_index, top_k_weights)
        blocks = hidden_states.unflatten(0, (self._shape.num_experts, -1))
        going = blocks.ne(0).any(dim=-1)
        if bool((going.sum(dim=0) > 1).any()):
            raise ValueError("router weights on the experts' input need one expert for each token")
        chosen, token = going.int().argmax(dim=0), torch.arange(blocks.shape[1], device=blocks.device)
        rows = blocks[chosen, token]
        gave = self._run(rows, chosen[:, None], torch.ones_like(rows[:, :1]))
        return torch.zeros_like(blocks).index_put((chosen, token), gave).flatten(0, 1)

    def _run(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        recorder = self._recorder
        output = torch.zeros_like(hidden_states)
        mix = None
        if recorder is not None:
            recorder.routed(hidden_states, top_k_index, top_k_weights)
            mix = hidden_states.new_zeros(len(hidden_states), self._shape.intermediate_size)
        # Gathered at once: on the way back each gathering would make a gradient of all tokens.
        visits = [(top_k_index == expert).nonzero(as_tuple=True) for expert in range(self._shape.num_experts)]
        all_rows = hidden_states.index_select(0, torch.cat([token for token, _ in visits]))
        routed = all_rows.split([len(token) for token, _ in visits])
        for expert, ((token, slot), rows) in enumerate(zip(visits, routed, strict=True)):
            if not len(token):
                continue
            gates = top_k_weights[token, slot, None]
            biases = self._biases(expert)
            middle = self._gated(*(self._project(expert, role, rows, biases) for role in self._shape.halves["w13"]))
            weighted = gates * self._project(expert, "down", middle, biases)
            self.gave(expert, weighted)
            # In place: of each new one, what autograd keeps would make holes that the next does not fit into.
            output.index_add_(0, token, weighted)
            if mix is not None:
                mix.index_add_(0, token, (gates * middle).detach())
        if recorder is not None and mix is not None:
            recorder.mixed(mix)
            recorder.watch(output)
        return output

    def gave(self, expert: int, output: Tensor) -> None:
        """Told what each expert gives, times the gates: [rows routed to it, hidden]."""

    def _project(self, expert: int, role: Role, rows: Tensor, biases: Mapping[Role, Tensor]) -> Tensor:
        found = _Project.apply(rows, lambda: self._widened(self._fetch(expert, role)))
        return found + biases[role].float() if role in biases else found


@dataclass(frozen=True)
class Routing:
    """The rows that reach each expert of one layer, from a finished recording.

    choice: int32 [tokens, k]; gates: float32 [tokens, k]; chunk: rows that are taken at once; products: how
    matrices are multiplied with them.
    """

    inputs: Rows
    choice: Tensor
    gates: Tensor
    upstream: Rows | None
    chunk: int
    device: torch.device
    products: Products = "float32"

    def batches(self, expert: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(token numbers int64 [n], inputs [n, hidden], gates [n, 1]) of an expert, `chunk` rows at a time."""
        token, slot = (self.choice == expert).nonzero(as_tuple=True)
        gates = self.gates[token, slot, None]
        for part, gate in zip(token.split(self.chunk), gates.split(self.chunk), strict=True):
            if len(part):
                yield part, self.inputs.read(part).to(self.device), gate.to(self.device)


def column_sums(rows: Tensor) -> Tensor:
    """float64 [n], of float32 rows [m, n], m >= 1: some rows at a time, as torch widens all that it sums so."""
    return torch.stack([part.sum(dim=0, dtype=torch.float64) for part in rows.split(SUMMED_ROWS)]).sum(dim=0)


@dataclass
class Gradients:
    """Squared gradients of the log-likelihood at one expert's projections.

    fisher[role]: float32 [out, in], F = (Δ∘Δ)ᵀ (x∘x), squared per position, so that the result does not depend on
    how windows are batched (METHODS 1.1); None where not asked for. rows[role]: float64 [out], what a unit of squared
    error at each of its outputs costs, sum over tokens of Δ², Δ before the gate where Grams carry the gate.
    channels: float64 [intermediate], sum over tokens of (dL/dh * h)² of what down reads: twice the second-order
    estimate of what a channel's loss costs (METHODS 4.2). grams[site]: as by `mean_gram`, where asked for.
    """

    fisher: dict[Role, Tensor] | None
    rows: dict[Role, Tensor]
    channels: Tensor
    grams: dict[Site, Tensor]

    @property
    def finite(self) -> bool:
        return all(bool(torch.isfinite(one).all()) for one in (*self.rows.values(), self.channels))

    @property
    def sensitivity(self) -> dict[Role, float]:
        """What a unit of squared error costs on average over the outputs (METHODS 1.4)."""
        return {role: float(rows.mean()) for role, rows in self.rows.items()}


@torch.no_grad()
def gradients(
    weights: Weights,
    routing: Routing,
    expert: int,
    gated: Gated,
    *,
    fisher: bool | Collection[Role],
    gate_weighted: bool,
    sites: Collection[Site] = (),
) -> Gradients:
    """One expert's squared gradients over all of its rows; fisher: of all projections, none, or some; sites: whose
    Grams are taken on the way, as what gate and up give is there. Raises ValueError where no upstream was recorded."""
    if routing.upstream is None:
        raise ValueError("gradients need a recording with upstream gradients")
    total: dict[Role, Tensor] = {}
    roles = roles_of(weights)
    wanted = (roles if fisher else ()) if isinstance(fisher, bool) else fisher
    if wanted:
        total = {role: torch.zeros(weights[role].shape, device=routing.device) for role in wanted}
    sums = {role: torch.zeros(len(weights[role]), dtype=torch.float64, device=routing.device) for role in roles}
    channels = torch.zeros(weights["down"].shape[1], dtype=torch.float64, device=routing.device)
    moments = {site: Moment(_size(weights, site), routing.device) for site in sites}

    def add(x: Tensor, gates: Tensor, upstream: Tensor) -> None:
        """All but a few of what is as large as rows times channels goes with the end of this function, and as soon as
        it can: rows are taken by as many as memory holds of that."""
        gave = [weights.gives(role, x) for role in weights.first]
        back = upstream @ weights["down"].float()
        with torch.enable_grad():
            middle = gated(*(one.requires_grad_() for one in gave))
            backs = torch.autograd.grad(middle, gave, back)
        del gave
        inputs: dict[Role, Tensor] = {**dict.fromkeys(weights.first, x), "down": middle.detach()}
        outputs: dict[Role, Tensor] = {**dict(zip(weights.first, backs, strict=True)), "down": upstream}
        del middle, backs
        channels.add_(column_sums(back.mul_(gates).mul_(inputs["down"]).square_()))
        del back
        for role in roles:
            squares = outputs.pop(role).square_()
            weighted = squares * gates.square()
            sums[role] += column_sums(squares if gate_weighted else weighted)
            del squares
            if role in total:
                total[role].addmm_(weighted.T, inputs[role].square())
        for site, moment in moments.items():
            rows = inputs[SELECTIONS[site][-1]]
            moment.add(rows * gates if gate_weighted else rows)

    with multiplying(routing.products):
        for token, x, gates in routing.batches(expert):
            add(x, gates, routing.upstream.read(token).to(routing.device))
    count = int((routing.choice == expert).sum())
    grams = {site: moment.mean(count) for site, moment in moments.items()}
    return Gradients(total or None, sums, channels, grams)


@torch.no_grad()
def mean_gram(
    weights: Weights, routing: Routing, expert: int, site: Site, gated: Gated, *, gate_weighted: bool
) -> Tensor:
    """G = X Xᵀ / tokens of what one expert reads at a site, float32 [n, n]; tokens weighted by their squared gate
    if so asked. Zero where no token was routed to it."""
    total, count = Moment(_size(weights, site), routing.device), 0
    with multiplying(routing.products):
        for token, x, gates in routing.batches(expert):
            rows = x if site == "input" else _middle(weights, x, gated)
            total.add(rows * gates if gate_weighted else rows)
            count += len(token)
    return total.mean(count)


def _size(weights: Weights, site: Site) -> int:
    """Inputs of the projections that read there."""
    return weights[SELECTIONS[site][-1]].shape[1]


@dataclass(frozen=True)
class Outputs:
    """What an expert's kept channels have become, beside what it gave, as means over its tokens.

    moment: float32 [kept, kept], of h' h'ᵀ; cross: float32 [hidden, kept], of y h'ᵀ; energy: of |y|². y is what the
    dense expert gives and h' what the channels that stay are, once gate and up are as stored. Zero without tokens.
    """

    moment: Tensor
    cross: Tensor
    energy: float

    def error(self, down: Tensor) -> float:
        """Mean |y - W h'|² of a down projection W, float32 [hidden, kept]."""
        weight = down.double()
        product = weight @ self.moment.double()
        return self.energy + float(((product - 2 * self.cross.double()) * weight).sum())


@torch.no_grad()
def outputs(
    weights: Weights,
    stored: Weights,
    routing: Routing,
    expert: int,
    gated: Gated,
    *,
    gate_weighted: bool,
) -> Outputs:
    """One expert's outputs, but for down's bias, and what its channels have become; stored: gate and up [kept, hidden]
    as they will be stored, float32, with the kept channels' biases; tokens weighted by their squared gate if asked."""
    kept, hidden = len(stored["up"]), len(weights["down"])
    moment = Moment(kept, routing.device)
    cross = torch.zeros(hidden, kept, device=routing.device)
    energy, count = 0.0, 0
    with multiplying(routing.products):
        for _, x, gates in routing.batches(expert):
            factor = gates if gate_weighted else torch.ones_like(gates)
            gave = linear(_middle(weights, x, gated), weights["down"].float()).mul_(factor)
            became = _middle(stored, x, gated).mul_(factor)
            moment.add(became)
            cross.addmm_(gave.T, became)
            energy += float(gave.square().sum(dtype=torch.float64))
            count += len(x)
    return Outputs(moment.mean(count), cross.div_(max(count, 1)), energy / max(count, 1))


def _middle(weights: Weights, x: Tensor, gated: Gated) -> Tensor:
    """What down reads where gate and up read the rows x [n, hidden]."""
    return gated(*(weights.gives(role, x) for role in weights.first))


@torch.no_grad()
def outlier_shares(
    weights: Weights, routing: Routing, expert: int, gated: Gated, threshold: float
) -> dict[Site, float]:
    """Share of the elements of what one expert reads whose magnitude exceeds `threshold` times their mean one.

    Two passes over its rows: the mean first. 0 where no token was routed to it.
    """
    counts: dict[Site, int] = dict.fromkeys(SELECTIONS, 0)
    sums: dict[Site, float] = dict.fromkeys(SELECTIONS, 0.0)
    beyond: dict[Site, int] = dict.fromkeys(SELECTIONS, 0)
    with multiplying(routing.products):
        for number in range(2):
            for _, x, _ in routing.batches(expert):
                rows: dict[Site, Tensor] = {"input": x, "middle": _middle(weights, x, gated)}
                for site, values in rows.items():
                    magnitudes = values.abs()
                    if number == 0:
                        counts[site] += magnitudes.numel()
                        sums[site] += float(magnitudes.sum(dtype=torch.float64))
                    else:
                        beyond[site] += int((magnitudes > threshold * sums[site] / counts[site]).sum())
    return {site: beyond[site] / max(counts[site], 1) for site in counts}
