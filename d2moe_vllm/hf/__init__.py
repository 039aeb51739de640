"""Compressed checkpoints in plain transformers. Importing this registers them: from_pretrained loads them then.

The names of families.py are here too; that module is for those who want neither torch nor transformers imported.
"""

from __future__ import annotations

from d2moe_vllm.families import (
    MODEL_CLASSES,
    MODELING_FILE,
    auto_map,
    checkpoint_modeling_source,
    register_configs,
    stock_config_class,
    stock_model_class,
)
from d2moe_vllm.hf.quantizer import register

__all__ = [
    "MODELING_FILE",
    "MODEL_CLASSES",
    "auto_map",
    "checkpoint_modeling_source",
    "register_configs",
    "stock_config_class",
    "stock_model_class",
]

register()
