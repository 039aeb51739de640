"""The figures of the analyses that `d2moe inspect --analyses` makes: CKA, energy retention, sensitivity."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from d2moe_vllm.format.kinds import Role, roles_of
from offline.methods import find_method
from offline.report.pictures import Figure, Heat, Lines, Missing, Panel, Scale, Series, Table, describe, short

TABLE_LIMIT = 5000
"""Numbers in one table of a page; where there are more, the page has a digest and --json all of them."""
QUICK = "Left out by --quick, since it reads every weight: leave that option out."


def sensitivity(content: dict[str, Any]) -> Figure | Missing | None:
    """Of the gradients; a checkpoint that needed none has only its errors, which have a figure already."""
    title = "Sensitivity of the layers"
    reports = content["checkpoint"]["statistics"]["layers"]
    layers = {number: report["sensitivity"] for number, report in reports.items() if "sensitivity" in report}
    if not layers:
        if not find_method(content["checkpoint"]["method"]).has_base:
            return None
        why = "Not recorded: this recipe needed no gradients. One with `allocation: adaptive` records it."
        return Missing("sensitivity", title, why)
    x = [int(number) for number in layers]
    roles = roles_of(next(iter(layers.values())))
    means = {role: [sum(found[role]) / len(found[role]) for found in layers.values()] for role in roles}
    series = [Series(role, values) for role, values in means.items()]
    rows = [[number, *(means[role][place] for role in roles)] for place, number in enumerate(x)]
    return Figure(
        "sensitivity",
        title,
        "How much a unit of error at a projection's output costs the model: the higher, the more bytes it deserves.",
        [Panel("sensitivity", "Cost of a unit of squared error", Lines(x, series, "layer", "sensitivity", log=True),
               describe(x, series))],
        [Table("Sensitivity, mean of experts", ["layer", *roles], rows)],
        ["Squared gradient of the log-likelihood at the projection's output, summed over the calibration tokens; the "
         "axis is logarithmic."],
    )  # fmt: skip


def cka(content: dict[str, Any]) -> Figure | Missing:
    title = "How alike the experts are"
    analyses = content["analyses"]
    if analyses is None:
        return Missing("cka", title, QUICK)
    found = {(number, role): layer[role] for number, layer in analyses["layers"].items() for role in roles_of(layer)}
    others = {key: _pairs(one["cka"]) for key, one in found.items()}
    values = [value for pairs in others.values() for value in pairs]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    high = high if high > low else low + 0.01
    unrelated = next(iter(found.values()))["cka_of_unrelated"]
    panels = [
        Panel(
            "cka-scale",
            "Colours",
            Scale("linear CKA", low, high, [(unrelated, "unrelated")]),
            f"From {short(low, 3)} (dark) to {short(high, 3)} (light); matrices that have nothing to do with each "
            f"other have {short(unrelated, 3)}.",
        )
    ]
    for (number, role), one in found.items():
        pairs = others[number, role]
        words = f"CKA between different experts: {short(min(pairs), 3)} to {short(max(pairs), 3)}, mean " \
                f"{short(sum(pairs) / len(pairs), 3)}." if pairs else "There is one expert only."  # fmt: skip
        # An expert is always equal to itself: left empty, so that the colours tell the others apart.
        cells = [[None if a == b else value for b, value in enumerate(row)] for a, row in enumerate(one["cka"])]
        heat = Heat(cells, "expert", "expert", low, high)
        panels.append(Panel(f"cka-{number}-{role}", f"layer {number}, {role}", heat, words))
    whose = "the originals" if analyses["experts_from"] == "source" else "the experts as rebuilt from the checkpoint"
    notes = [f"Between {whose}, over the hidden dimensions that all experts share; the diagonal is left empty.",
             f"Unrelated matrices of this shape have {short(unrelated, 3)}, not 0."]  # fmt: skip
    if analyses["experts_from"] != "source":
        notes.append("Experts that share a base look more alike than their originals: --source SRC compares those.")
    return Figure(
        "cka",
        title,
        "Light: two experts' weights have much in common, which a shared base can hold once for both.",
        panels,
        _cka_tables(found, others),
        notes,
        small=True,
    )


def _pairs(matrix: list[list[float]]) -> list[float]:
    return [value for a, row in enumerate(matrix) for b, value in enumerate(row) if a < b]


def _cka_tables(found: Mapping[tuple[str, Role], Any], others: Mapping[tuple[str, Role], list[float]]) -> list[Table]:
    """Every number, or of many experts the lowest, mean and highest of each matrix."""
    if sum(len(one["cka"]) ** 2 for one in found.values()) <= TABLE_LIMIT:
        return [
            Table(f"CKA, layer {number}, {role}", ["expert", *map(str, range(len(one["cka"])))],
                  [[expert, *row] for expert, row in enumerate(one["cka"])], digits=2)
            for (number, role), one in found.items()
        ]  # fmt: skip
    rows = [
        [f"{number} {role}", min(pairs), sum(pairs) / len(pairs), max(pairs)]
        for (number, role), pairs in others.items()
    ]
    return [Table("CKA between different experts (all pairs: --json)", ["layer", "lowest", "mean", "highest"], rows)]


def energy(content: dict[str, Any]) -> Figure | Missing:
    title = "How much a part of the rank holds"
    analyses = content["analyses"]
    if analyses is None:
        return Missing("energy", title, QUICK)
    shares, layers = analyses["shares_of_rank"], analyses["layers"]
    panels, rows = [], []
    for role in roles_of(next(iter(layers.values()))):
        series = []
        # Without a base the delta is the whole expert: the same curve twice.
        based = any(layer[role]["energy"]["base"] for layer in layers.values())
        for kind in ("experts", "base", "deltas") if based else ("experts",):
            curves = [layer[role]["energy"][kind] for layer in layers.values()]
            curves = [curve for curve in curves if curve is not None]
            if not curves:
                continue
            points = [[100 * value for value in values] for values in zip(*curves, strict=True)]
            means = [sum(values) / len(values) for values in points]
            series.append(Series(kind, means, [min(v) for v in points], [max(v) for v in points]))
            rows += [[f"{role} {kind}, {share} %", mean, min(v), max(v)]
                     for share, mean, v in zip(shares, means, points, strict=True)]  # fmt: skip
        picture = Lines(shares, series, "share of the rank, %", "energy kept, %", zero=True)
        panels.append(Panel(f"energy-{role}", role, picture, describe(shares, series, "%")))
    whose = "the originals" if analyses["experts_from"] == "source" else "as rebuilt from the checkpoint"
    deltas = "original minus base" if analyses["experts_from"] == "source" else "as stored"
    notes = [
        f"Experts: {whose}; base, where there is one: as stored; deltas: {deltas}. Line: mean of the layers, band: "
        "lowest to highest."
    ]
    if analyses["experts_from"] != "source":
        notes.append("What had to be factored is only known with the originals: --source SRC.")
    return Figure(
        "energy",
        title,
        "A curve that rises early can be cut to a low rank at little cost; a diagonal one cannot.",
        panels,
        [Table("Squared singular values in the first part of the rank, % of all",
               ["projection, part, rank", "mean", "lowest layer", "highest layer"], rows)],
        notes,
    )  # fmt: skip
