"""The figures that MoE-SVD and MoBE checkpoints have beside the common ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from d2moe_vllm.format.kinds import ROLES, Role
from offline.report.analysed import TABLE_LIMIT
from offline.report.pictures import Figure, Heat, Lines, Panel, Scale, Series, Table, describe, short

Content = dict[str, Any]


def selection(content: Content) -> Figure | None:
    """MoE-SVD's figure of every layer, and which stayed dense."""
    found = content["checkpoint"]["statistics"].get("selection")
    if not found:
        return None
    x = [int(number) for number in found["sensitivity"]]
    values = list(found["sensitivity"].values())
    dense = [value if layer in found["dense"] else None for layer, value in zip(x, values, strict=True)]
    cut = [None if layer in found["dense"] else value for layer, value in zip(x, values, strict=True)]
    labelled = (("left as it was", dense), ("decomposed", cut))
    series = [Series(label, part) for label, part in labelled if any(value is not None for value in part)]
    rows = [[n, v, "left as it was" if n in found["dense"] else "decomposed"] for n, v in zip(x, values, strict=True)]
    return Figure(
        "selection",
        "Which layers were decomposed",
        "Layers with the highest figure matter most and were left as they were.",
        [Panel("selection", "Sensitivity of the layers",
               Lines(x, series, "layer", "S", zero=True, joined=False), describe(x, series))],
        [Table("Sensitivity by MoE-SVD", ["layer", "S", ""], rows)],
        ["S sums over experts and projections: share of the tokens × effective rank × share of outlying activations."],
    )  # fmt: skip


def halves(content: Content) -> Sequence[tuple[str, Role]]:
    """What projections that share their inputs' columns are called, and one of them."""
    first: tuple[str, Role] = ("gate and up", "gate") if "gate" in content["inputs"] else ("up", "up")
    return first, ("down", "down")


def shared_u(content: Content) -> Figure | None:
    """Which of the stored U's each expert uses, of checkpoints that share them."""
    layers = content["shared_u"]
    if not layers:
        return None
    panels, tables = [], []
    # gate and up have one index.
    for label, role in halves(content):
        found = {number: roles[role] for number, roles in layers.items() if role in roles}
        if not found:
            continue
        experts, most = len(next(iter(found.values()))), max(max(index) for index in found.values())
        cells = [[None if u < 0 else u for u in index] for index in found.values()]
        words = f"Of {label}, {experts} experts share at most {most + 1} different U's in each of {len(found)} layers."
        heat = Heat(cells, "expert", "layer", 0, max(most, 1), list(found), 0)
        panels.append(Panel(f"shared-u-{role}", label, heat, words))
        rows = [[f"layer {number}", *row] for number, row in zip(found, cells, strict=True)]
        tables.append(Table(f"U of each expert, {label}", ["", *(f"expert {e}" for e in range(experts))], rows))
    return Figure(
        "shared-u",
        "Which experts share a U",
        "Experts of a layer with the same number and colour have the same left factor.",
        panels,
        tables,
        ["An empty field is an expert without a delta."],
    )


def fit(content: Content) -> Figure | None:
    """MoBE's fits, start and end."""
    reports = content["checkpoint"]["statistics"]["layers"]
    layers = {number: report["fit"] for number, report in reports.items() if report.get("fit")}
    if not layers:
        return None
    x = [int(number) for number in layers]
    panels, rows = [], []
    for role in (role for role in ROLES if any(role in fits for fits in layers.values())):
        series = [
            Series(label, [fits[role][key] if role in fits else None for fits in layers.values()])
            for label, key in (("start", "start_error"), ("end of the fit", "error"))
        ]
        panels.append(Panel(f"fit-{role}", role, Lines(x, series, "layer", "relative error", zero=True),
                            describe(x, series)))  # fmt: skip
        rows += [[f"{number} {role}", *(fits[role].get(key) for key in ("start_error", "error", "steps", "ended"))]
                 for number, fits in layers.items() if role in fits]  # fmt: skip
    return Figure(
        "fit",
        "What the fit gained",
        "The two lines are one layer's error where the fit began and where it ended; their distance is its worth.",
        panels,
        [Table("Fits", ["layer", "error at the start", "at the end", "steps", "ended"], rows)],
        ["Over all experts of the layer together, before rounding."],
    )


def alphas(content: Content) -> Figure | None:
    """How MoBE's experts are mixed."""
    found = {(number, role): rows for number, roles in content["alphas"].items() for role, rows in roles.items()}
    if not found:
        return None
    panels = [Panel("alphas-scale", "Colours", Scale("weight of a basis", 0, 1), "From 0 (dark) to 1 (light).")]
    for (number, role), rows in found.items():
        largest = [max(row) for row in rows]
        words = (
            f"{len(rows)} experts mixed from {len(rows[0])} bases; an expert's largest weight is "
            f"{short(min(largest), 3)} to {short(max(largest), 3)}."
        )
        heat = Heat(rows, "basis", "expert", 0, 1, digits=2)
        panels.append(Panel(f"alphas-{number}-{role}", f"layer {number}, {role}", heat, words))
    return Figure(
        "alphas",
        "How the experts are mixed",
        "Each row is an expert, each column a basis: light is a large weight, and the weights of a row sum to 1.",
        panels,
        _alpha_tables(found),
        small=True,
    )


def _alpha_tables(found: dict[tuple[str, str], list[list[float]]]) -> list[Table]:
    """Every weight, or of many experts what is largest in each."""
    if sum(len(rows) * len(rows[0]) for rows in found.values()) <= TABLE_LIMIT:
        return [
            Table(f"Weights, layer {number}, {role}", ["expert", *(f"basis {j}" for j in range(len(rows[0])))],
                  [[expert, *row] for expert, row in enumerate(rows)])
            for (number, role), rows in found.items()
        ]  # fmt: skip
    rows = []
    for (number, role), one in found.items():
        largest = [max(row) for row in one]
        rows.append([f"{number} {role}", min(largest), sum(largest) / len(largest), max(largest)])
    heads = ["layer", "lowest", "mean", "highest"]
    return [Table("An expert's largest weight (all: --json)", heads, rows)]
