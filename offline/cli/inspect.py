"""`d2moe inspect`: parse, call, print."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from d2moe_vllm.format.kinds import roles_of
from offline.cli.options import Ckpt, Json, Original
from offline.cli.tables import projections, show, sizes
from offline.errors import InputError


def inspect(
    checkpoint: Ckpt,
    analyses: Annotated[
        bool, typer.Option("--analyses", help="Also CKA between experts, energy retention, layer sensitivity (slow).")
    ] = False,
    source: Original = None,
    as_json: Json = False,
) -> None:
    """What is in a compressed checkpoint: parameters and bytes stored, ranks and errors per layer."""
    from offline.checkpoint.inspect import analyse
    from offline.checkpoint.inspect import inspect as look

    if source and not analyses:
        raise InputError("inspect uses --source for its analyses only; add --analyses, or use `d2moe verify`")
    content = look(checkpoint)
    if analyses:
        from offline.io.progress import Steps

        content["analyses"] = analyse(checkpoint, source, Steps)
    show(content, as_json, inspect_table)


def inspect_table(console: Console, content: dict[str, Any]) -> None:
    console.print(
        f"{content['path']}: {content['source']['name']} by {content['method']}, scope {content['scope']}",
        highlight=False,
        soft_wrap=True,
    )
    sizes(console, content["source"], content)
    console.print(f"stored ratio {content['stored_ratio']:.6f}", highlight=False)
    experts = content["experts"]
    console.print(f"stores: {content['stores']}", highlight=False, soft_wrap=True)
    console.print(
        f"experts alone: {experts['parameters']:,} of {experts['dense_parameters']:,} parameters, "
        f"{100 * experts['bytes'] / experts['dense_bytes']:.2f} % of the bytes",
        highlight=False,
    )
    console.print()
    projections(console, "layer", content["layers"], content["intermediate_size"])
    for number, layer in content["layers"].items():
        if special := _specialties(layer):
            console.print(f"layer {number}: {special}", highlight=False, soft_wrap=True)
    console.print()
    reports = content["statistics"]["layers"]
    roles = roles_of(next(iter(reports.values()))["relative_error"])
    table = Table("layer", *(f"{role} error" for role in roles), "routed tokens per expert", box=None, pad_edge=False)
    for number, report in reports.items():
        errors = [f"{sum(values) / len(values):.4f}" for values in (report["relative_error"][role] for role in roles)]
        tokens = report["tokens"]
        table.add_row(number, *errors, f"{min(tokens)} to {max(tokens)}")
    console.print(table)
    console.print("errors: relative, weighted by the calibration inputs, mean over experts", style="dim")
    for number, report in content["statistics"]["layers"].items():
        for role, fit in report.get("fit", {}).items():
            if fit["error"] >= fit["start_error"]:
                console.print(
                    f"layer {number} {role}: the fit gained nothing over its start ({fit.get('ended')})",
                    highlight=False,
                )
    if "analyses" in content:
        analyses_table(console, content["analyses"])


def analyses_table(console: Console, content: dict[str, Any]) -> None:
    """CKA as the mean over pairs of different experts, energy as the rank that keeps 90 % of it."""
    console.print()
    shares = content["shares_of_rank"]
    table = Table(
        "layer", "", "CKA mean", "unrelated", "experts", "base", "deltas", "sensitivity", box=None, pad_edge=False
    )
    for number, layer in content["layers"].items():
        for role in roles_of(layer):
            found, count = layer[role], len(layer[role]["cka"])
            pairs = sum(map(sum, found["cka"])) - sum(found["cka"][e][e] for e in range(count))
            mean = f"{pairs / (count * (count - 1)):.3f}"
            ranks = (_rank_for(shares, found["energy"][kind]) for kind in ("experts", "base", "deltas"))
            sensitivity = f"{layer['sensitivity'][role]:.4f}" if layer["sensitivity"] else ""
            table.add_row(number, role, mean, f"{found['cka_of_unrelated']:.3f}", *ranks, sensitivity)
    console.print(table)
    measured = next((layer["sensitivity"]["from"] for layer in content["layers"].values() if layer["sensitivity"]), "")
    console.print(
        f"CKA between different experts (from: {content['experts_from']}), beside that of unrelated matrices; share of "
        f"the rank that holds 90 % of the energy of experts, base and deltas ({content['deltas_from']}); "
        f"sensitivity from: {measured or 'nothing'}. All figures: --json",
        style="dim",
    )


def _rank_for(shares: list[int], curve: list[float] | None, energy: float = 0.9) -> str:
    if curve is None:
        return "none"
    return f"{next(share for share, kept in zip(shares, curve, strict=True) if kept >= energy or share == 100)} %"


def _specialties(layer: dict[str, Any]) -> str:
    """What a layer's deltas have that ranks do not tell."""
    found = []
    for role in roles_of([role for role, one in layer.items() if one]):
        one = layer[role]
        kinds = ["as it is"] * (one["delta"] == "dense" and not one["delta_storage"] and not layer["channels"])
        kinds += [f"{one['bases']} bases, {one['function']}"] * bool(one["bases"])
        kinds += ["columns as they are"] * (one["delta"] == "columns") + ["one V"] * one["shared_v"]
        kinds += [f"{one['distinct_u']} different U"] * bool(one["distinct_u"])
        found += [f"{role} {', '.join(kinds)}"] if kinds else []
    found += [f"no deltas for experts {', '.join(map(str, layer['trimmed']))}"] if layer["trimmed"] else []
    return "; ".join(found)
