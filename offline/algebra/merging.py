"""Base by merging the experts of a layer (D2-MoE §3.2, METHODS 1.1): a table of streaming accumulators.

Experts are added one at a time, in any order, so that no more than one expert is ever held:

    merge = MERGES["fisher"](out_features, in_features, experts, MergeOptions())
    for number in range(merge.passes):
        for expert in ...:
            merge.add(weight, tokens, total_tokens, fisher, gram)
        # several processes, each with some of the experts: sum merge.state() over them here, in place
        if number + 1 < merge.passes:
            merge.next_pass()
    base = merge.result()
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from offline.algebra.factorization import column_blocks

RIDGE = 1e-6
"""RegMean's ridge, as a share of the mean energy of an input: directions without any evidence get the plain mean."""
TIE = 1e-5
"""Differences from a mean that are all kept sum to rounding: below this share of their magnitudes no sign wins."""


@dataclass(frozen=True)
class MergeOptions:
    """fisher_epsilon: share of the mean Fisher added everywhere; frequency_power: p_i = (routed share)^power.

    regmean_shrinkage: how far RegMean's Grams are pulled to their diagonal, 0 to 1 (RegMean, arXiv 2212.09849,
    section 4: it multiplies off-diagonals by 0.9). ties_density: share of entries that TIES keeps of each
    expert (TIES-Merging, arXiv 2306.01708: the top 20 %). partial: whether experts may lack some rows or columns
    (METHODS 4.2), of merges that are `partial`. device: where the accumulators live.
    """

    fisher_epsilon: float = 1e-3
    frequency_power: float = 0.0
    regmean_shrinkage: float = 0.1
    ties_density: float = 0.2
    partial: Literal["", "rows", "columns"] = ""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


class Merge:
    """What all merges share: the plain mean, and the count of experts added in this pass."""

    needs_fisher = False
    needs_gram = False
    partial = False
    passes = 1

    def __init__(self, out_features: int, in_features: int, experts: int, options: MergeOptions) -> None:
        """experts: how many will be added in all, over all processes."""
        self.shape = (out_features, in_features)
        self.experts = experts
        self.options = options
        self.sum = self.zeros()
        self.added = self.zeros(1, dtype=torch.float64)
        if options.partial and not self.partial:
            raise ValueError(f"{type(self).__name__} merges whole matrices only")
        size = {"": (1, 1), "rows": (out_features, 1), "columns": (1, in_features)}[options.partial]
        self.counts = self.zeros(*size)
        """Experts that have each row, or column."""

    def zeros(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape or self.shape, dtype=dtype, device=self.options.device)

    def add(
        self,
        weight: Tensor,
        tokens: int,
        total_tokens: int,
        fisher: Tensor | None = None,
        gram: Tensor | None = None,
        kept: Tensor | None = None,
    ) -> None:
        """One expert. weight: [out, in], any float dtype; tokens: routed to it, of total_tokens in the layer
        (over all experts); fisher: float [out, in], summed over tokens; gram: float [in, in], the mean over
        its tokens; kept: bool [out], or [in], the rows or columns that the expert has, as options.partial says: the
        others have no part in the merge. Nothing is kept of the arguments, nor changed in them.
        Raises ValueError where the shape is another or what the merge needs is missing.
        """
        if weight.shape != self.shape:
            raise ValueError(f"weight is {list(weight.shape)}, the merge is of {list(self.shape)}")
        self.added += 1
        weight = weight.to(self.options.device, torch.float32)
        if self.options.partial:
            if kept is None or kept.shape != (self.counts.numel(),):
                raise ValueError(f"a merge of some {self.options.partial} needs to know which, of each expert")
            mask = kept.to(self.options.device).view(self.counts.shape)
            weight, fisher = weight * mask, None if fisher is None else fisher.to(self.options.device) * mask
            self.counts += mask
        else:
            self.counts += 1
        self._add(weight, tokens / max(total_tokens, 1), fisher, gram)

    def _add(self, weight: Tensor, share: float, fisher: Tensor | None, gram: Tensor | None) -> None:
        self.sum += weight

    def state(self) -> list[Tensor]:
        """The accumulators of this pass. Summed over processes, in place, they are those of all experts."""
        return [self.sum, self.added, self.counts]

    def next_pass(self) -> None:
        """Between two passes, where `passes` says there are two."""
        self._check_complete()
        self.added.zero_()
        self.counts.zero_()

    def result(self) -> Tensor:
        """The base, float32 [out, in]. Ends the merge: accumulators may be reused for the result.

        Raises ValueError where the number of experts added is not the number announced.
        """
        self._check_complete()
        return self._result()

    def _result(self) -> Tensor:
        # What no expert has is zero.
        return self.sum.div_(self.counts.clamp(min=1))

    def _check_complete(self) -> None:
        if int(self.added) != self.experts:
            raise ValueError(f"{int(self.added)} experts were added to a merge of {self.experts}")


class MeanMerge(Merge):
    """The plain mean."""

    partial = True


class FrequencyMerge(Merge):
    """The mean weighted by routed tokens; the plain mean where none was routed."""

    def __init__(self, out_features: int, in_features: int, experts: int, options: MergeOptions) -> None:
        super().__init__(out_features, in_features, experts, options)
        self.weighted = self.zeros()
        self.shares = self.zeros(1, dtype=torch.float64)

    def _add(self, weight: Tensor, share: float, fisher: Tensor | None, gram: Tensor | None) -> None:
        self.sum += weight
        self.weighted.add_(weight, alpha=share)
        self.shares += share

    def state(self) -> list[Tensor]:
        return [*super().state(), self.weighted, self.shares]

    def _result(self) -> Tensor:
        return self.weighted.div_(float(self.shares)) if self.shares > 0 else super()._result()


class FisherMerge(Merge):
    """sum_i F'_i * W_i / sum_i F'_i, element-wise (D2-MoE eq. 4-5), with F'_i = p_i F_i / M + epsilon.

    M is the mean of p_i F_i over all experts and positions, which is known only at the end: the sums of
    p_i F_i * W_i, of p_i F_i and of W_i are kept. The plain mean where there is no evidence at all.
    """

    needs_fisher = True
    partial = True

    def __init__(self, out_features: int, in_features: int, experts: int, options: MergeOptions) -> None:
        super().__init__(out_features, in_features, experts, options)
        self.top = self.zeros()
        self.bottom = self.zeros()

    def _add(self, weight: Tensor, share: float, fisher: Tensor | None, gram: Tensor | None) -> None:
        if fisher is None:
            raise ValueError("the fisher merge needs Fisher information")
        power = share**self.options.frequency_power
        fisher = fisher.to(self.options.device, torch.float32)
        self.sum += weight
        self.top.addcmul_(fisher, weight, value=power)
        self.bottom.add_(fisher, alpha=power)

    def state(self) -> list[Tensor]:
        return [*super().state(), self.top, self.bottom]

    def _result(self) -> Tensor:
        had = float(self.counts.double().sum()) * self.sum.numel() / self.counts.numel()
        mean = sum(float(row.double().sum()) for row in self.bottom.split(256)) / max(had, 1)
        if mean == 0:
            return super()._result()
        epsilon, counts = self.options.fisher_epsilon, self.counts.clamp(min=1).expand(len(self.sum), -1)
        rows = (part.split(256) for part in (self.sum, self.top, self.bottom, counts))
        for total, top, bottom, count in zip(*rows, strict=True):
            # Divided by the mean in float64, so that tiny Fisher values cannot underflow.
            above = top.double().div_(mean).add_(total, alpha=epsilon)
            total.copy_(above / bottom.double().div_(mean).add_(epsilon * count.double()))
        return self.sum


class RegMeanMerge(Merge):
    """(sum_i W_i G'_i)(sum_i G'_i)^-1, the least-squares merge (RegMean, arXiv 2212.09849, eq. 2).

    G'_i = (1 - a) G_i + a diag(G_i) with G_i the *sum* over routed tokens and a = regmean_shrinkage. A small
    ridge towards the plain mean, so that a singular sum is no special case. Sums and solution in float64:
    8 (in^2 + out * in) bytes, and as much again for the solution.
    """

    needs_gram = True

    def __init__(self, out_features: int, in_features: int, experts: int, options: MergeOptions) -> None:
        super().__init__(out_features, in_features, experts, options)
        self.top = self.zeros(dtype=torch.float64)
        self.bottom = self.zeros(in_features, in_features, dtype=torch.float64)

    def _add(self, weight: Tensor, share: float, fisher: Tensor | None, gram: Tensor | None) -> None:
        if gram is None or gram.shape != self.bottom.shape:
            raise ValueError(f"the regmean merge needs a Gram matrix of {self.shape[1]} inputs")
        self.sum += weight
        weight = weight.double()
        for block in column_blocks(self.shape[1]):
            # In shares, not counts, of tokens: the scale cancels.
            part = gram[:, block].to(self.options.device, torch.float64) * share
            diagonal = part[block].diagonal().clone()
            part *= 1 - self.options.regmean_shrinkage
            part[block].diagonal().copy_(diagonal)
            self.bottom[:, block] += part
            self.top[:, block] += weight @ part

    def state(self) -> list[Tensor]:
        return [*super().state(), self.top, self.bottom]

    def _result(self) -> Tensor:
        energy = float(self.bottom.diagonal().mean())
        mean = super()._result()
        if energy <= 0:
            return mean
        # The ridge belongs to both sides: what no input ever showed stays at the mean.
        self.top.add_(mean, alpha=RIDGE * energy)
        self.bottom.diagonal().add_(RIDGE * energy)
        root, failed = torch.linalg.cholesky_ex(self.bottom)
        if failed:  # float32 Grams may be indefinite by more than the ridge
            solution = torch.linalg.solve(self.bottom, self.top, left=False)
        else:
            solution = torch.cholesky_solve(self.top.T, root).T
        return solution.float()


class TiesMerge(Merge):
    """TIES-Merging (arXiv 2306.01708, algorithm 1) of the experts' differences from their plain mean, scaling 1.

    Of each difference the largest `ties_density` share of entries is kept, the sign of their sum elected per
    position, and the mean of the entries with that sign added to the plain mean, which stays where no sign wins.
    Two passes: first the mean, then the differences. Sums of both signs are kept apart, so the election needs
    no third pass.
    """

    passes = 2

    def __init__(self, out_features: int, in_features: int, experts: int, options: MergeOptions) -> None:
        super().__init__(out_features, in_features, experts, options)
        self.mean: Tensor | None = None
        self.signed: list[Tensor] = []

    def _add(self, weight: Tensor, share: float, fisher: Tensor | None, gram: Tensor | None) -> None:
        if self.mean is None:
            self.sum += weight
            return
        difference = weight - self.mean
        kept = max(round(self.options.ties_density * difference.numel()), 1)
        if kept < difference.numel():
            magnitude = difference.abs()
            threshold = magnitude.flatten().kthvalue(difference.numel() - kept + 1).values
            difference.masked_fill_(magnitude < threshold, 0)
        positive, positives, negative, negatives = self.signed
        positive += difference.clamp(min=0)
        positives += difference > 0
        negative += difference.clamp(max=0)
        negatives += difference < 0

    def state(self) -> list[Tensor]:
        return [*(self.signed or [self.sum]), self.added, self.counts]

    def next_pass(self) -> None:
        super().next_pass()
        self.mean = self.sum.div_(self.experts)
        self.signed = [self.zeros(), self.zeros(dtype=torch.int32), self.zeros(), self.zeros(dtype=torch.int32)]

    def _result(self) -> Tensor:
        if self.mean is None:
            raise ValueError("the ties merge takes two passes")
        positive, positives, negative, negatives = self.signed
        elected = positive + negative
        # What is left of a tie is rounding: of the sums, and of the mean that every difference was taken from.
        rounding = self.experts * torch.finfo(torch.float32).eps * self.mean.abs()
        tie = elected.abs() <= TIE * (positive - negative) + rounding
        agreeing = torch.where(elected > 0, positive / positives.clamp(min=1), negative / negatives.clamp(min=1))
        return self.mean + agreeing.masked_fill_(tie, 0)


MERGES: dict[str, type[Merge]] = {
    "fisher": FisherMerge,
    "mean": MeanMerge,
    "frequency": FrequencyMerge,
    "regmean": RegMeanMerge,
    "ties": TiesMerge,
}
