"""Draws pictures with matplotlib: as SVG that takes its colours from the page, and as PNG."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure as Canvas
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import ScaledTranslation

from offline.report.pictures import Bars, Heat, Lines, Panel, Picture, Scale, Series, Trace, Traces

WIDTH, SMALL, WIDE, TITLE = 340, 168, 640, 32
"""Widths of a panel and height of its title, in points. About as wide as a phone is in pixels: drawn wider and scaled
down, no label could be read there. WIDE: of a file that stands in a document."""
COLOURS = {
    "ink": "#1f2430", "dim": "#5a6473", "line": "#d5dae2",
    "c1": "#00629e", "c2": "#b84a00", "c3": "#00785a", "c4": "#8a3d79",
}  # fmt: skip
"""Name of a page's colour -> what stands for it while drawing, and is its value on white."""
DARK = {
    "ink": "#e8ebf1", "dim": "#a4afbf", "line": "#343c4a",
    "c1": "#63b8f2", "c2": "#ff9a5c", "c3": "#4fd0a6", "c4": "#e39ad2",
}  # fmt: skip
"""The same on a dark page."""
SCREENS = {"light": COLOURS, "dark": DARK}
CYCLE = ("c1", "c2", "c3", "c4")
MARKERS, DASHES, HATCHES = ("o", "s", "^", "D"), ("-", "--", "-.", ":"), ("", "///", "...", "xxx", "\\\\\\")
"""Lines and bars are told apart without their colours too."""
MANY = ("s", "^", "D", "v", "P", "X", "p", "h", "<", ">", "*", "d")
"""Marks of lines that are compared with a main one, which has a disc."""
TICKS = (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100)
"""Of a logarithmic axis in percent."""
ENTRY = 112
"""Points that an entry of a legend takes."""
HEAT = "cividis"
WHOLE: dict[str, Any] = {"integer": True, "min_n_ticks": 1, "steps": [1, 2, 5, 10]}
"""Ticks at whole numbers only: there is no layer 1.5."""
STYLE: dict[str, Any] = {
    "font.size": 11, "axes.labelsize": 10.5, "xtick.labelsize": 10, "ytick.labelsize": 10, "legend.fontsize": 10.5,
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.8, "axes.grid": True,
    "grid.linewidth": 0.7, "grid.color": COLOURS["line"], "axes.axisbelow": True, "axes.edgecolor": COLOURS["dim"],
    "axes.labelcolor": COLOURS["ink"], "text.color": COLOURS["ink"], "xtick.color": COLOURS["dim"],
    "ytick.color": COLOURS["dim"], "xtick.labelcolor": COLOURS["ink"], "ytick.labelcolor": COLOURS["ink"],
    "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none", "legend.frameon": False,
    "lines.linewidth": 1.8, "lines.markersize": 5, "hatch.linewidth": 0.6, "svg.fonttype": "none",
    "font.family": ["DejaVu Sans"], "legend.handlelength": 2.4, "legend.borderaxespad": 0.2,
    "legend.columnspacing": 1.2, "text.parse_math": False,
}  # fmt: skip
SVG = "http://www.w3.org/2000/svg"


@contextmanager
def style(more: Mapping[str, Any]) -> Iterator[None]:
    """Ours, whatever matplotlibrc the user has."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update({**STYLE, **more})
        yield


def svg(panel: Panel, *, small: bool = False) -> str:
    """The panel as an SVG element to stand in a page, the same bytes every time: colours are the page's variables, its
    words are the alternative text."""
    with style({"svg.hashsalt": panel.name}):
        buffer = io.StringIO()
        _canvas(panel.picture, SMALL if small else WIDTH).savefig(buffer, format="svg", metadata={"Date": None})
    return _tidy(buffer.getvalue(), panel)


def svg_file(panel: Panel, screen: str, width: int = WIDE) -> str:
    """The panel as a file of its own in the colours of a light or dark screen, the same bytes every time."""
    with style({"svg.hashsalt": panel.name}):
        buffer = io.StringIO()
        canvas = _canvas(panel.picture, width, TITLE)
        canvas.suptitle(panel.title, fontsize=12, x=0.01, ha="left")
        canvas.savefig(buffer, format="svg", metadata={"Date": None})
    text = re.sub(r"var\(--(\w+)\)", lambda found: SCREENS[screen][found[1]], _tidy(buffer.getvalue(), panel))
    return text.replace("<svg ", f'<svg width="{width}" ', 1) + "\n"


def png(panel: Panel, title: str, path: Path, *, small: bool = False) -> None:
    """The panel with a title on white, the same bytes every time."""
    with style({"savefig.facecolor": "white"}):
        canvas = _canvas(panel.picture, SMALL if small else WIDTH, TITLE)
        canvas.suptitle(title, fontsize=11)
        canvas.savefig(path, format="png", dpi=288, metadata={"Software": None})


def _canvas(picture: Picture, width: int, extra: int = 0) -> Canvas:
    """A drawing of so many points; extra: more of its height."""
    height = _height(picture, width) + extra
    # On a page the distance to what is around it is the page's.
    pad = 0.1 if extra else 0.03
    layout = ConstrainedLayoutEngine(w_pad=pad, h_pad=pad)
    canvas = Canvas(figsize=(width / 72, height / 72), layout=layout)
    axes = canvas.subplots()
    DRAW[type(picture)](axes, picture, width)
    return canvas


def _height(picture: Picture, width: int) -> float:
    if isinstance(picture, Scale):
        return 62
    if isinstance(picture, Bars):
        return (94 if len(picture.parts) > 1 else 52) + 38 * len(picture.names)
    if isinstance(picture, Traces):
        return 200 + 0.3 * width + 16 * -(-len(picture.traces) // (width // ENTRY))
    if isinstance(picture, Heat):
        rows, columns = len(picture.values), len(picture.values[0])
        # Square cells where there are as many rows as columns, flat ones else.
        return width + 8 if rows == columns else 52 + rows * min(max(300 / rows, 4), 26)
    return 225


def _lines(axes: Any, picture: Lines, width: int) -> None:
    for number, (one, colour) in enumerate(zip(picture.series, itertools.cycle(CYCLE), strict=False)):
        _line(axes, picture, one, number, COLOURS[colour])
    if picture.log:
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        for which in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            which(FuncFormatter(lambda value, _: f"{value:g}"))
    elif picture.zero:
        axes.set_ylim(0, 1.06 * max(axes.get_ylim()[1], 1e-9))
    if picture.level:
        _level(axes, *picture.level)
    axes.set_xlabel(picture.x_label)
    axes.set_ylabel(picture.y_label)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, **WHOLE))
    if len(picture.series) > 1:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(picture.series))


def _line(axes: Any, picture: Lines, one: Series, number: int, colour: str) -> None:
    values = _floats(one.values)
    if one.low is not None and one.high is not None:
        low, high = _floats(one.low), _floats(one.high)
        axes.fill_between(picture.x, low, high, color=colour, alpha=0.16, linewidth=0)
    style = DASHES[number % len(DASHES)] if picture.joined else "none"
    axes.plot(picture.x, values, color=colour, linestyle=style, marker=MARKERS[number % len(MARKERS)], label=one.label)


def _level(axes: Any, value: float, words: str, *, right: bool = True) -> None:
    """right: where the words stand."""
    axes.axhline(value, color=COLOURS["dim"], linewidth=1, linestyle=(0, (2, 2)))
    axes.annotate(words, (int(right), value), xycoords=("axes fraction", "data"), xytext=(0, 3), fontsize=9.5,
                  textcoords="offset points", ha="right" if right else "left", va="bottom",
                  color=COLOURS["dim"])  # fmt: skip


def _traces(axes: Any, picture: Traces, width: int) -> None:
    places = [x for one in picture.traces for x, _ in one.points]
    shown = [y for one in picture.traces for _, y in one.points if y <= picture.top]
    low = min([*shown, picture.level[0]])
    axes.set_xscale("log")
    axes.set_xlim(0.92 * min([*places, picture.between[0]]), 108)
    axes.set_ylim(low - 0.06 * (picture.top - low), picture.top)
    axes.axvspan(*picture.between, color=COLOURS["line"], alpha=0.35, linewidth=0)
    taken: list[tuple[float, int]] = []
    for number, one in enumerate(picture.traces):
        _trace(axes, picture, one, number, taken)
    _level(axes, *picture.level, right=False)
    axes.set_xlabel(picture.x_label)
    axes.set_ylabel(picture.y_label)
    axes.xaxis.set_minor_locator(NullLocator())
    inside = [tick for tick in TICKS if axes.get_xlim()[0] <= tick]
    axes.set_xticks(inside, [f"{tick:g}" for tick in inside])
    axes.figure.legend(loc="outside lower left", ncols=width // ENTRY, handlelength=2.2)


def _trace(axes: Any, picture: Traces, one: Trace, number: int, taken: list[tuple[float, int]]) -> None:
    """taken: (place, how many marks) at the upper border."""
    colour = COLOURS["c1" if one.main else ("c2", "c3", "c4", "dim")[number % 4]]
    look: dict[str, Any] = {"color": colour, "marker": "o" if one.main else MANY[number % len(MANY)]}
    # The main one last, so that nothing hides it.
    look |= {"linewidth": 2.6, "markersize": 6, "zorder": 4} if one.main else {"linewidth": 1.1, "zorder": 3}
    x, y = zip(*one.points, strict=True)
    inside = [place for place, value in enumerate(y) if value <= picture.top]
    axes.plot(x, y, linestyle="-" if one.main else DASHES[1 + number % 3], markevery=inside, label=one.label, **look)
    for place in (place for place, value in zip(x, y, strict=True) if value > picture.top):
        beside = sum(1 for other, _ in taken if abs(np.log(other / place)) < 0.06)
        taken.append((place, beside))
        # Marks at one place stand below one another.
        down = ScaledTranslation(0, -8.5 * beside / 72, axes.figure.dpi_scale_trans)
        axes.plot([place], [picture.top], linestyle="none", markerfacecolor="none", clip_on=False,
                  transform=axes.transData + down, **look)  # fmt: skip


def _floats(values: Any) -> Any:
    return np.array([np.nan if value is None else float(value) for value in values])


def _bars(axes: Any, picture: Bars, width: int) -> None:
    places = np.arange(len(picture.names))
    ends = np.zeros(len(picture.names))
    longest = max(sum(values[place] for _, values in picture.parts) for place in range(len(picture.names)))
    several = len(picture.parts) > 1
    colours = [COLOURS[name] for name in (("dim", *CYCLE) if several else CYCLE)]
    for (label, values), colour, hatch in zip(picture.parts, colours, HATCHES, strict=False):
        axes.barh(places, values, left=ends, height=0.62, color=colour, label=label, hatch=hatch, alpha=0.9,
                  edgecolor=COLOURS["line"], linewidth=0.6)  # fmt: skip
        ends += np.asarray(values, dtype=float)
    for place, end in zip(places, ends, strict=True):
        axes.annotate(f"{end:.4g}", (end, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=10)
    axes.set_xlim(0, 1.14 * longest)
    axes.set_yticks(places, picture.names)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(picture.x_label)
    if several:
        axes.legend(loc="lower left", bbox_to_anchor=(-0.16, 1.0), ncols=2, handlelength=1.2)


def _heat(axes: Any, picture: Heat, width: int) -> None:
    values = np.array([[np.nan if cell is None else cell for cell in row] for row in picture.values], dtype=float)
    rows, columns = values.shape
    axes.imshow(values, cmap=HEAT, vmin=picture.low, vmax=picture.high, aspect="auto", interpolation="none")
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set_xlabel(picture.x_label)
    axes.set_ylabel(picture.y_label)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, **WHOLE))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=8, **WHOLE))
    if picture.y_names:
        step = -(-rows // 16)
        axes.set_yticks(range(0, rows, step), list(picture.y_names)[::step])
    if picture.digits is None or columns > (8 if width > SMALL else 4) or rows > 16:
        return
    span = (picture.high - picture.low) or 1.0
    for row, column in np.ndindex(rows, columns):
        value = values[row, column]
        if not np.isnan(value):
            # Black on the light half of the colours, white on the dark one: at least 4.5 to 1 everywhere.
            ink = "black" if (value - picture.low) / span > 0.5 else "white"
            axes.text(column, row, f"{value:,.{picture.digits}f}", color=ink, ha="center", va="center", fontsize=9)


def _scale(axes: Any, picture: Scale, width: int) -> None:
    ramp = np.linspace(picture.low, picture.high, 256)[None]
    axes.imshow(ramp, cmap=HEAT, aspect="auto", extent=(picture.low, picture.high, 0, 1))
    axes.set_yticks([])
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.set_xlabel(picture.label)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.set_xlim(picture.low, picture.high)
    for value, words in picture.marks:
        if picture.low <= value <= picture.high:
            axes.plot([value, value], [0, 1.0], color=COLOURS["c2"], linewidth=2.5)
            right = value > (picture.low + picture.high) / 2
            axes.annotate(words, (value, 1), xytext=(0, 2), textcoords="offset points", va="bottom", fontsize=9.5,
                          ha="right" if right else "left")  # fmt: skip


DRAW: dict[type, Any] = {Lines: _lines, Traces: _traces, Bars: _bars, Heat: _heat, Scale: _scale}


def _tidy(text: str, panel: Panel) -> str:
    """matplotlib's SVG file as an element of a page: no metadata, no style for the whole page, no id but those that are
    used, the page's colours and fonts."""
    for prefix, name in (("", SVG), ("xlink", "http://www.w3.org/1999/xlink")):
        ElementTree.register_namespace(prefix, name)
    root = ElementTree.fromstring(text)
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', text))
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("metadata", "}style")):
                parent.remove(child)
        if parent.get("id") not in used:
            parent.attrib.pop("id", None)
        _take_page_style(parent.attrib)
    for attribute in ("width", "height", "version"):
        root.attrib.pop(attribute, None)
    root.attrib |= {"class": "plot", "role": "img", "aria-labelledby": f"{panel.name}-title {panel.name}-words"}
    for place, (tag, words) in enumerate((("title", panel.title), ("desc", panel.words))):
        element = ElementTree.Element(f"{{{SVG}}}{tag}", {"id": f"{panel.name}-{'words' if place else 'title'}"})
        element.text = words
        root.insert(place, element)
    return ElementTree.tostring(root, encoding="unicode")


def _take_page_style(attributes: dict[str, str]) -> None:
    """Colours and fonts of one element become the page's; an attribute cannot hold a variable, so it becomes style."""
    plain = [f"{name}: {attributes.pop(name)}" for name in ("fill", "stroke") if attributes.get(name) in _NAMES]
    style = "; ".join([*plain, *filter(None, [attributes.get("style")])])
    for colour, name in _NAMES.items():
        style = style.replace(colour, f"var(--{name})")
    if style:
        attributes["style"] = re.sub(r"(font: [^;]*?px|font-family:)[^;]*", r"\1 system-ui, sans-serif", style)


_NAMES = {colour: name for name, colour in COLOURS.items()}
