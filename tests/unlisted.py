"""Small random checkpoints of families that transformers knows and d2moe has no row of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from families import stock_model, write_tokenizer
from small_families import COMMON, MLA
from transformers import CONFIG_MAPPING

_SIZES = {**COMMON, "intermediate_size": 96, "moe_intermediate_size": 48, "num_experts_per_tok": 2}
UNLISTED: dict[str, dict[str, Any]] = {
    "axk1": {
        **_SIZES, **MLA, "q_lora_rank": 48, "n_routed_experts": 8, "first_k_dense_replace": 1, "n_shared_experts": 1,
        "n_group": 2, "topk_group": 1, "routed_scaling_factor": 1.5,
    },
    "hunyuan_v1_moe": {**COMMON, "intermediate_size": 48, "num_experts": 8, "moe_topk": 2, "head_dim": 32},
    "granitemoeshared": {
        **COMMON, "intermediate_size": 48, "shared_intermediate_size": 80, "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "jamba": {
        **COMMON, "intermediate_size": 48, "num_hidden_layers": 4, "num_experts": 8, "num_experts_per_tok": 2,
        "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
        "mamba_dt_rank": 4, "mamba_d_state": 4,
    },
    "llama": {**COMMON, "intermediate_size": 96},
}  # fmt: skip


def write_unlisted(folder: Path, family: str, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Path:
    """As transformers writes it, with a tokenizer; `changes` go over UNLISTED."""
    config = CONFIG_MAPPING[family](**{**UNLISTED[family], **changes})
    stock_model(config).to(dtype).save_pretrained(folder)
    write_tokenizer(folder)
    return folder
