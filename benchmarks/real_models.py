"""Real models' configurations and tensors, as sparse files that take no room: for plans of what nobody has here."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from d2moe_vllm.format.kinds import TensorSpec
from offline.io.shards import plan_shards

MIXTRAL_8X7B = {
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_local_experts": 8, "num_experts_per_tok": 2, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 32768, "dtype": "bfloat16",
}  # fmt: skip
QWEN3_235B = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 4096, "hidden_act": "silu",
    "intermediate_size": 12288, "moe_intermediate_size": 1536, "num_experts": 128, "num_experts_per_tok": 8,
    "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], "num_hidden_layers": 94,
    "num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 128, "attention_bias": False,
    "vocab_size": 151936, "max_position_embeddings": 40960, "rope_theta": 1000000.0, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip
DEEPSEEK_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "hidden_size": 7168, "hidden_act": "silu",
    "intermediate_size": 18432, "moe_intermediate_size": 2048, "n_routed_experts": 256, "n_shared_experts": 1,
    "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "first_k_dense_replace": 3, "moe_layer_freq": 1,
    "norm_topk_prob": True, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "routed_scaling_factor": 2.5,
    "num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "vocab_size": 129280,
    "max_position_embeddings": 163840, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "dtype": "bfloat16",
    "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
}  # fmt: skip


def write_sparse(folder: Path, config: Mapping[str, Any], specs: Mapping[str, TensorSpec]) -> Path:
    """A model's names and shapes in sparse files, which take no room."""
    folder.mkdir()
    shards = plan_shards(specs)
    for shard in shards:
        with (folder / shard.file).open("wb") as file:
            file.write(shard.header)
            file.truncate(shard.nbytes)
    weight_map = {name: shard.file for shard in shards for name in shard.tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def mixtral_8x7b(folder: Path) -> Path:
    """93 GB."""
    shapes = {"model.embed_tokens.weight": (32000, 4096), "lm_head.weight": (32000, 4096), "model.norm.weight": (4096,)}
    for layer in range(32):
        prefix = f"model.layers.{layer}"
        attention = {"q": (4096, 4096), "k": (1024, 4096), "v": (1024, 4096), "o": (4096, 4096)}
        shapes |= {f"{prefix}.self_attn.{name}_proj.weight": shape for name, shape in attention.items()}
        shapes |= {f"{prefix}.{name}_layernorm.weight": (4096,) for name in ("input", "post_attention")}
        shapes[f"{prefix}.block_sparse_moe.gate.weight"] = (8, 4096)
        for expert in range(8):
            experts = f"{prefix}.block_sparse_moe.experts.{expert}"
            shapes |= {f"{experts}.{w}.weight": (14336, 4096) for w in ("w1", "w3")}
            shapes[f"{experts}.w2.weight"] = (4096, 14336)
    return write_sparse(folder, MIXTRAL_8X7B, {name: TensorSpec("BF16", shape) for name, shape in shapes.items()})


def qwen3_235b(folder: Path) -> Path:
    """470 GB."""
    hidden, middle, vocabulary = 4096, 1536, (151936, 4096)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": vocabulary, "lm_head": vocabulary}
    shapes["model.norm"] = (hidden,)
    for layer in range(94):
        prefix = f"model.layers.{layer}"
        attention = {"q": (8192, hidden), "k": (512, hidden), "v": (512, hidden), "o": (hidden, 8192)}
        shapes |= {f"{prefix}.self_attn.{name}_proj": shape for name, shape in attention.items()}
        shapes |= {f"{prefix}.self_attn.{name}_norm": (128,) for name in ("q", "k")}
        shapes |= {f"{prefix}.{name}_layernorm": (hidden,) for name in ("input", "post_attention")}
        shapes[f"{prefix}.mlp.gate"] = (128, hidden)
        for expert in range(128):
            experts = f"{prefix}.mlp.experts.{expert}"
            shapes |= {f"{experts}.{name}_proj": (middle, hidden) for name in ("gate", "up")}
            shapes[f"{experts}.down_proj"] = (hidden, middle)
    specs = {f"{name}.weight": TensorSpec("BF16", shape) for name, shape in shapes.items()}
    return write_sparse(folder, QWEN3_235B, specs)


def deepseek_v3(folder: Path, layers: int = 61) -> Path:
    """As it was released, in fp8: 673 GB with all of its 61 layers."""
    hidden, narrow, heads = 7168, 2048, 128
    shapes = {"model.embed_tokens": (129280, hidden), "lm_head": (129280, hidden), "model.norm": (hidden,)}
    specs = {f"{name}.weight": TensorSpec("BF16", shape) for name, shape in shapes.items()}

    def linear(name: str, out: int, inputs: int) -> None:
        specs[f"{name}.weight"] = TensorSpec("F8_E4M3", (out, inputs))
        specs[f"{name}.weight_scale_inv"] = TensorSpec("F32", (-(-out // 128), -(-inputs // 128)))

    def mlp(name: str, middle: int) -> None:
        linear(f"{name}.gate_proj", middle, hidden)
        linear(f"{name}.up_proj", middle, hidden)
        linear(f"{name}.down_proj", hidden, middle)

    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        attention = f"{prefix}.self_attn"
        for name, out, inputs in (
            ("q_a_proj", 1536, hidden), ("q_b_proj", heads * 192, 1536), ("kv_a_proj_with_mqa", 576, hidden),
            ("kv_b_proj", heads * 256, 512), ("o_proj", hidden, heads * 128),
        ):  # fmt: skip
            linear(f"{attention}.{name}", out, inputs)
        norms = {f"{attention}.q_a_layernorm": 1536, f"{attention}.kv_a_layernorm": 512}
        norms |= {f"{prefix}.{name}_layernorm": hidden for name in ("input", "post_attention")}
        specs |= {f"{name}.weight": TensorSpec("BF16", (size,)) for name, size in norms.items()}
        if layer < 3:
            mlp(f"{prefix}.mlp", 18432)
            continue
        specs[f"{prefix}.mlp.gate.weight"] = TensorSpec("BF16", (256, hidden))
        specs[f"{prefix}.mlp.gate.e_score_correction_bias"] = TensorSpec("F32", (256,))
        for name in (*(f"experts.{expert}" for expert in range(256)), "shared_experts"):
            mlp(f"{prefix}.mlp.{name}", narrow)
    return write_sparse(folder, DEEPSEEK_V3 | {"num_hidden_layers": layers}, specs)


MODELS: Mapping[str, Callable[[Path], Path]] = {
    "Mixtral-8x7B": mixtral_8x7b,
    "Qwen3-235B-A22B": qwen3_235b,
    "DeepSeek-V3": deepseek_v3,
}
