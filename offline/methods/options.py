"""Kinds of base that a selection may have, and the columns that are left of one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from offline.errors import InputError

Option = Literal["none", "pruned", "full", "svd"]
"""What a selection's base is: not there, column-pruned, all columns, low-rank."""
OPTIONS: Mapping[str, tuple[Option, ...]] = {
    "semi-dynamic": ("pruned",),
    "static": ("pruned",),
    "svd": ("svd",),
    "none": ("none",),
    "auto": ("none", "pruned", "full"),
}
"""base.kind -> the options that the budget may choose from."""


@dataclass(frozen=True)
class Columns:
    """Base columns of one projection: kept on disk, and used per forward pass under dynamic selection."""

    kept: int
    used: int


def base_columns(in_features: int, sparsity: float, groups: int, multiple: int, *, static: bool = False) -> Columns:
    """Columns left when `sparsity` of them is unused in total, half of it (or all) statically (METHODS 1.2, 1.5).

    Evenly over `groups`, rounded down to `multiple` per group. Raises InputError where groups do not
    divide the columns or nothing would be left.
    """
    if in_features % groups:
        raise InputError(f"{groups} groups do not divide {in_features} input columns; choose base.groups to divide")
    size = in_features // groups

    def per_group(share: float) -> int:
        # The small term keeps e.g. (1 - 0.9) * 10 from becoming 0 in floating point.
        return groups * (int(size * share + 1e-9) // multiple * multiple)

    used = in_features if sparsity == 0 else per_group(1 - sparsity)
    kept = in_features if sparsity == 0 else per_group(1 - sparsity / 2)
    kept = used if static else kept
    if used == 0:
        raise InputError(
            f"base.sparsity {sparsity:g} leaves no column in groups of {size} at column_multiple {multiple}; "
            "lower the sparsity, the groups or the multiple"
        )
    return Columns(kept, used)
