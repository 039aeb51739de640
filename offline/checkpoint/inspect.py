"""What is in a compressed checkpoint: parameters and bytes stored, ranks, columns and errors per layer; analyses."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from d2moe_vllm.format.config import STATS_FILE, CheckpointConfig, CheckpointError
from d2moe_vllm.format.files import check_checkpoint
from d2moe_vllm.format.kinds import ROLES, Role
from d2moe_vllm.format.words import describe
from offline.algebra.analysis import SHARES, cka_matrix, energy_curve, gram_count, mean_curve, spectrum, unrelated_cka
from offline.checkpoint.reconstruction import Reconstruction
from offline.io.progress import Steps
from offline.io.shards import Reader
from offline.source.dense import DenseModel
from offline.source.original import open_original

GRAM_BYTES = 4_000_000_000
"""Memory for the Gram matrices that CKA compares with each other; more experts are compared in blocks."""


def inspect(folder: Path) -> dict[str, Any]:
    """Everything `d2moe inspect --json` prints, counted from the files themselves.

    Raises CheckpointError for a checkpoint that is not whole.
    """
    config = check_checkpoint(folder)
    reader = Reader(folder)
    stored = config.expert_numbers
    kinds: dict[str, dict[str, int]] = {}
    for layer in config.layers:
        for name, one in config.stored(layer).items():
            total = kinds.setdefault(one.name, {"tensors": 0, "bytes": 0})
            total["tensors"] += 1
            total["bytes"] += reader.specs[name].nbytes
    dense = config.layer_numbers * len(config.layers)
    return {
        "path": str(folder),
        "method": config.method,
        "format_version": config.format_version,
        "family": config.family,
        "source": config.source.model_dump(),
        "scope": config.pruning.scope,
        "intermediate_size": config.intermediate_size,
        "num_experts": config.num_experts,
        "stores": describe(config),
        "parameters": count_parameters(reader, config),
        "bytes": reader.nbytes,
        "stored_ratio": 1 - reader.nbytes / config.source.bytes,
        "experts": {
            "parameters": stored,
            "bytes": config.expert_bytes,
            "dense_parameters": dense,
            "dense_bytes": config.layer_bytes * len(config.layers),
            "ratio": 1 - stored / dense,
        },
        "kinds": kinds,
        "layers": {str(number): layer.model_dump(mode="json") for number, layer in config.layers.items()},
        "statistics": read_statistics(folder),
    }


def routed_bytes(config: CheckpointConfig, layers: int) -> int:
    """Of the routed experts of all `layers` that have some; those that the method left dense are as in the source."""
    return config.expert_bytes + (layers - len(config.layers)) * config.layer_bytes


def count_parameters(reader: Reader, config: CheckpointConfig) -> int:
    """Of a whole checkpoint; of packed matrices the numbers that codes stand for."""
    experts = config.expert_tensors()
    return config.numbers(spec.shape for name, spec in reader.specs.items() if name not in experts)


def read_statistics(folder: Path) -> dict[str, Any]:
    """d2moe_stats.json of a checkpoint. Raises CheckpointError where it cannot be read or lacks a figure."""
    path = folder / STATS_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); copy it again") from None
    try:
        for report in content["layers"].values():
            figures = [report["relative_error"], *([report["sensitivity"]] if "sensitivity" in report else [])]
            per_expert = (report["tokens"], *(figure[role] for figure in figures for role in _roles(figure)))
            fits = [(fit["start_error"], fit["error"]) for fit in report.get("fit", {}).values()]
            if not all(map(_numbers, (*per_expert, *fits))):
                raise ValueError
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError):
        raise CheckpointError(f"{path}: not the statistics of every layer; copy it again") from None
    return content


def _roles(figure: Mapping[str, Any]) -> tuple[Role, ...]:
    """Those that a figure is told of: of experts without a gate two, else all, each of which has to be there."""
    return ROLES if "gate" in figure else ROLES[1:]


def _numbers(values: Any) -> bool:
    return bool(values) and all(isinstance(value, (int, float)) and math.isfinite(value) for value in values)


def analyse(
    folder: Path, source: str | None, steps: Callable[[float], Steps], gram_bytes: int | None = None
) -> dict[str, Any]:
    """The paper's analyses of every compressed layer (METHODS 1.7), for `inspect --analyses` and `report`.

    source: the dense original, whose experts are then analysed in place of the rebuilt ones; gram_bytes: instead of
    GRAM_BYTES. Nothing is sampled: every expert, every row. Raises InputError for a source that is another model, and
    CheckpointError.
    """
    config = check_checkpoint(folder)
    statistics = read_statistics(folder)
    model = open_original(source, config) if source else None
    block = max((gram_bytes or GRAM_BYTES) // (4 * config.hidden_size**2), 1)
    per_projection = 2 * config.num_experts + 1 + gram_count(config.num_experts, block)
    layers: dict[str, Any] = {}
    with steps(len(config.layers) * len(config.roles) * per_projection) as progress:
        looked = _Projections(config, Reader(folder), model, block, progress)
        for number in config.layers:
            progress.label(f"layer {number}")
            layers[str(number)] = {role: looked.analyse(number, role) for role in config.roles}
            layers[str(number)]["sensitivity"] = _sensitivity(statistics["layers"].get(str(number), {}))
    return {
        "shares_of_rank": list(SHARES),
        "experts_from": "source" if model else "reconstruction",
        "deltas_from": "source minus base" if model else "reconstruction",
        "base_from": "checkpoint",
        "cka_samples": "hidden dimensions: columns of gate and up, rows of down",
        "layers": layers,
    }


class _Projections:
    """Analyses one projection of one layer at a time; see `analyse`."""

    def __init__(
        self, config: CheckpointConfig, reader: Reader, model: DenseModel | None, block: int, progress: Steps
    ) -> None:
        self._config, self._model, self._block, self._progress = config, model, block, progress
        self._rebuilt = Reconstruction(reader, config)

    def analyse(self, layer: int, role: Role) -> dict[str, Any]:
        experts = range(self._config.num_experts)
        curves = [self._curve(self._weight(layer, expert, role)) for expert in experts]
        deltas = [self._curve(self._delta(layer, expert, role)) for expert in experts]
        base = self._curve(self._rebuilt.base(layer, role))

        def samples(expert: int) -> Tensor:
            # An expert's intermediate channels may be permuted without changing what it computes, so they have no
            # common order in which two experts could be compared; the model's hidden dimensions have.
            self._progress.advance(1)
            weight = self._weight(layer, expert, role)
            return weight if role == "down" else weight.T

        cka = cka_matrix(samples, len(experts), self._block)
        found = [curve for curve in deltas if curve is not None]
        return {
            "cka": cka.tolist(),
            "cka_of_unrelated": unrelated_cka(self._config.hidden_size, self._config.intermediate_size),
            "energy": {
                "experts": mean_curve([curve for curve in curves if curve is not None]),
                "base": base,
                "deltas": mean_curve(found) if found else None,
            },
        }

    def _weight(self, layer: int, expert: int, role: Role) -> Tensor:
        if self._model is None:
            return self._rebuilt.weight(layer, expert, role)
        return self._model.weight(layer, expert, role).float()

    def _delta(self, layer: int, expert: int, role: Role) -> Tensor | None:
        if self._model is None:
            return self._rebuilt.delta(layer, expert, role)
        weight, base = self._weight(layer, expert, role), self._rebuilt.base(layer, role)
        return weight if base is None else weight - base

    def _curve(self, matrix: Tensor | None) -> list[float] | None:
        self._progress.advance(1)
        return None if matrix is None else energy_curve(spectrum(matrix))


def _sensitivity(report: dict[str, Any]) -> dict[str, Any] | None:
    """What the statistics tell of a layer's sensitivity, mean over experts, and from which of their figures."""
    figure = next((name for name in ("sensitivity", "relative_error") if name in report), None)
    if figure is None:
        return None
    means: dict[str, Any] = {
        role: sum(report[figure][role]) / len(report[figure][role]) for role in _roles(report[figure])
    }
    return {"from": figure, **means}
