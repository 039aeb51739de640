"""What the pictures and tables of a report hold: plain data, which `plots.py` draws and `page.py` writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

Number = float | int
Matrix = Sequence[Sequence[Number | None]]


@dataclass(frozen=True)
class Series:
    """One line: a value per place on the x axis, None where there is none; low and high: a band around it."""

    label: str
    values: Sequence[Number | None]
    low: Sequence[Number | None] | None = None
    high: Sequence[Number | None] | None = None


@dataclass(frozen=True)
class Lines:
    """x: places, in their units. level: (value, words) of a horizontal line to compare with; zero: the y axis starts
    there; joined: whether lines run between the marks."""

    x: Sequence[Number]
    series: Sequence[Series]
    x_label: str
    y_label: str
    log: bool = False
    level: tuple[Number, str] | None = None
    zero: bool = False
    joined: bool = True


@dataclass(frozen=True)
class Trace:
    """One line of `Traces`, at places of its own, (x, y) by rising x. main: what the others are compared with."""

    label: str
    points: Sequence[tuple[Number, Number]]
    main: bool = False


@dataclass(frozen=True)
class Traces:
    """Lines over a logarithmic x axis. top: the highest y that is shown; what lies above it is marked at the border.
    level: as of `Lines`; between: a range of x to point out."""

    traces: Sequence[Trace]
    x_label: str
    y_label: str
    top: Number
    level: tuple[Number, str]
    between: tuple[Number, Number]


@dataclass(frozen=True)
class Bars:
    """Horizontal bars of parts, one after the other. parts: (label, a value per bar)."""

    names: Sequence[str]
    parts: Sequence[tuple[str, Sequence[Number]]]
    x_label: str


@dataclass(frozen=True)
class Heat:
    """A matrix as colours between low and high; None is left empty. digits: of the numbers in the cells, which are
    written where they fit; None: no numbers."""

    values: Matrix
    x_label: str
    y_label: str
    low: float
    high: float
    y_names: Sequence[str] = ()
    digits: int | None = None


@dataclass(frozen=True)
class Scale:
    """What the colours of a figure's heat maps mean. marks: values to point out, with words."""

    label: str
    low: float
    high: float
    marks: Sequence[tuple[float, str]] = ()


Picture = Lines | Traces | Bars | Heat | Scale


@dataclass(frozen=True)
class Panel:
    """One picture. words: what it shows, for those who do not see it; name: of its file and its id."""

    name: str
    title: str
    picture: Picture
    words: str


@dataclass(frozen=True)
class Table:
    """Numbers of a figure as they are; people see them rounded to so many significant digits."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    digits: int = 4

    def to_json(self) -> dict[str, Any]:
        return {"caption": self.caption, "columns": list(self.columns), "rows": [list(row) for row in self.rows]}


@dataclass(frozen=True)
class Figure:
    """A section of the page. reading: one sentence on how to read it; notes: what else has to be known; small: many
    little panels, two beside each other on a phone."""

    name: str
    title: str
    reading: str
    panels: Sequence[Panel]
    tables: Sequence[Table]
    notes: Sequence[str] = ()
    small: bool = False

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "title": self.title,
            "reading": self.reading,
            "notes": list(self.notes),
            "panels": [panel.name for panel in self.panels],
            "tables": [table.to_json() for table in self.tables],
        }


@dataclass(frozen=True)
class Missing:
    """A figure that is left out; why: a sentence that names the option which brings it."""

    name: str
    title: str
    why: str

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "title": self.title, "why": self.why}


@dataclass
class Report:
    """All figures of one checkpoint, in the order of the page."""

    figures: list[Figure] = field(default_factory=list)
    missing: list[Missing] = field(default_factory=list)


def short(value: Any, digits: int = 4) -> str:
    """A number as people read it: 1,234, 0.2423; a dash where there is none."""
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        return f"{value:,}"
    if value == 0:
        return "0"
    if not 1e-4 <= abs(value) < 1e7:
        return f"{value:.{digits - 1}e}"
    whole = len(str(int(abs(value)))) if abs(value) >= 1 else 0
    return f"{value:,.{max(digits - whole, 0)}f}"


def describe(x: Sequence[Number], series: Sequence[Series], unit: str = "layer") -> str:
    """The alternative text of a line chart: per line its first, last, lowest and highest value."""
    sentences = []
    for one in series:
        found = [(place, value) for place, value in zip(x, one.values, strict=True) if value is not None]
        if not found:
            continue
        (first, start), (last, end) = found[0], found[-1]
        low, high = min(found, key=lambda pair: pair[1]), max(found, key=lambda pair: pair[1])
        sentences.append(
            f"{one.label}: from {short(start)} at {unit} {first} to {short(end)} at {unit} {last}; "
            f"lowest {short(low[1])} at {low[0]}, highest {short(high[1])} at {high[0]}."
        )
    return " ".join(sentences)
