"""The figures of a report from its content: sizes, perplexity, errors, ranks, columns, routing, trimming."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from d2moe_vllm.format.config import Layer
from d2moe_vllm.format.kinds import roles_of, width
from d2moe_vllm.format.words import describe_layer
from offline.io.units import size
from offline.methods import find_method
from offline.report import analysed, sisters
from offline.report.pictures import (
    Bars,
    Figure,
    Heat,
    Lines,
    Missing,
    Panel,
    Report,
    Scale,
    Series,
    Table,
    describe,
    short,
)

Content = dict[str, Any]
RECOVERY = (
    "Recovery = (ln V − loss after) / (ln V − loss before), losses in nats a token, V the size of the vocabulary: of "
    "the way from guessing uniformly to the original, the share that is kept. It is a mild measure; the increase in "
    "perplexity is the strict one."
)
PARTS = {"rest": "all but experts", "experts": "experts", "base": "bases", "deltas": "deltas", "factors": "factors",
         "bases": "shared bases", "kept": "experts as they were"}  # fmt: skip


def make_report(content: Content) -> Report:
    """content: as `collect` returns it. A figure that its method does not have is not in the report at all."""
    report = Report()
    for make in FIGURES:
        found = make(content)
        if isinstance(found, Figure):
            report.figures.append(found)
        elif isinstance(found, Missing):
            report.missing.append(found)
    return report


def sizes(content: Content) -> Figure:
    before, after = content["parts"]["before"], content["parts"]["after"]
    kinds = [kind for kind in PARTS if kind in before or kind in after]
    unit, name = _unit(content["checkpoint"]["source"]["bytes"])
    parts = [(PARTS[k], [before.get(k, {"bytes": 0})["bytes"] / unit, after.get(k, {"bytes": 0})["bytes"] / unit])
             for k in kinds]  # fmt: skip
    total = [sum(part["bytes"] for part in side.values()) for side in (before, after)]
    words = "; ".join(
        f"{when}: {size(sum(part['bytes'] for part in side.values()))}, of which "
        + ", ".join(f"{PARTS[kind]} {size(part['bytes'])}" for kind, part in side.items())
        for when, side in (("Before", before), ("after", after))
    )
    rows = []
    for kind in kinds:
        cells = (side.get(kind, {}).get(figure) for figure in ("parameters", "bytes") for side in (before, after))
        rows.append([PARTS[kind], *cells])
    sums = [
        sum(part[figure] for part in side.values()) for figure in ("parameters", "bytes") for side in (before, after)
    ]
    return Figure(
        name="sizes",
        title="Where the bytes went",
        reading="Each bar is the whole model on disk; only the experts' part was compressed.",
        panels=[Panel("sizes", "Weight files before and after", Bars(("before", "after"), parts, name), f"{words}.")],
        tables=[
            Table(
                "Stored parameters and bytes",
                ["part", "parameters before", "after", "bytes before", "after"],
                [*rows, ["whole model", *sums]],
            )
        ],
        notes=[
            f"{short(100 * (1 - total[1] / total[0]))} % of the bytes are gone. Counted from the files; the original's "
            "bytes are shared out by parameters."
        ],
    )


def _unit(nbytes: int) -> tuple[float, str]:
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if nbytes >= unit:
            return unit, name
    return 1e3, "kB"


def perplexity(content: Content) -> Figure | Missing:
    rows = content["perplexity"]
    title = "Perplexity before and after"
    if not rows:
        why = "--text FILE measures it, with --source SRC beside the original's, and how much of the way was kept."
        return Missing("perplexity", title, f"Not measured: {why}")
    compared = all(row["before"] is not None for row in rows)
    panels = []
    for number, row in enumerate(rows):
        names = ["before", "after"] if compared else ["after"]
        values = [row["before"], row["after"]] if compared else [row["after"]]
        words = ", ".join(f"{name} {short(value)}" for name, value in zip(names, values, strict=True))
        bars = Bars(names, [("perplexity, lower is better", values)], "perplexity")
        panels.append(Panel(f"perplexity-{number}", row["text"], bars, f"Perplexity on {row['text']}: {words}."))
    columns = ["text", "before", "after", "increase, %", "recovery, %", "tokens", "windows", "tokens per window"]
    cells = [
        [
            row["text"],
            row["before"],
            row["after"],
            100 * (row["after"] / row["before"] - 1) if compared else None,
            None if row["recovery"] is None else 100 * row["recovery"],
            row["tokens"],
            row["windows"],
            row["seq_len"],
        ]
        for row in rows
    ]
    notes = [f"SHA-256 of {row['text']}: {row['sha256']}." for row in rows]
    if compared:
        notes.insert(0, RECOVERY)
    else:
        notes.insert(0, "The original's perplexity and the recovery were not measured: --source SRC brings them.")
    return Figure(
        "perplexity",
        title,
        "Lower is better: how many tokens the model is undecided between, on average, for each next one.",
        panels,
        [Table("Perplexity", columns, cells)],
        notes,
    )


def error(content: Content) -> Figure:
    layers = content["checkpoint"]["statistics"]["layers"]
    x = [int(number) for number in layers]
    panels, rows = [], []
    for role in roles_of(next(iter(layers.values()))["relative_error"]):
        errors = [report["relative_error"][role] for report in layers.values()]
        means = [sum(values) / len(values) for values in errors]
        series = Series(f"{role}, mean of experts", means, [min(v) for v in errors], [max(v) for v in errors])
        words = describe(x, [series]) + " The band reaches from the best expert to the worst."
        picture = Lines(x, [series], "layer", "relative error", zero=True)
        panels.append(Panel(f"error-{role}", role, picture, words))
        for number, values, mean in zip(x, errors, means, strict=True):
            rows.append([f"{number} {role}", mean, min(values), max(values), values.index(max(values))])
    return Figure(
        "error",
        "Error per layer and projection",
        "How far an expert's output is off on the calibration text: 0 is exact, 1 is as wrong as no output at all.",
        panels,
        [Table("Relative error", ["layer", "mean", "best", "worst", "worst expert"], rows)],
        ["Recorded while compressing: ‖(W − W′)X‖ / ‖WX‖ for each expert, X what it read there. Line: mean of the "
         "experts; band: best to worst."],
    )  # fmt: skip


def as_it_was(layer: Mapping[str, Any], role: str) -> bool:
    """Whether a projection is stored as it is in the source."""
    entry = layer[role]
    own = entry["delta_storage"] or entry["full_base"] or entry["kept_columns"] or entry["base_rank"]
    return entry["delta"] == "dense" and not own and not layer["channels"]


def stored(content: Content) -> Figure:
    """Of whole deltas: bits, bases and channels."""
    every = content["checkpoint"]["intermediate_size"]
    layers = {number: Layer.model_validate(layer) for number, layer in content["checkpoint"]["layers"].items()}
    x = [int(number) for number in layers]
    experts = range(content["checkpoint"]["num_experts"])
    kept = [[100 * width(layer, expert, every) / every for expert in experts] for layer in layers.values()]
    means = [sum(values) / len(values) for values in kept]
    series = [Series("mean of experts", means, list(map(min, kept)), list(map(max, kept)))]
    rows = [
        [number, describe_layer(layer), min(values), mean, max(values)]
        for number, layer, values, mean in zip(x, layers.values(), kept, means, strict=True)
    ]
    return Figure(
        "stored",
        "What each layer stores",
        "How many of its channels an expert keeps: more where the price found that a byte saves more loss.",
        [Panel("stored", "Channels that experts keep", Lines(x, series, "layer", "channels kept, %", zero=True),
               describe(x, series))],
        [Table("Stored", ["layer", "how", "narrowest, %", "mean, %", "widest, %"], rows)],
        [f"In words: {content['checkpoint']['stores']}."],
    )  # fmt: skip


def ranks(content: Content) -> Figure:
    layers = content["checkpoint"]["layers"]
    every = roles_of(content["inputs"])
    if not any(layer[role]["rank"] for layer in layers.values() for role in every):
        return stored(content)
    x = [int(number) for number in layers]
    roles = [role for role in every if any(layer[role]["rank"] for layer in layers.values())]
    series = [Series(role, [layer[role]["rank"] or None for layer in layers.values()]) for role in roles]
    columns = ["layer", *every, *(f"{role}, rank of base" for role in every)]
    rows = [
        [number, *(layer[role]["rank"] for role in every), *(layer[role]["base_rank"] or None for role in every)]
        for number, layer in zip(x, layers.values(), strict=True)
    ]
    notes = []
    if dense := _dense_layers(content):
        notes.append(f"Left as they were: {_layers(dense)}.")
    if whole := [number for number, layer in layers.items() if as_it_was(layer, "down")]:
        notes.append(f"Down was left as it was{'' if len(whole) == len(layers) else f' in {_layers(whole)}'}.")
    if trimmed := [number for number, layer in layers.items() if layer["trimmed"]]:
        notes.append(f"With experts that have no delta: {_layers(trimmed)}.")
    return Figure(
        "ranks",
        "Ranks per layer",
        "How many components an expert's own matrices have: more where the budget found that a byte saves more error.",
        [Panel("ranks", "Rank of the experts' own factors", Lines(x, series, "layer", "rank", zero=True),
               describe(x, series))],
        [Table("Ranks", columns, rows)],
        notes,
    )  # fmt: skip


def _layers(numbers: Sequence[int | str]) -> str:
    return f"layer{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def _dense_layers(content: Content) -> list[int]:
    selection = content["checkpoint"]["statistics"].get("selection")
    return list(selection["dense"]) if selection else []


def _columns(projection: Mapping[str, Any], inputs: int) -> tuple[int, int]:
    """Kept, and used at once; of a base with all columns all."""
    return (inputs, inputs) if projection["full_base"] else (projection["kept_columns"], projection["used_columns"])


def columns(content: Content) -> Figure | None:
    layers = content["checkpoint"]["layers"]
    if not any(
        layer[role]["rank"] and _columns(layer[role], 1)[0]
        for layer in layers.values()
        for role in roles_of(content["inputs"])
    ):
        return None
    x = [int(number) for number in layers]
    inputs = content["inputs"]
    series, rows = [], []
    for label, role in sisters.halves(content):
        kept = [100 * _columns(layer[role], inputs[role])[0] / inputs[role] for layer in layers.values()]
        series.append(Series(label, kept))
        for number, layer in zip(x, layers.values(), strict=True):
            count, used = _columns(layer[role], inputs[role])
            rows.append([f"{number} {label}", count, used, inputs[role], 100 * count / inputs[role]])
    return Figure(
        "columns",
        "Columns that the bases keep",
        "100 % is a full base, 0 % none: an expert's own factors then have to say everything.",
        [Panel("columns", "Kept input columns of the shared base",
               Lines(x, series, "layer", "columns kept, %", zero=True), describe(x, series))],
        [Table("Columns of the bases", ["layer", "kept", "used at once", "of", "kept, %"], rows)],
        ["“Used at once” is what a forward pass takes where dynamic selection is switched on "
         f"(this checkpoint's scope: {content['checkpoint']['scope']})."],
    )  # fmt: skip


def routing(content: Content) -> Figure:
    layers = content["checkpoint"]["statistics"]["layers"]
    tokens = [report["tokens"] for report in layers.values()]
    experts, highest = len(tokens[0]), max(map(max, tokens))
    even = sum(map(sum, tokens)) / len(tokens) / experts
    low = min(range(len(tokens)), key=lambda layer: min(tokens[layer]))
    words = (
        f"Of {experts} experts in {len(tokens)} layers the least used one got {min(map(min, tokens)):,} tokens (layer "
        f"{list(layers)[low]}), the most used {highest:,}; evenly spread it would be {short(even)} each."
    )
    rows = [[f"layer {number}", *counts] for number, counts in zip(layers, tokens, strict=True)]
    never = sum(count == 0 for counts in tokens for count in counts)
    notes = (
        [f"{never} experts saw no token at all: they were compressed without knowing their inputs."] if never else []
    )
    heat = Heat(tokens, "expert", "layer", 0, highest or 1, list(layers), 0)
    scale = Scale("calibration tokens routed to an expert", 0, highest or 1, [(even, "spread evenly")])
    return Figure(
        "routing",
        "Tokens per expert",
        "Light experts saw many calibration tokens, dark ones few: of those the compression knows less.",
        [
            Panel("routing", "Tokens routed to each expert", heat, words),
            Panel("routing-scale", "Colours", scale, f"From 0 (dark) to {highest:,} tokens (light)."),
        ],
        [Table("Calibration tokens per expert", ["", *(f"expert {e}" for e in range(experts))], rows)],
        notes,
    )


def trimming(content: Content) -> Figure | Missing | None:
    found = content["trimming"]
    title = "What trimming experts would cost"
    if not find_method(content["checkpoint"]["method"]).has_base:
        return None
    if not found["points"]:
        return Missing("trimming", title, "No layer has a base of its own for all projections, so no expert "
                                          "could do without its delta.")  # fmt: skip
    points = found["points"]
    measured = [point for point in points if point["perplexity"] is not None]
    share = Series("mean of layers", [100 * p["share"] for p in points], [100 * p["low"] for p in points],
                   [100 * p["high"] for p in points])  # fmt: skip
    x = [point["experts"] for point in points]
    panels = [Panel("trimming-tokens", "Calibration tokens on the base alone",
                    Lines(x, [share], "experts trimmed per layer", "tokens, %", zero=True),
                    describe(x, [share], "experts trimmed"))]  # fmt: skip
    notes = ["The share of tokens is counted from the calibration's routing: line mean, band lowest to highest layer."]
    if measured:
        series = [Series("perplexity", [point["perplexity"] for point in measured])]
        at = [point["experts"] for point in measured]
        picture = Lines(at, series, "experts trimmed per layer", "perplexity")
        panels.insert(0, Panel("trimming-perplexity", f"Perplexity on {found['text']}", picture,
                               describe(at, series, "experts trimmed")))  # fmt: skip
        notes.append(f"Perplexity was measured on {found['text']} without these deltas; nothing was fitted anew.")
    else:
        notes.append("What it would cost in perplexity was not measured: --text FILE --trimming does.")
    if len(found["layers"]) < found["all_layers"]:
        notes.append(f"Only {_layers(found['layers'])} can be trimmed: the others lack a base, or share their U's.")
    rows = [[p["experts"], 100 * p["share"], 100 * p["low"], 100 * p["high"], p["perplexity"]] for p in points]
    heads = ["experts trimmed", "tokens, %", "lowest layer, %", "highest layer, %", "perplexity"]
    return Figure(
        "trimming",
        title,
        "If the least used experts of every layer had no delta and ran on the shared base alone.",
        panels,
        [Table("Trimming", heads, rows)],
        notes,
    )


FIGURES: Sequence[Callable[[Content], Figure | Missing | None]] = (
    sizes, perplexity, error, ranks, columns, sisters.fit, sisters.alphas, sisters.shared_u, routing,
    sisters.selection, analysed.sensitivity, analysed.cka, analysed.energy, trimming,
)  # fmt: skip
"""In the order of the page."""
