"""The metrics by name, and how layers are grouped so that there are few of them."""

from __future__ import annotations

from typing import Literal, NamedTuple

from d2moe_vllm.format.config import CheckpointConfig, Scope
from d2moe_vllm.format.kinds import Role

MAX_GROUPS = 8
"""Layers are reported in at most so many groups: 256 experts then have at most 2048 time series."""

Half = Literal["gate_up", "down"]
HALVES: dict[Half, Role] = {"gate_up": "up", "down": "down"}
"""Gate and up share their columns; without a gate they are up's."""


class Metric(NamedTuple):
    """One family. type: of Prometheus, by prometheus_client's names; a counter's samples end in `_total`."""

    name: str
    type: Literal["counter", "gauge", "summary"]
    labels: tuple[str, ...]
    help: str


EXPERT_TOKENS = Metric(
    "d2moe_expert_tokens",
    "counter",
    ("layers", "expert"),
    "Tokens routed to the expert, summed over the layers of the group; padding is no token.",
)
COLUMNS_USED = Metric(
    "d2moe_base_columns_used_ratio",
    "gauge",
    ("layers", "half"),
    "Share of the original weight's input columns that the base uses per selection, mean over the group's layers.",
)
DELTA_BYTES = Metric(
    "d2moe_delta_bytes",
    "gauge",
    ("layers", "rank"),
    "Bytes of the experts' deltas that the rank holds.",
)
SECONDS = Metric(
    "d2moe_experts_seconds",
    "summary",
    ("layers", "rank"),
    "Seconds the rank spent in routed experts and how often; on CPUs only.",
)


def layer_groups(config: CheckpointConfig) -> dict[int, str]:
    """Compressed layer -> label of its group ("0-3"): runs of equally many layers, the last may have fewer."""
    layers = sorted(config.layers)
    size = -(-len(layers) // MAX_GROUPS)
    groups = {}
    for start in range(0, len(layers), size):
        members = layers[start : start + size]
        label = f"{members[0]}-{members[-1]}" if len(members) > 1 else f"{members[0]}"
        groups.update(dict.fromkeys(members, label))
    return groups


def columns_in_use(config: CheckpointConfig, layer: int, role: Role, scope: Scope, *, prune_down: bool) -> int:
    """How many columns of a projection's base one selection uses, over all ranks; 0 without such a base.

    prune_down False: no selection on down (expert parallelism, METHODS 1.5).
    """
    projection = config.layers[layer][role]
    if projection.full_base:
        channels = config.layers[layer].channels
        return sum(channels.base or ()) if channels and role == "down" else config.shape(role)[1]
    selects = scope != "off" and (role != "down" or prune_down)
    return projection.used_columns if selects else projection.kept_columns


def columns_used_ratio(config: CheckpointConfig, layer: int, scope: Scope, *, prune_down: bool) -> dict[Half, float]:
    """COLUMNS_USED of one layer; a half whose base has no columns is left out."""
    ratios: dict[Half, float] = {}
    for half, role in HALVES.items():
        if used := columns_in_use(config, layer, role, scope, prune_down=prune_down):
            ratios[half] = used / config.shape(role)[1]
    return ratios
