"""What the commands print for people; --json prints the same content."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from offline.io.units import duration, size
from offline.methods import find_method

ROLES = ("gate", "up", "down")
PROBLEMS_SHOWN = 20


def _sizes(console: Console, source: dict[str, Any], result: dict[str, Any]) -> None:
    table = Table("", "before", "after", "removed", box=None, pad_edge=False)
    gone = 1 - result["parameters"] / source["parameters"]
    table.add_row("parameters", f"{source['parameters']:,}", f"{result['parameters']:,}", f"{100 * gone:.2f} %")
    ratio = 1 - result["bytes"] / source["bytes"]
    table.add_row("bytes on disk", f"{source['bytes']:,}", f"{result['bytes']:,}", f"{100 * ratio:.2f} %")
    console.print(table)


def _projections(console: Console, title: str, rows: dict[str, dict[str, Any]]) -> None:
    table = Table(
        title, *(f"{role} rank" for role in ROLES), "gate/up columns", "down columns", box=None, pad_edge=False
    )
    for name, layer in rows.items():
        table.add_row(
            name, *(str(layer[role]["rank"]) for role in ROLES), _base(layer, "gate", "up"), _base(layer, "down")
        )
    console.print(table)


def _base(layer: dict[str, Any], *roles: str) -> str:
    """Of projections that share a selection of columns; the ranks of low-rank bases may differ."""
    first = layer[roles[0]]
    if first["kept_columns"]:
        return f"{first['kept_columns']} ({first['used_columns']} used)"
    ranks = [layer[role]["base_rank"] for role in roles]
    return f"rank {'/'.join(map(str, ranks))}" if any(ranks) else "none"


def _specialties(layer: dict[str, Any]) -> str:
    """What a layer's deltas have that ranks do not tell."""
    found = []
    for role in ROLES:
        one = layer[role]
        kinds = ["as it is"] * (one["delta"] == "dense") + [f"{one['bases']} bases, {one['function']}"] * bool(
            one["bases"]
        )
        kinds += ["columns as they are"] * (one["delta"] == "columns") + ["one V"] * one["shared_v"]
        kinds += [f"{one['distinct_u']} different U"] * bool(one["distinct_u"])
        found += [f"{role} {', '.join(kinds)}"] if kinds else []
    found += [f"no deltas for experts {', '.join(map(str, layer['trimmed']))}"] if layer["trimmed"] else []
    return "; ".join(found)


def plan_table(console: Console, summary: dict[str, Any]) -> None:
    _sizes(console, summary["source"], summary["result"])
    console.print()
    _projections(console, "", {"first layer": summary["first_layer"]})
    if dense := summary["result"]["dense_layers"]:
        console.print(f"{summary['result']['layers']} layers like this, {dense} stay dense", highlight=False)
    if not summary["result"]["final"]:
        console.print(find_method(summary["recipe"]["method"]).until, style="dim")
    console.print()
    shares = ", ".join(f"{role} {100 * share:.2f} %" for role, share in summary["kept_share_of_deltas"].items())
    console.print(f"kept share of the deltas: {shares}", highlight=False)
    console.print(f"experts alone: {100 * summary['result']['expert_ratio']:.2f} % removed", highlight=False)
    disk = summary["disk_bytes"]
    console.print(
        f"to do it: about {size(summary['peak_memory_bytes'])} of memory, {size(disk['work'])} of disk while "
        f"running, {size(disk['result'])} for the result, roughly {duration(summary['estimated_seconds'])}",
        highlight=False,
    )


def compress_table(console: Console, result: dict[str, Any]) -> None:
    _sizes(console, result["source"], result["result"])
    predicted = result["predicted"]
    table = Table("", "predicted", "really", box=None, pad_edge=False)
    table.add_row("time", duration(predicted["seconds"]), duration(result["seconds"]))
    table.add_row("peak memory", size(predicted["peak_memory_bytes"]), size(result["peak_memory_bytes"]))
    table.add_row(
        "working folder", f"{size(predicted['work_bytes'])} at most", f"{size(result['work_bytes'])} at the end"
    )
    console.print(table)
    console.print(f"serve it:  vllm serve {result['path']} --trust-remote-code", highlight=False, soft_wrap=True)


def inspect_table(console: Console, content: dict[str, Any]) -> None:
    console.print(
        f"{content['path']}: {content['source']['name']} by {content['method']}, scope {content['scope']}",
        highlight=False,
        soft_wrap=True,
    )
    _sizes(console, content["source"], content)
    console.print(f"stored ratio {content['stored_ratio']:.6f}", highlight=False)
    experts = content["experts"]
    console.print(
        f"experts alone: {experts['parameters']:,} of {experts['dense_parameters']:,} parameters, "
        f"{100 * experts['ratio']:.2f} % removed",
        highlight=False,
    )
    console.print()
    _projections(console, "layer", content["layers"])
    for number, layer in content["layers"].items():
        if special := _specialties(layer):
            console.print(f"layer {number}: {special}", highlight=False, soft_wrap=True)
    console.print()
    table = Table("layer", *(f"{role} error" for role in ROLES), "routed tokens per expert", box=None, pad_edge=False)
    for number, report in content["statistics"]["layers"].items():
        errors = [f"{sum(values) / len(values):.4f}" for values in (report["relative_error"][role] for role in ROLES)]
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


def eval_table(console: Console, result: dict[str, Any]) -> None:
    scope = f", scope {result['scope']}" if result["scope"] else ""
    console.print(
        f"perplexity {result['perplexity']:.4f} ({result['tokens']:,} tokens, {result['windows']} windows of "
        f"{result['seq_len']}{scope})",
        highlight=False,
    )


def tune_table(console: Console, result: dict[str, Any]) -> None:
    table = Table("tokens", "before, ms", "now, ms", "faster", box=None, pad_edge=False)
    for row in result["layer"]:
        gain = row["before_ms"] / row["after_ms"]
        table.add_row(str(row["tokens"]), f"{row['before_ms']:.3f}", f"{row['after_ms']:.3f}", f"{gain:.2f}")
    console.print(table)
    use = "servers use it from their next start" if result["in_force"] else "no server looks there by itself"
    console.print(f"{result['device']}: {result['path']}; {use}", highlight=False, soft_wrap=True)


def verify_table(console: Console, result: dict[str, Any]) -> None:
    for kind in ("problems", "notes"):
        for line in result[kind][:PROBLEMS_SHOWN]:
            console.print(f"{kind[:-1]}: {line}", highlight=False, soft_wrap=True)
        if (more := len(result[kind]) - PROBLEMS_SHOWN) > 0:
            console.print(f"... and {more} more {kind}; --json lists all")
    if result["layers"]:
        _errors(console, result["layers"])
    if result["sound"]:
        beside = f", compared with {result['source']}" if result["source"] else ""
        console.print(f"sound: {result['files']} weight files, {size(result['bytes'])}{beside}", highlight=False)


def _errors(console: Console, layers: dict[str, dict[str, dict[str, float]]]) -> None:
    heads = (head for role in ROLES for head in (f"{role} mean", "worst"))
    table = Table("layer", *heads, box=None, pad_edge=False)
    for number, layer in layers.items():
        cells = (
            cell
            for role in ROLES
            for cell in (f"{layer[role]['mean']:.4f}", f"{layer[role]['worst']:.4f} ({layer[role]['worst_expert']})")
        )
        table.add_row(number, *cells)
    console.print(table)
    console.print(
        "errors: ||W - W'|| / ||W|| against the source, not weighted by inputs; of the worst expert, and its number",
        style="dim",
    )


def export_table(console: Console, result: dict[str, Any]) -> None:
    console.print(
        f"{result['path']}: {result['parameters']:,} parameters, {size(result['bytes'])} in {result['files']} files "
        f"(compressed: {size(result['compressed_bytes'])})",
        highlight=False,
        soft_wrap=True,
    )
    console.print(f"serve it:  vllm serve {result['path']}", highlight=False, soft_wrap=True)


def analyses_table(console: Console, content: dict[str, Any]) -> None:
    """CKA as the mean over pairs of different experts, energy as the rank that keeps 90 % of it."""
    console.print()
    shares = content["shares_of_rank"]
    table = Table(
        "layer", "", "CKA mean", "unrelated", "experts", "base", "deltas", "sensitivity", box=None, pad_edge=False
    )
    for number, layer in content["layers"].items():
        for role in ROLES:
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


def report_table(console: Console, result: dict[str, Any]) -> None:
    for one in result["left_out"]:
        console.print(f"left out: {one['title']}. {one['why']}", highlight=False, soft_wrap=True)
    pictures = f", {len(result['pictures'])} pictures" if result["pictures"] else ""
    console.print(f"{result['page']}: {len(result['figures'])} figures{pictures}", highlight=False, soft_wrap=True)
