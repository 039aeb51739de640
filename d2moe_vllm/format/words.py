"""What a checkpoint stores, in words: for `plan`, `compress`, `inspect` and the card."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from d2moe_vllm.format.config import CheckpointConfig, Layer, Projection, Storage
from d2moe_vllm.format.kinds import STORAGES, width


def describe(config: CheckpointConfig) -> str:
    """One sentence without a full stop: "4-bit base, 2-bit deltas, 74 % of the channels"."""
    layers = config.layers
    kinds = Counter(_layer(layer) for layer in layers.values())
    parts = [f"{what}{_where(count, len(layers))}" for what, count in kinds.most_common()]
    kept = _kept(layers, config)
    if kept is not None:
        parts.append(f"{100 * kept:.0f} % of the channels")
    return "; ".join(parts)


def describe_layer(layer: Layer) -> str:
    """What one layer stores, but for its channels."""
    return _layer(layer)


def channels_of(layer: Layer, intermediate_size: int) -> str:
    """How many channels the layer's experts keep, from the narrowest to the widest."""
    if layer.channels is None:
        return f"all {intermediate_size}"
    counts = [sum(one) for one in layer.channels.experts]
    return f"{min(counts)} to {max(counts)} of {intermediate_size}"


def _where(count: int, layers: int) -> str:
    return "" if count == layers else f" in {count} of {layers} layers"


def _layer(layer: Layer) -> str:
    up, down = _projection(layer.up), _projection(layer.down)  # gate's is up's
    if up != down and not (layer.up.has_base or layer.down.has_base):
        down = _own(layer.down)
    return up if up == down else f"{up} in {'up' if layer.gate is None else 'gate and up'}, {down} in down"


def _projection(projection: Projection) -> str:
    base, own = _base(projection), _own(projection)
    if not projection.has_base:
        return f"no base, {own}"
    return f"{base}, {own}" if own else f"{base} alone"


def _base(projection: Projection) -> str:
    kind = "low-rank base" if projection.base_rank else "pruned base" if projection.kept_columns else "base"
    return f"{_bits(projection.base_storage)} {kind}"


def _own(projection: Projection) -> str:
    """What is an expert's own."""
    bits = _bits(projection.delta_storage)
    if projection.delta == "dense":
        return f"{bits} {'deltas' if projection.has_base else 'experts'}"
    if not projection.rank:
        return ""
    kind = {"factors": "low-rank", "columns": "column", "bases": "mixed"}[projection.delta]
    return f"{bits} {kind} {'deltas' if projection.has_base else 'experts'}"


def _bits(storage: Storage | None) -> str:
    bits = STORAGES[storage.type].bits if storage is not None else 0
    return f"{bits}-bit" if bits else "16-bit" if storage is None or storage.type != "float32" else "32-bit"


def _kept(layers: Mapping[int, Layer], config: CheckpointConfig) -> float | None:
    """Share of the intermediate channels that is left; None where all are."""
    if all(layer.channels is None for layer in layers.values()):
        return None
    every = config.intermediate_size
    kept = sum(width(layer, e, every) for layer in layers.values() for e in range(config.num_experts))
    return kept / (every * config.num_experts * len(layers))
