"""The frontier of a comparison: perplexity by the bytes of the experts that are left, and whether any row lies below
the default's curve, which runs through the default's own rows.

Between two rows of the default the curve is straight in the loss (the logarithm of perplexity) over the logarithm of
bytes; beyond its rows there is none.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

DEFAULT = "d2"
"""The method whose curve it is."""
MOST, LEAST = 0.5, 0.07
"""Shares of the experts' bytes between which rows are judged."""


class Point(NamedTuple):
    """A row. share: of the source's experts' bytes."""

    name: str
    ratio: float
    share: float
    perplexity: float


def points(rows: Sequence[Mapping[str, Any]], text: str) -> list[Point]:
    """The compressed rows that have both figures; rows whose experts are gone have no place on a logarithmic axis."""
    return [
        Point(row["name"], row["ratio"], row["expert_share"], row["perplexity"][text])
        for row in rows
        if row["kind"] != "source" and row["expert_share"] and (row["perplexity"] or {}).get(text)
    ]


def default_curve(found: Sequence[Point]) -> list[Point]:
    """The default's rows by rising size, of each size the best."""
    best: dict[float, Point] = {}
    for one in sorted(found, key=lambda one: (one.share, one.perplexity)):
        if one.name == DEFAULT:
            best.setdefault(one.share, one)
    return list(best.values())


def perplexity_at(curve: Sequence[Point], share: float) -> float | None:
    """The curve's perplexity at a size; None beyond its rows."""
    for one in curve:
        if one.share == share:
            return one.perplexity
    for low, high in itertools.pairwise(curve):
        if low.share < share < high.share:
            way = math.log(share / low.share) / math.log(high.share / low.share)
            return low.perplexity ** (1 - way) * high.perplexity**way
    return None


def judged(curve: Sequence[Point], point: Point) -> dict[str, Any]:
    """How a row stands to the curve.

    below: the share by which its perplexity is below the curve's, negative above it, None beyond the curve; beaten:
    some row of the curve is no larger and no worse, so it is not below, whatever lies between the curve's rows.
    """
    beaten = any(one.share <= point.share and one.perplexity <= point.perplexity for one in curve)
    level = perplexity_at(curve, point.share)
    below = None if level is None else 1 - point.perplexity / level
    if below is not None and beaten:
        below = min(below, 0.0)
    return {**point._asdict(), "below": below, "beaten": beaten}


def frontier(rows: Sequence[Mapping[str, Any]], texts: Sequence[str]) -> dict[str, Any] | None:
    """Of each text the curve, every other row between MOST and LEAST beside it, and the one that is furthest below,
    None where none is. Without a row of the default there is no curve, and the answer is None."""
    found: dict[str, Any] = {}
    for text in texts:
        every = points(rows, text)
        if curve := default_curve(every):
            beside = [judged(curve, one) for one in every if one.name != DEFAULT and LEAST <= one.share <= MOST]
            below = [row for row in beside if (row["below"] or 0) > 0]
            found[text] = {
                "curve": [[one.share, one.perplexity] for one in curve],
                "rows": beside,
                "largest": max(below, key=lambda row: row["below"], default=None),
            }
    return {"method": DEFAULT, "most": MOST, "least": LEAST, "texts": found} if found else None


def verdicts(content: Mapping[str, Any]) -> list[str]:
    """A sentence for each text. content: as `d2moe compare --json` prints it."""
    found = content["frontier"]
    return [_verdict(text, one) for text, one in found["texts"].items()] if found else []


def _verdict(text: str, found: Mapping[str, Any]) -> str:
    where = f"between {100 * MOST:g} and {100 * LEAST:g} % of the experts' bytes"
    outside = [row for row in found["rows"] if row["below"] is None and not row["beaten"]]
    count = len(found["rows"]) - len(outside)
    start = f"The default's curve ({DEFAULT}) on {text}: "
    if not found["rows"]:
        return f"{start}no other row lies {where}."
    if largest := found["largest"]:
        most = f"{_named(largest)} is the furthest below it, by {100 * largest['below']:.2f} %"
        said = f"of the other rows {where} {most}"
    else:
        said = f"none of the other rows {where} lies below it"
    said += f" ({count} row{'' if count == 1 else 's'})."
    if outside:
        said += f" Beyond its rows, and not judged: {', '.join(map(_named, outside))}."
    return start + said


def _named(row: Mapping[str, Any]) -> str:
    return f"{row['name']} at {100 * row['share']:.1f} %"
