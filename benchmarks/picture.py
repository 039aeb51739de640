"""`make picture`: draws the README's picture from the table of docs/quality.md, for light and for dark screens."""

from __future__ import annotations

import io
import re
from pathlib import Path

from matplotlib.figure import Figure

from offline.report.plots import DASHES, MARKERS, style

ROOT = Path(__file__).resolve().parents[1]
QUALITY = ROOT / "docs" / "quality.md"
MODEL = "tiny-mixtral"
ROWS = {
    "mean base + plain SVD, uniform": "mean base, plain SVD",
    "uniform ranks, a pruned base (the paper's)": "the paper's uniform ranks",
    "**default**": "d2moe, default recipe",
}
"""Row of the table -> what the picture calls it; the last one is drawn on top."""
SCREENS = {
    "light": {"ink": "#1f2430", "dim": "#5a6473", "line": "#d5dae2", "lines": ("#5a6473", "#b84a00", "#00629e")},
    "dark": {"ink": "#e8ebf1", "dim": "#a4afbf", "line": "#3d4656", "lines": ("#a4afbf", "#ff9a5c", "#63b8f2")},
}


def measured() -> tuple[float, dict[str, list[tuple[int, float]]]]:
    """Perplexity of the uncompressed model, and per row of the table (percent removed, perplexity)."""
    page = QUALITY.read_text(encoding="utf-8")
    table = page.split("<!-- unseen -->")[1].split("<!-- /unseen -->")[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]
    heads, found = lines[0], dict[str, list[tuple[int, float]]]()
    for row, name in ROWS.items():
        (cells,) = [line for line in lines if line[0] == row]
        found[name] = [
            (int(match[1]), float(cell.strip("*")))
            for head, cell in zip(heads, cells, strict=True)
            if (match := re.fullmatch(rf"{MODEL} (\d+) %", head))
        ]
    dense = re.search(rf"Uncompressed: .*?\b{MODEL} ([\d.]+)", table)
    assert dense
    return float(dense[1]), found


def words() -> str:
    """The picture's text alternative: all of its numbers."""
    dense, found = measured()
    rows = (f"{name}: " + ", ".join(f"{value:.2f} at {ratio} %" for ratio, value in row) for name, row in found.items())
    return f"Perplexity of {MODEL} on wikitext2-valid.txt by share of its bytes removed. Uncompressed {dense:.2f}. " + (
        "; ".join(rows) + "."
    )


def draw(screen: str) -> str:
    """An SVG file, the same bytes every time."""
    colours, (dense, found) = SCREENS[screen], measured()
    with style({"svg.hashsalt": "picture", "text.color": colours["ink"]}):
        canvas = Figure(figsize=(640 / 72, 330 / 72), layout="constrained")
        axes = canvas.subplots()
        for number, (name, row) in enumerate(found.items()):
            x, y = zip((0, dense), *row, strict=True)
            colour = colours["lines"][number]
            axes.plot(x, y, color=colour, marker=MARKERS[-1 - number], linestyle=DASHES[2 - number], linewidth=2.2)
            axes.annotate(f"{name}  {y[-1]:.0f}", (x[-1], y[-1]), xytext=(9, 0), textcoords="offset points",
                          va="center", color=colour, fontsize=12)  # fmt: skip
        for ratio, value in found[ROWS["**default**"]][:-1]:
            axes.annotate(f"{value:.0f}", (ratio, value), xytext=(0, -8), textcoords="offset points", ha="center",
                          va="top", color=colours["lines"][-1], fontsize=12)  # fmt: skip
        axes.annotate(f"uncompressed {dense:.0f}", (0, dense), xytext=(4, -9), textcoords="offset points", va="top",
                      color=colours["dim"], fontsize=12)  # fmt: skip
        axes.set_yscale("log")
        axes.set_ylim(56, 300)
        axes.set_xlim(-2, 93)
        axes.set_xticks([0, 20, 40, 60], ["0 %", "20 %", "40 %", "60 %"])
        axes.set_yticks([60, 80, 100, 150, 200, 300], ["60", "80", "100", "150", "200", "300"])
        axes.minorticks_off()
        axes.set_xlabel("bytes removed from disk, of the whole model", loc="left", fontsize=12)
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
