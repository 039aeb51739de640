"""The dense original beside a compressed checkpoint."""

from __future__ import annotations

from d2moe_vllm.format.config import CheckpointConfig
from offline.errors import InputError
from offline.source.dense import DenseModel, open_dense
from offline.source.families import from_row, known


def open_original(source: str, config: CheckpointConfig) -> DenseModel:
    """Open SRC, which must be the model that `config` says it was compressed from.

    Raises InputError where family, sizes or number of parameters differ, and all that `open_dense` raises.
    """
    with known(from_row(config.family_row) if config.family_row else None):
        model = open_dense(source)
    shape = model.shape
    figures = {
        "family": (model.family.model_type, config.family),
        "experts": (shape.num_experts, config.num_experts),
        "hidden size": (shape.hidden_size, config.hidden_size),
        "intermediate size": (shape.intermediate_size, config.intermediate_size),
        "parameters": (model.reader.parameters, config.source.parameters),
        "dtype": (model.dtype, config.dtype),
    }
    for what, (found, expected) in figures.items():
        if found != expected:
            raise InputError(
                f"{source} is not what the checkpoint was made from ({config.source.name}): {what} {found}, "
                f"not {expected}; give the original model"
            )
    if beyond := set(config.layers) - set(shape.layers):
        raise InputError(f"{source} has no experts in layer {min(beyond)}, which is compressed; give the original")
    return model
