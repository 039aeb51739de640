"""The frontier as a picture: perplexity by the bytes of the experts that are left, all rows, a panel for each text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from offline.compare.baselines import ROUNDED
from offline.compare.frontier import DEFAULT, LEAST, MOST, Point, default_curve, points
from offline.report.pictures import Panel, Trace, Traces, short

ROOM = 1.35
"""How far the picture reaches above the source, in parts of what the default's curve rises."""
FLAT = 1.2
"""The least that it reaches above the source, in parts of the source's perplexity."""


def panels(content: Mapping[str, Any]) -> list[tuple[Panel, list[str]]]:
    """Each with what has to be said beneath it. content: as `d2moe compare --json` prints it. Texts for which nothing
    has both figures have no panel."""
    rows, texts = content["rows"], [text["name"] for text in content["texts"]]
    (source,) = [row for row in rows if row["kind"] == "source"]
    drawn = []
    for number, text in enumerate(texts):
        if found := points(rows, text):
            picture = _picture(found, source["perplexity"][text])
            title, words = f"{content['source']['name']} on {text}", _words(picture, text)
            drawn.append((Panel(f"frontier-{number}", title, picture, words), _above(picture)))
    return drawn


def _picture(found: Sequence[Point], dense: float) -> Traces:
    return Traces(
        _traces(found),
        x_label="experts' bytes that are left, %",
        y_label="perplexity",
        top=_top(found, dense),
        level=(dense, f"source {dense:.2f}"),
        between=(100 * LEAST, 100 * MOST),
    )


def _top(found: Sequence[Point], dense: float) -> float:
    """Where the picture ends, so that what collapsed does not flatten the rest."""
    curve = default_curve(found)
    # A comparison without the default is shown up to its middle row.
    shown = [one.perplexity for one in curve] or sorted(one.perplexity for one in found)[: len(found) // 2 + 1]
    return max(dense + ROOM * (max(shown) - dense), FLAT * dense)


def _traces(found: Sequence[Point]) -> list[Trace]:
    """A line for each name, rounding to fewer and fewer bits being one; the default first."""
    lines: dict[str, list[Point]] = {}
    for one in sorted(found, key=lambda one: one.name != DEFAULT):
        lines.setdefault(one.name.rpartition("-")[0] if one.name in ROUNDED else one.name, []).append(one)
    return [
        Trace(name, sorted((100 * one.share, one.perplexity) for one in line), main=name == DEFAULT)
        for name, line in lines.items()
    ]


def _words(picture: Traces, text: str) -> str:
    dense = short(picture.level[0])
    said = [f"Perplexity on {text} by the bytes of the experts that are left; the source's is {dense}."]
    for one in picture.traces:
        said.append(f"{one.label}: " + ", ".join(f"{short(y)} at {x:.1f} %" for x, y in one.points) + ".")
    return " ".join([*said, *_above(picture)])


def _above(picture: Traces) -> list[str]:
    """What lies beyond the picture's upper border, as a sentence; nothing where nothing does."""
    counts = {one.label: sum(1 for _, y in one.points if y > picture.top) for one in picture.traces}
    names = [f"{count} of {name}" for name, count in counts.items() if count]
    if not names:
        return []
    return [f"Hollow marks at the upper border lie above {short(picture.top)}: {', '.join(names)}."]
