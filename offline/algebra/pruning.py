"""Static column pruning of the base (D2-MoE §3.4 phase 1, METHODS 1.2)."""

from __future__ import annotations

import torch
from torch import Tensor


def column_scores(column_norms: Tensor, input_norms: Tensor) -> Tensor:
    """C_j = ||W_b[:, j]|| * ||X[j, :]|| (D2-MoE eq. 9); both [in], result float64 [in].

    Where gate and up share a selection, `column_norms` is their joint norm.
    """
    return column_norms.double() * input_norms.double()


def select_columns(scores: Tensor, kept: int, groups: int) -> Tensor:
    """The best columns, `kept / groups` in each of `groups` equal slices of the input dimension.

    Returns ascending int32 [kept]; of equal scores the lower column wins. Raises ValueError where `groups`
    does not divide the columns or `kept`, or `kept` exceeds the columns.
    """
    columns = len(scores)
    if columns % groups or kept % groups or kept > columns:
        raise ValueError(f"cannot keep {kept} of {columns} columns in {groups} groups")
    order = scores.view(groups, -1).sort(dim=1, descending=True, stable=True).indices[:, : kept // groups]
    offsets = torch.arange(groups, device=scores.device).unsqueeze(1) * (columns // groups)
    return (order.sort(dim=1).values + offsets).flatten().to(torch.int32)
