"""What the report tells, collected from a checkpoint's files and, where asked for, measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2moe_vllm.format.config import CheckpointConfig
from d2moe_vllm.format.files import check_checkpoint
from d2moe_vllm.format.recipefile import read_recipe
from offline.checkpoint.inspect import analyse, count_parameters, inspect, read_statistics
from offline.errors import InputError
from offline.io.naming import labels
from offline.io.progress import Steps
from offline.io.shards import Reader
from offline.methods import find_method
from offline.report.records import check_statistics
from offline.run.evaluate import Measure, check_measure, evaluate
from offline.source.dense import read_model_config
from offline.source.families import find_family, read_shape
from offline.source.original import open_original
from offline.source.text import as_text
from offline.source.tokens import OWN, TokenizerChoice


@dataclass(frozen=True)
class Request:
    """What to report on. source: the dense original; texts: to measure perplexity on, in windows of seq_len tokens;
    quick: without the analyses that read every weight; trimming: measure it on the first text; memory: bytes that the
    comparison of experts may hold at once, None for its default; tokenizer: what reads the texts."""

    checkpoint: Path
    source: str | None = None
    texts: Sequence[Path] = ()
    seq_len: int | None = None
    quick: bool = False
    trimming: bool = False
    memory: int | None = None
    tokenizer: TokenizerChoice = OWN

    def measure(self, text: Path) -> Measure:
        return Measure(as_text(text), self.seq_len, tokenizer=self.tokenizer)


def check_request(request: Request) -> CheckpointConfig:
    """All refusals that need no computing: raises InputError or CheckpointError."""
    config = check_checkpoint(request.checkpoint)
    find_method(config.method)
    model = read_model_config(request.checkpoint)
    check_statistics(request.checkpoint, config, read_shape(find_family(model), model).layers)
    _gram_bytes(request, config)
    if request.source:
        open_original(request.source, config)
    if request.trimming and not request.texts:
        raise InputError("--trimming is measured on a text; add --text FILE")
    if request.trimming and not any(_trimmable(config, layer) for layer in config.layers):
        raise InputError("nothing can be trimmed: no layer has a base for all projections; drop --trimming")
    if request.seq_len and not request.texts:
        raise InputError("--seq-len is for the text; add --text FILE")
    for text in request.texts:
        check_measure(str(request.checkpoint), request.measure(text))
    return config


def collect(request: Request, steps: Callable[[float], Steps], say: Callable[[str], None]) -> dict[str, Any]:
    """Everything the page is made of, as `--json` prints it under `content`. say: is told what begins."""
    config = check_request(request)
    return {
        "checkpoint": inspect(request.checkpoint),
        "inputs": {role: config.shape(role)[1] for role in config.roles},
        "recipe": read_recipe(request.checkpoint),
        "parts": _parts(request.checkpoint, config),
        "perplexity": _perplexities(request, steps, say),
        "trimming": _trimming(request, config, steps, say),
        "analyses": _analyses(request, config, steps, say),
        "shared_u": _indices(request.checkpoint, config),
        "alphas": _alphas(request.checkpoint, config),
    }


def _gram_bytes(request: Request, config: CheckpointConfig) -> int | None:
    """Of `memory`, what is left beside the two Gram matrices that are held in any case. Raises InputError."""
    if request.memory is None or request.quick:
        return None
    one = 4 * config.hidden_size**2
    if request.memory < 3 * one:
        raise InputError(f"--memory {request.memory:,} bytes is too little to compare experts: {3 * one:,} are needed; "
                         "raise it, or leave the comparison out with --quick")  # fmt: skip
    return request.memory - 2 * one


def _analyses(
    request: Request, config: CheckpointConfig, steps: Callable[[float], Steps], say: Callable[[str], None]
) -> dict[str, Any] | None:
    if request.quick:
        return None
    say("analyses of every weight")
    return analyse(request.checkpoint, request.source, steps, _gram_bytes(request, config))


def _parts(folder: Path, config: CheckpointConfig) -> dict[str, dict[str, dict[str, int]]]:
    """before and after -> part of the model -> parameters and bytes. The source's bytes are shared out by parameters:
    its files may no longer be there."""
    model = read_model_config(folder)
    layers = read_shape(find_family(model), model).layers
    source, reader = config.source, Reader(folder)
    experts = len(layers) * config.layer_numbers
    nbytes = round(source.bytes * experts / source.parameters)
    before = {
        "experts": {"parameters": experts, "bytes": nbytes},
        "rest": {"parameters": source.parameters - experts, "bytes": source.bytes - nbytes},
    }
    after = {kind: {"parameters": 0, "bytes": 0} for kind in ("base", "deltas", "factors", "bases", "kept")}
    # What is no delta from a base is a factor of an expert.
    deltas = "deltas" if find_method(config.method).has_base else "factors"
    for layer in config.layers:
        for one in config.stored(layer).values():
            entry = config.layers[layer]
            kept = one.kind.name == "dense" and not (
                entry.channels or entry[one.role].has_base or entry[one.role].delta_storage
            )
            own = "kept" if kept else "bases" if one.kind.name == "bases" else deltas
            part = after["base" if one.kind.part == "base" else own]
            part["parameters"] += one.numbers
            part["bytes"] += one.spec.nbytes
    # Layers that stay dense are stored as in the source, in the checkpoint's dtype.
    left = len(layers) - len(config.layers)
    after["kept"]["parameters"] += left * config.layer_numbers
    after["kept"]["bytes"] += left * config.layer_bytes
    stored = {figure: sum(part[figure] for part in after.values()) for figure in ("parameters", "bytes")}
    after["rest"] = {
        "parameters": count_parameters(reader, config) - stored["parameters"],
        "bytes": reader.nbytes - stored["bytes"],
    }
    return {"before": before, "after": {kind: part for kind, part in after.items() if part["parameters"]}}


def _perplexities(
    request: Request, steps: Callable[[float], Steps], say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Per text: of the checkpoint, of the source where it is given, and how much of the way was kept."""
    model = read_model_config(request.checkpoint)
    vocabulary = find_family(model).settings(model).get("vocab_size")
    found = []
    for label, text in zip(labels(request.texts), request.texts, strict=True):
        say(f"perplexity on {label}")
        measure = request.measure(text)
        after = evaluate(str(request.checkpoint), measure, None, steps, say=say)
        row: dict[str, Any] = {
            "text": label,
            "sha256": measure.text.sha256(),
            "tokens": after.tokens,
            "windows": after.windows,
            "seq_len": after.seq_len,
            "scope": after.scope,
            "before": None,
            "after": after.perplexity,
            "recovery": None,
        }
        if request.source:
            say(f"the original's perplexity on {label}")
            before = evaluate(request.source, measure, None, steps)
            row["before"] = before.perplexity
            losses = before.negative_log_likelihood, after.negative_log_likelihood
            row["recovery"] = recovery(*losses, vocabulary) if isinstance(vocabulary, int) else None
        found.append(row)
    return found


def recovery(before: float, after: float, vocabulary: int) -> float | None:
    """(ln V - after) / (ln V - before): how much of the way from guessing among V tokens to the original is kept.

    before, after: nats a token. None where the original is no better than guessing.
    """
    guess = math.log(vocabulary)
    return (guess - after) / (guess - before) if before < guess else None


def _trimming(
    request: Request, config: CheckpointConfig, steps: Callable[[float], Steps], say: Callable[[str], None]
) -> dict[str, Any]:
    """What taking the deltas of the t least routed experts of every layer away would touch: the share of routed
    tokens, from the statistics; with `trimming` the perplexity too."""
    report = read_statistics(request.checkpoint)["layers"]
    order = {
        layer: sorted(
            range(config.num_experts),
            key=lambda e: (e not in config.layers[layer].trimmed, report[str(layer)]["tokens"][e], e),
        )
        for layer in config.layers
        if _trimmable(config, layer)
    }
    points: list[dict[str, Any]] = []
    for count in range(config.num_experts + 1 if order else 0):
        shares = []
        for layer, experts in order.items():
            tokens = report[str(layer)]["tokens"]
            alone = {*experts[:count], *config.layers[layer].trimmed}
            shares.append(sum(tokens[expert] for expert in alone) / max(sum(tokens), 1))
        points.append({"experts": count, "share": sum(shares) / len(shares), "low": min(shares), "high": max(shares),
                       "perplexity": None})  # fmt: skip
    if request.trimming:
        for count in _counts(config.num_experts):
            say(f"perplexity with {count} experts of each layer trimmed")
            taken = {layer: experts[:count] for layer, experts in order.items()}
            measure = request.measure(request.texts[0])
            found = evaluate(str(request.checkpoint), measure, None, steps, trim=taken)
            points[count]["perplexity"] = found.perplexity
    text = labels(request.texts)[0] if request.trimming else None
    return {"layers": list(order), "all_layers": len(config.layers), "text": text, "points": points}


def _trimmable(config: CheckpointConfig, layer: int) -> bool:
    """Whether experts can run on the base alone; a stored index of shared U's would have to change too."""
    return all(config.layers[layer][role].has_base and not config.layers[layer][role].shares_u for role in config.roles)


def _counts(experts: int) -> list[int]:
    """Numbers of experts to measure at: each is an evaluation of the whole model."""
    return sorted({0, 1, *(experts * quarter // 4 for quarter in (1, 2, 3, 4))})


def _indices(folder: Path, config: CheckpointConfig) -> dict[str, dict[str, list[int]]]:
    """Layer -> role -> which of the stored U's each expert uses, where they are shared."""
    reader, found = Reader(folder), dict[str, dict[str, list[int]]]()
    for number, layer in config.layers.items():
        for role in config.roles:
            if layer[role].shares_u:
                index = reader.tensor(config.tensor_name(number, 0, role, "u_index"))
                found.setdefault(str(number), {})[role] = index.tolist()
    return found


def _alphas(folder: Path, config: CheckpointConfig) -> dict[str, dict[str, list[list[float]]]]:
    """Layer -> role -> [experts][bases], where experts are mixed from bases."""
    reader, found = Reader(folder), dict[str, dict[str, list[list[float]]]]()
    for number, layer in config.layers.items():
        for role in config.roles:
            if layer[role].bases:
                rows = [
                    reader.finite(config.tensor_name(number, expert, role, "alpha")).float().tolist()
                    for expert in range(config.num_experts)
                ]
                found.setdefault(str(number), {})[role] = rows
    return found
