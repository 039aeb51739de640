"""Puts a report into one HTML page with nothing outside of it, and its pictures into files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from d2moe_vllm import __version__
from offline.io.units import size
from offline.methods import find_method
from offline.report.figures import as_it_was
from offline.report.pictures import Figure, Report, short
from offline.report.plots import png, svg
from offline.report.template import render

UNKNOWN = "not recorded"
ENOUGH = 18
"""Letters of a panel's title that says by itself what it shows."""


def page(content: dict[str, Any], report: Report) -> str:
    """The page; the same bytes for the same content."""
    checkpoint = content["checkpoint"]
    name, method = checkpoint["source"]["name"], find_method(checkpoint["method"]).title
    return render(
        Path(__file__).with_name("page.html"),
        command="report",
        title=f"{name}, compressed by {method}: report",
        name=name,
        method=method,
        version=__version__,
        tiles=tiles(content),
        facts=facts(content),
        recipe=yaml.safe_dump(content["recipe"], sort_keys=False),
        figures=report.figures,
        missing=report.missing,
        widths=_widths(report),
        draw=_draw,
        cell=_cell,
    )


def write_figures(folder: Path, report: Report) -> list[str]:
    """Every picture as NAME.png into an existing folder; returns the names."""
    names = []
    for figure in report.figures:
        for panel in figure.panels:
            path = folder / f"{panel.name}.png"
            small = _small(figure, panel.name)
            # What stands above a panel on the page, as far as there is room for it.
            title = panel.title if small or len(panel.title) > ENOUGH else f"{figure.title}: {panel.title}"
            png(panel, title, path, small=small)
            names.append(path.name)
    return names


def tiles(content: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The few figures that matter most: (value, what it is, more about it)."""
    checkpoint, rows = content["checkpoint"], content["perplexity"]
    source, experts = checkpoint["source"], checkpoint["experts"]
    found = [
        (f"{100 * checkpoint['stored_ratio']:.1f} %", "of the bytes are gone",
         f"{size(source['bytes'])} → {size(checkpoint['bytes'])}"),
        (f"{100 * (1 - experts['bytes'] / experts['dense_bytes']):.1f} %", "of the compressed layers' experts are gone",
         f"{size(experts['dense_bytes'])} → {size(experts['bytes'])}"),
    ]  # fmt: skip
    layers = checkpoint["layers"]
    # What was left as it was has an error of exactly zero, which says nothing about what was compressed.
    errors = [value for number, report in checkpoint["statistics"]["layers"].items()
              for role, values in report["relative_error"].items()
              for value in values if not as_it_was(layers[number], role)]  # fmt: skip
    found.append(
        (f"{sum(errors) / len(errors):.3f}", "mean relative error", f"worst of all matrices {max(errors):.3f}")
    )
    if rows and rows[0]["before"] is not None:
        change = 100 * (rows[0]["after"] / rows[0]["before"] - 1)
        kept = rows[0]["recovery"]
        more = "" if kept is None else f", recovery {100 * kept:.1f} %"
        found.append((f"{change:+.1f} %", f"perplexity on {rows[0]['text']}",
                      f"{short(rows[0]['before'])} → {short(rows[0]['after'])}{more}"))  # fmt: skip
    elif rows:
        found.append((short(rows[0]["after"]), f"perplexity on {rows[0]['text']}", "the original's was not measured"))
    return found


def facts(content: dict[str, Any]) -> list[tuple[str, str]]:
    """What was compressed and how."""
    checkpoint, recipe = content["checkpoint"], content["recipe"]
    source, statistics = checkpoint["source"], checkpoint["statistics"]
    calibration = statistics.get("calibration", {})
    versions = ", ".join(f"{name} {version}" for name, version in statistics.get("versions", {}).items())
    windows = (f"{calibration.get('windows')} windows of {calibration.get('seq_len')} tokens, seed "
               f"{calibration.get('seed')}") if calibration else UNKNOWN  # fmt: skip
    return [
        ("Original", source["name"]),
        ("Revision", source["revision"] or "none recorded: it was a local folder"),
        ("Family", checkpoint["family"]),
        ("Method", find_method(checkpoint["method"]).title),
        ("Stored", checkpoint["stores"]),
        ("Ratio", f"{recipe.get('ratio', UNKNOWN)} asked for ({recipe.get('accounting', 'stored')}), "
                  f"{checkpoint['stored_ratio']:.4f} of the bytes gone"),
        ("Parameters", f"{source['parameters']:,} → {checkpoint['parameters']:,}"),
        ("Bytes", f"{source['bytes']:,} → {checkpoint['bytes']:,}"),
        ("Calibration", windows),
        ("SHA-256 of the calibration tokens", calibration.get("tokens_sha256", UNKNOWN)),
        ("Dynamic selection", f"scope {checkpoint['scope']}"),
        ("Written by", f"{statistics.get('written_by', UNKNOWN)} ({versions or 'versions not recorded'})"),
        ("Checkpoint format", f"version {checkpoint['format_version']}"),
    ]  # fmt: skip


def _widths(report: Report) -> dict[str, str]:
    """Figure -> class of its section: those of one panel stand in pairs, where two follow each other."""
    found: dict[str, str] = {}
    waiting: str | None = None
    for figure in report.figures:
        single = len(figure.panels) == 1
        found[figure.name] = "" if single and waiting else "wide alone" if single else "wide"
        if single and waiting:
            found[waiting] = ""
        waiting = figure.name if single and not waiting else None
    return found


def _small(figure: Figure, name: str) -> bool:
    return figure.small and not name.endswith("-scale")


def _draw(figure: Figure, panel: Any) -> Markup:
    return Markup(svg(panel, small=_small(figure, panel.name)))


def _cell(value: Any, digits: int) -> Markup:
    """A table's number with its full value beside what is shown."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return Markup('<data value="{}">{}</data>').format(repr(value), short(value, digits))
    return Markup("{}").format(short(value))
