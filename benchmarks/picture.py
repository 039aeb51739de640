"""`make picture`: draws the README's picture from the tables of docs/quality.md, for light and for dark screens."""

from __future__ import annotations

import io
import re
from pathlib import Path

from matplotlib.figure import Figure

from offline.report.plots import DASHES, MARKERS, style

ROOT = Path(__file__).resolve().parents[1]
QUALITY = ROOT / "docs" / "quality.md"
MODEL = "tiny-mixtral"
LOW_RANK, ONE, DEFAULT = "low-rank deltas, 16 bits", "one setting for all layers", "d2moe, the default"
"""What the picture calls its lines; the last one is drawn on top."""
TOP = 108
"""Perplexity at which the picture ends: what lies above it is said, not shown."""
SCREENS = {
    "light": {"ink": "#1f2430", "dim": "#5a6473", "line": "#d5dae2", "lines": ("#5a6473", "#b84a00", "#00629e")},
    "dark": {"ink": "#e8ebf1", "dim": "#a4afbf", "line": "#3d4656", "lines": ("#a4afbf", "#ff9a5c", "#63b8f2")},
}

PLACES = {LOW_RANK: (1, 12, 4, "left"), ONE: (-2, -10, 8, "right"), DEFAULT: (-4, 10, -12, "left")}
"""Line -> which of its points has its name beside it, how far right and above, and where the name begins."""

Points = list[tuple[float, float]]
"""(share of the experts' bytes that is left, in percent; perplexity), by falling share."""


def measured() -> tuple[float, dict[str, Points]]:
    """Perplexity of the uncompressed model, and every line's points."""
    found: dict[str, Points] = {LOW_RANK: [], ONE: [], DEFAULT: []}
    dense = 0.0
    for _, left, ours, loss, beside, *_ in _rows("frontier"):
        share, value = _number(left), _number(ours)
        dense = dense or value / (1 + _number(loss) / 100)
        found[DEFAULT].append((share, value))
        if beside:
            found[ONE].append((share, _number(beside)))
    for _, before, _, shares in _rows("version-1"):
        found[LOW_RANK].append((_number(shares.split(",")[0]), _number(before)))
    return round(dense), {name: sorted(points, reverse=True) for name, points in found.items()}


def _rows(table: str) -> list[list[str]]:
    """The cells of MODEL's rows."""
    text = QUALITY.read_text(encoding="utf-8").split(f"<!-- {table} -->")[1].split(f"<!-- /{table} -->")[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    return [line for line in lines if line[0].startswith(f"`{MODEL}`,")]


def _number(cell: str) -> float:
    return float(cell.removesuffix("%"))


def words() -> str:
    """The picture's text alternative: all of its numbers."""
    dense, found = measured()
    rows = (
        f"{name}: " + ", ".join(f"{value:.2f} at {left:.1f} %" for left, value in row) for name, row in found.items()
    )
    return (
        f"Perplexity of {MODEL} on wikitext2-valid.txt by the share of its experts' bytes that is left. "
        f"Uncompressed {dense:.0f}. " + "; ".join(rows) + "."
    )


def draw(screen: str) -> str:
    """An SVG file, the same bytes every time."""
    colours, (dense, found) = SCREENS[screen], measured()
    with style({"svg.hashsalt": "picture", "text.color": colours["ink"]}):
        canvas = Figure(figsize=(640 / 72, 360 / 72), layout="constrained")
        axes = canvas.subplots()
        axes.axhline(dense, color=colours["dim"], linewidth=1)
        axes.annotate(f"uncompressed {dense:.0f}", (72, dense), xytext=(0, -5), textcoords="offset points", va="top",
                      color=colours["dim"], fontsize=12)  # fmt: skip
        for number, (name, row) in enumerate(found.items()):
            colour = colours["lines"][number]
            x, y = zip(*row, strict=True)
            axes.plot(x, y, color=colour, marker=MARKERS[-1 - number], linestyle=DASHES[2 - number], linewidth=2.2)
            axes.annotate(name, row[PLACES[name][0]], xytext=PLACES[name][1:3], textcoords="offset points",
                          ha=PLACES[name][3], color=colour, fontsize=12)  # fmt: skip
        axes.set_xscale("log")
        axes.set_xlim(80, 4.2)
        axes.set_ylim(62, TOP)
        axes.set_xticks([50, 25, 15, 10, 7, 5], ["50 %", "25 %", "15 %", "10 %", "7 %", "5 %"])
        axes.minorticks_off()
        axes.set_xlabel("experts' bytes that are left", loc="left", fontsize=12)
        axes.set_title(
            f"{MODEL}, 4.4 M parameters: perplexity on unseen text (lower is better)", loc="left", fontsize=13
        )
        axes.grid(color=colours["line"])
        axes.tick_params(colors=colours["dim"], labelcolor=colours["ink"], labelsize=11.5)
        axes.spines[:].set_color(colours["dim"])
        axes.xaxis.label.set_color(colours["ink"])
        buffer = io.StringIO()
        canvas.savefig(buffer, format="svg", metadata={"Date": None})
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL)
    text = text.replace("'DejaVu Sans'", "system-ui, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif")
    return re.sub(r"(<svg [^>]*>)", rf"\1\n <title>{MODEL}, compressed</title>\n <desc>{words()}</desc>", text, count=1)


def main() -> None:
    for screen in SCREENS:
        path = ROOT / "docs" / f"picture-{screen}.svg"
        path.write_text(draw(screen), encoding="utf-8")
        print(f"written: {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
