"""What `GET /v1/d2moe/info` answers: the served checkpoint, how it is served, and what it has done so far.

Names are those of `d2moe inspect --json`, where both have a figure.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import vllm
from prometheus_client import Metric
from pydantic import BaseModel

from d2moe_vllm import __version__
from d2moe_vllm.format.config import (
    CheckpointConfig,
    CheckpointError,
    Delta,
    Function,
    Manifest,
    Scope,
    Source,
    Storage,
)
from d2moe_vllm.format.files import read_manifest
from d2moe_vllm.format.recipefile import read_recipe
from d2moe_vllm.format.words import channels_of, describe_layer
from d2moe_vllm.format.words import describe as in_words
from d2moe_vllm.observability.metrics import COLUMNS_USED, DELTA_BYTES, EXPERT_TOKENS, SECONDS, columns_in_use


class Versions(BaseModel):
    d2moe_vllm: str
    vllm: str
    torch: str
    format: int


class Parallel(BaseModel):
    tensor_parallel_size: int
    expert_parallel_size: int


class Experts(BaseModel):
    """Routed experts alone. ratio: the share of the dense experts' parameters that is saved."""

    parameters: int
    bytes: int
    dense_parameters: int
    dense_bytes: int
    ratio: float


class ProjectionInfo(BaseModel):
    """As in quantization_config; columns_in_use follows the scope in force, columns are the original weight's. A
    storage that is None is the checkpoint's dtype."""

    rank: int
    full_base: bool
    base_rank: int
    kept_columns: int
    columns_in_use: int
    columns: int
    delta: Delta
    shared_v: bool
    distinct_u: int
    bases: int
    function: Function | None
    base_storage: Storage | None
    delta_storage: Storage | None


class LayerInfo(BaseModel):
    """stores, channels: in words, as `d2moe inspect` prints them. gate: None of experts that have none."""

    stores: str
    channels: str
    gate: ProjectionInfo | None = None
    up: ProjectionInfo
    down: ProjectionInfo
    trimmed: list[int]


class Seconds(BaseModel):
    sum: float
    count: int


class Counters(BaseModel):
    """By layer group, then by expert, half or rank; as in /metrics, a few seconds old.

    seconds: in routed experts, and calls; empty on GPUs.
    """

    tokens: dict[str, dict[int, int]]
    base_columns_used_ratio: dict[str, dict[str, float]]
    delta_bytes: dict[str, dict[int, int]]
    seconds: dict[str, dict[int, Seconds]]


class Info(BaseModel):
    """parameters, bytes, stored_ratio: of the whole checkpoint; None where its manifest is not at hand.

    stores: what all layers store, in words. dtype: of the checkpoint. recipe: what it was compressed by. backend: what
    computes the experts.
    """

    model: str
    method: str
    family: str
    source: Source
    stores: str
    dtype: str
    scope: Scope
    backend: str
    parameters: int | None
    bytes: int | None
    stored_ratio: float | None
    experts: Experts
    num_experts: int
    hidden_size: int
    intermediate_size: int
    layers: dict[int, LayerInfo]
    parallel: Parallel
    versions: Versions
    recipe: dict[str, Any] | None
    counters: Counters


def describe(
    config: CheckpointConfig, *, model: str, folder: Path | None, scope: Scope, backend: str, tp_size: int, ep_size: int
) -> Info:
    """All of Info but what changes: the counters are empty. folder: the checkpoint's, None if not on this machine."""
    dense = config.layer_numbers * len(config.layers)
    parameters = config.expert_numbers
    manifest = _manifest(folder)
    stored = sum(file.bytes for file in manifest.files.values()) if manifest else None
    return Info(
        model=model,
        method=config.method,
        family=config.family,
        source=config.source,
        stores=in_words(config),
        dtype=config.dtype,
        scope=scope,
        backend=backend,
        parameters=config.numbers(shape for _, shape in manifest.other_tensors.values()) if manifest else None,
        bytes=stored,
        stored_ratio=1 - stored / config.source.bytes if stored else None,
        experts=Experts(
            parameters=parameters,
            bytes=config.expert_bytes,
            dense_parameters=dense,
            dense_bytes=config.layer_bytes * len(config.layers),
            ratio=1 - parameters / dense,
        ),
        num_experts=config.num_experts,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        layers={number: _layer(config, number, scope, ep_size) for number in sorted(config.layers)},
        parallel=Parallel(tensor_parallel_size=tp_size, expert_parallel_size=ep_size),
        versions=Versions(
            d2moe_vllm=__version__, vllm=vllm.__version__, torch=torch.__version__, format=config.format_version
        ),
        recipe=_recipe(folder),
        counters=counters([]),
    )


def counters(families: Iterable[Metric]) -> Counters:
    """From the families of files.collect."""
    found: dict[str, dict[str, dict[Any, Any]]] = defaultdict(lambda: defaultdict(dict))
    for family in families:
        for sample in family.samples:
            labels = dict(sample.labels)
            group = found[sample.name][labels.pop("layers")]
            group[labels.popitem()[1]] = sample.value
    sums, counts = found[f"{SECONDS.name}_sum"], found[f"{SECONDS.name}_count"]
    return Counters(
        tokens=found[f"{EXPERT_TOKENS.name}_total"],
        base_columns_used_ratio=found[COLUMNS_USED.name],
        delta_bytes=found[DELTA_BYTES.name],
        seconds={
            group: {rank: Seconds(sum=sums[group][rank], count=calls) for rank, calls in by_rank.items()}
            for group, by_rank in counts.items()
        },
    )


def _layer(config: CheckpointConfig, number: int, scope: Scope, ep_size: int) -> LayerInfo:
    layer = config.layers[number]
    projections = {
        role: ProjectionInfo(
            **layer[role].model_dump(exclude={"used_columns"}),
            columns_in_use=columns_in_use(config, number, role, scope, prune_down=ep_size == 1),
            columns=config.shape(role)[1],
        )
        for role in config.roles
    }
    return LayerInfo(
        stores=describe_layer(layer),
        channels=channels_of(layer, config.intermediate_size),
        **projections,
        trimmed=list(layer.trimmed),
    )


def _manifest(folder: Path | None) -> Manifest | None:
    """None where it cannot be read: serving itself may do without, as with `--load-format dummy`."""
    try:
        return read_manifest(folder) if folder else None
    except CheckpointError:
        return None


def _recipe(folder: Path | None) -> dict[str, Any] | None:
    """None where it cannot be read: it is only shown."""
    try:
        return read_recipe(folder) if folder else None
    except CheckpointError:
        return None
