"""The compressed experts of one layer, ready to run in float32: for evaluation, and for calibrating what follows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from d2moe_vllm.format.config import CheckpointConfig, Scope
from d2moe_vllm.hf.experts import D2Experts


def compressed_experts(
    config: CheckpointConfig,
    layer: int,
    tensor: Callable[[str], Tensor],
    activation: Callable[[Tensor], Tensor],
    scope: Scope,
) -> D2Experts:
    """tensor: gives a tensor of the checkpoint by its full name; floating ones are widened one at a time."""
    with torch.device("meta"):  # no second copy of the layer, not even for a moment
        experts = D2Experts(
            config.num_experts,
            config.hidden_size,
            config.intermediate_size,
            config.layers[layer].model_dump(),
            groups=config.pruning.groups,
            projections=dict(config.projections.items()),
            dtype=config.dtype,
            activation=activation,
            swiglu=None if config.swiglu is None else config.swiglu.model_dump(),
            scope=scope,
        )
    prefix = config.experts_prefix(layer) + "."
    state = {}
    for name in config.stored(layer):
        found = tensor(name)
        state[name.removeprefix(prefix)] = found.float() if found.is_floating_point() else found
    experts.load_state_dict(state, strict=True, assign=True)
    return experts
