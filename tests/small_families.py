"""The families' small models: all that the tests have to be told of a family.

Sizes that vLLM's CPU backend wants: heads of 32 or more, and for MLA a latent of 512 + 64. No two dimensions of
a matrix are equal, so that a mixed-up orientation shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any, NamedTuple

VOCABULARY = 4096

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": False,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None,
}  # fmt: skip
MLA = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 32, "v_head_dim": 32}
DEEPSEEK_V3 = {
    **MLA, "q_lora_rank": 48, "intermediate_size": 96, "moe_intermediate_size": 48, "n_routed_experts": 8,
    "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
    "norm_topk_prob": True, "routed_scaling_factor": 1.5, "num_nextn_predict_layers": 0,
}  # fmt: skip
DEEPSEEK_V3_WRITTEN = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1}


class Small(NamedTuple):
    """A family's small model. config: what its configuration adds to COMMON; written: what released config.json files
    say beside, which transformers does not write but vLLM reads; refused: changes of config.json that make another
    model of it in vLLM than in transformers. expert_parallel: served on two such ranks too, for what only it
    has. released: hidden and intermediate size of the released models' experts. refused_on_cpus: what our plugin or
    vLLM says where vLLM's CPU backend does not serve the family, or not as transformers computes it.
    served: further changes of config, and of outside, for the tests that serve it in float32 on a CPU.
    outside: of a multimodal model, what its configuration says beside its text_config, which has all of the above.
    stacked: the released form is that of transformers' modules; transposed: with each stack's matrices transposed.
    imports: a module that vLLM's class of the family wants, and that is not part of every installation.
    custom_ops: whether vLLM's own kernels for CPUs serve it eagerly, or misread its strides. ours_alone: what stock
    vLLM says where its CPU backend serves no such model, and ours does."""

    config: dict[str, Any]
    written: Mapping[str, Any] = MappingProxyType({})
    refused: tuple[dict[str, Any], ...] = ()
    expert_parallel: bool = False
    released: tuple[tuple[int, int], ...] = ()
    refused_on_cpus: str | None = None
    served: Mapping[str, Any] = MappingProxyType({})
    outside: Mapping[str, Any] = MappingProxyType({})
    stacked: bool = False
    transposed: bool = False
    imports: str | None = None
    custom_ops: bool = True
    ours_alone: str | None = None

    @property
    def refused_here(self) -> str | None:
        """What is said where vLLM does not serve it on this machine's CPU, with us or without."""
        if self.imports and find_spec(self.imports) is None:
            return f"No module named '{self.imports}'"
        return self.refused_on_cpus


QWEN3_5 = {
    "moe_intermediate_size": 48, "shared_expert_intermediate_size": 80, "num_experts": 8, "num_experts_per_tok": 3,
    "head_dim": 32, "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_key_head_dim": 32, "linear_value_head_dim": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25, "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    },
}  # fmt: skip
QWEN3_5_REFUSED: tuple[dict[str, Any], ...] = (
    {"attention_bias": True},
    {"attn_output_gate": False},
    {"output_gate_type": "sigmoid"},
    {"layer_scale": True},
    {"norm_topk_prob": False},
    {"is_causal": False},
    {"tie_word_embeddings": True},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}},
    {"rope_parameters": {**QWEN3_5["rope_parameters"], "mrope_interleaved": False}},
)
VISION = {
    "depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4, "out_hidden_size": 64,
    "num_position_embeddings": 16,
}  # fmt: skip
"""A vision tower of the Qwen models."""
TOKENS_OF_IMAGES = {"image_token_id": 11, "video_token_id": 12, "vision_start_token_id": 13, "vision_end_token_id": 14}

LLAMA4 = {
    "intermediate_size": 48, "intermediate_size_mlp": 96, "num_local_experts": 8, "num_experts_per_tok": 1,
    "head_dim": 32, "interleave_moe_layer_step": 2, "num_hidden_layers": 4, "no_rope_layers": [1, 1, 0, 1],
    "attention_chunk_size": 128,
}  # fmt: skip
LLAMA4_REFUSED: tuple[dict[str, Any], ...] = (
    {"num_experts_per_tok": 2},
    {"attention_bias": True},
    {"moe_layers": [0, 1, 2, 3]},
    {"attention_chunk_size": None},
    {"layer_types": ["full_attention"] * 4},
    {"no_rope_layers": [1, 1, 1, 1]},
    {"hidden_act": "gelu"},
    {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}},
)


SMALL = {
    "mixtral": Small(
        {"intermediate_size": 96, "num_local_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 2},
        refused=(
            {"sliding_window": 0},
            {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]},
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            {"rope_scaling": {"type": "linear", "factor": 2}},
            {"partial_rotary_factor": 0.5},
            {"architectures": ["MixtralForSequenceClassification"]},
        ),
        released=((4096, 14336), (6144, 16384)),
    ),
    "phimoe": Small(
        {
            "intermediate_size": 96, "num_local_experts": 4, "num_experts_per_tok": 2, "router_jitter_noise": 0.01,
            "lm_head_bias": True, "attention_bias": True, "num_hidden_layers": 2,
        },
        written={"architectures": ["PhiMoEForCausalLM"]},
        refused=(
            {"attention_bias": False},
            {"tie_word_embeddings": True},
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
            {"sliding_window": 0},
        ),
        released=((4096, 6400),),
    ),
    "qwen2_moe": Small(
        {
            "intermediate_size": 96, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 80,
            "num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": False, "mlp_only_layers": [0],
            "decoder_sparse_step": 1,
        },
        refused=(
            {"use_sliding_window": True, "sliding_window": 32},
            {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
            {"qkv_bias": False},
            {"head_dim": 16},
            {"dual_chunk_attention_config": {"chunk_size": 32}},
        ),
        released=((3584, 2560), (2048, 1408)),
    ),
    "qwen3_moe": Small(
        {
            "intermediate_size": 96, "moe_intermediate_size": 48, "num_experts": 8, "num_experts_per_tok": 3,
            "head_dim": 32, "norm_topk_prob": True, "mlp_only_layers": [0], "decoder_sparse_step": 1,
        },
        refused=({"attention_bias": True}, {"shared_expert_intermediate_size": 64}, {"sliding_window": 0}),
        expert_parallel=True,
        released=((2048, 768), (4096, 1536)),
    ),
    "olmoe": Small(
        {"intermediate_size": 48, "num_experts": 8, "num_experts_per_tok": 2, "num_hidden_layers": 2},
        refused=(
            {"rms_norm_eps": 1e-6},
            {"attention_bias": True},
            {"tie_word_embeddings": True},
            {"sliding_window": 32},
            {"clip_qkv": 8.0},
        ),
        released=((2048, 1024),),
    ),
    "deepseek": Small(
        {
            "intermediate_size": 96, "moe_intermediate_size": 48, "n_routed_experts": 8, "n_shared_experts": 2,
            "num_experts_per_tok": 2, "first_k_dense_replace": 1, "norm_topk_prob": False,
        },
        written={"scoring_func": "softmax"},
        refused=(
            {"routed_scaling_factor": 2.0},
            {"n_group": 2},
            {"topk_method": "noaux_tc"},
            {"attention_bias": True},
            {"mlp_bias": True},
            {"scoring_func": None},
            {"norm_topk_prob": True, "num_experts_per_tok": 1},
        ),
        released=((2048, 1408),),
    ),
    "deepseek_v2": Small(
        {
            **MLA, "q_lora_rank": None, "intermediate_size": 96, "moe_intermediate_size": 48, "n_routed_experts": 8,
            "n_shared_experts": 2, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
            "topk_method": "group_limited_greedy", "norm_topk_prob": False, "routed_scaling_factor": 2.0,
        },
        written={"scoring_func": "softmax", "moe_layer_freq": 1},
        refused=(
            {"topk_method": "greedy"},
            {"n_group": None},
            {"moe_layer_freq": None},
            {"index_topk": None},
            {"mlp_bias": True},
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
        ),
        released=((5120, 1536), (2048, 1408)),
    ),
    "deepseek_v3": Small(
        DEEPSEEK_V3,
        written=DEEPSEEK_V3_WRITTEN,
        refused=(
            {"rope_interleave": False},
            {"attention_bias": True},
            {"llama_4_scaling": {"beta": 1}},
            {"rope_scaling": {"type": "yarn", "factor": 4.0, "mscale": 0.7}},
            {"rope_scaling": {"type": "yarn", "factor": 4.0, "attention_factor": 1.0}},
        ),
        expert_parallel=True,
        released=((7168, 2048),),
    ),
    "kimi_k2": Small(
        {**DEEPSEEK_V3, "n_group": 1},
        written={**DEEPSEEK_V3_WRITTEN, "model_type": "kimi_k2"},
        refused=({"rope_interleave": None}, {"tie_word_embeddings": True}, {"scoring_func": "softmax"}),
        released=((7168, 2048),),
    ),
    "glm4_moe": Small(
        {
            "head_dim": 32, "intermediate_size": 96, "moe_intermediate_size": 48, "n_routed_experts": 8,
            "n_shared_experts": 1, "num_experts_per_tok": 3, "first_k_dense_replace": 1, "norm_topk_prob": True,
            "routed_scaling_factor": 1.5, "num_nextn_predict_layers": 0, "attention_bias": True, "use_qk_norm": True,
        },
        refused=(
            {"head_dim": None},
            {"tie_word_embeddings": True},
            {"rotary_pct": 0.25},
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
        ),
        released=((4096, 1408), (5120, 1536)),
    ),
    "minimax_m2": Small(
        {
            "head_dim": 32, "rotary_dim": 16, "intermediate_size": 48, "num_local_experts": 8,
            "num_experts_per_tok": 3, "num_hidden_layers": 2,
        },
        written={"scoring_func": "sigmoid", "use_routing_bias": True},
        refused=(
            {"scoring_func": "softmax"},
            {"use_routing_bias": False},
            {"rotary_dim": None},
            {"head_dim": None},
            {"attention_bias": True},
            {"tie_word_embeddings": True},
        ),
        released=((3072, 1536),),
        refused_on_cpus="vLLM's CPU backend does not route by sigmoid scores without groups of experts",
    ),
    "ernie4_5_moe": Small(
        {
            "intermediate_size": 96, "moe_intermediate_size": 48, "moe_num_experts": 8, "moe_k": 3,
            "moe_num_shared_experts": 2, "moe_layer_start_index": 1, "moe_layer_end_index": 2,
            "moe_layer_interval": 1,
        },
        refused=({"use_bias": True}, {"use_moe": False}, {"moe_norm_min": 0.5}, {"partial_rotary_factor": 0.5}),
        released=((2560, 1536), (8192, 3584)),
        refused_on_cpus="vLLM's CPU backend leaves out the bias by which experts are chosen",
    ),
    "glm4_moe_lite": Small(
        {
            **MLA, "q_lora_rank": 48, "intermediate_size": 96, "moe_intermediate_size": 48, "n_routed_experts": 8,
            "n_shared_experts": 1, "num_experts_per_tok": 3, "mlp_layer_types": ["dense", "sparse", "sparse"],
            "norm_topk_prob": True, "routed_scaling_factor": 1.5, "num_nextn_predict_layers": 0,
        },
        written={"first_k_dense_replace": 1},
        refused=(
            {"first_k_dense_replace": 2},
            {"first_k_dense_replace": None},
            {"mlp_layer_types": ["dense", "sparse", "dense"]},
            {"attention_bias": True},
            {"rope_interleave": False},
            {"index_topk": 64},
            {"rope_scaling": {"type": "yarn", "factor": 4.0, "mscale": 0.7}},
        ),
        released=((2048, 1536),),
    ),
    "hy_v3": Small(
        {
            "head_dim": 32, "intermediate_size": 96, "moe_intermediate_size": 48, "num_experts": 8,
            "num_experts_per_tok": 3, "num_shared_experts": 1, "router_scaling_factor": 1.5,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
        },
        written={"first_k_dense_replace": 1, "expert_hidden_dim": 48, "route_norm": True, "qk_norm": True},
        refused=(
            {"route_norm": False},
            {"qk_norm": False},
            {"expert_hidden_dim": 64},
            {"first_k_dense_replace": 0},
            {"attention_bias": True},
            {"head_dim": None},
        ),
        released=((4096, 1536),),
    ),
    "qwen3_next": Small(
        {
            "intermediate_size": 96, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 80,
            "num_experts": 8, "num_experts_per_tok": 3, "head_dim": 32, "mlp_only_layers": [0],
            "layer_types": ["linear_attention", "full_attention", "linear_attention"], "linear_key_head_dim": 32,
            "linear_value_head_dim": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        },
        refused=(
            {"attention_bias": True},
            {"attn_output_gate": False},
            {"output_gate_type": "sigmoid"},
            {"layer_scale": True},
            {"tie_word_embeddings": True},
            {"head_dim": None},
        ),
        released=((2048, 512),),
        served={"layer_types": ["full_attention"] * 3},  # linear attention takes bfloat16 alone there
    ),
    "lfm2_moe": Small(
        {
            "intermediate_size": 96, "moe_intermediate_size": 48, "num_experts": 8, "num_experts_per_tok": 3,
            "num_dense_layers": 1, "layer_types": ["conv", "full_attention", "conv"], "tie_word_embeddings": True,
            "routed_scaling_factor": 1.5,
        },
        refused=(
            {"tie_word_embeddings": False},
            {"tie_embedding": False},
            {"layer_types": None},
            {"head_dim": 64},
            {"partial_rotary_factor": 0.5},
        ),
        released=((2048, 1792),),
        custom_ops=False,  # its norm of queries and keys
    ),
    "deepseek_v32": Small(
        {
            **DEEPSEEK_V3, "index_topk": 8, "index_head_dim": 96, "index_n_heads": 2,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
        },
        written=DEEPSEEK_V3_WRITTEN,
        refused=(
            {"indexer_rope_interleave": True},
            {"index_topk_freq": 4},
            {"index_topk_pattern": "FSS"},
            {"index_topk": None},
            {"mlp_layer_types": ["dense", "sparse", "dense"]},
            {"scoring_func": "softmax"},
            {"rope_scaling": {"type": "yarn", "factor": 4.0, "mscale": 0.7}},
        ),
        released=((7168, 2048),),
        refused_on_cpus="Sparse Attention is not supported on CPU",
    ),
    "glm_moe_dsa": Small(
        {
            **DEEPSEEK_V3, "index_topk": 8, "index_head_dim": 96, "index_n_heads": 2,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
        },
        written={**DEEPSEEK_V3_WRITTEN, "indexer_rope_interleave": True},
        refused=(
            {"indexer_rope_interleave": None},
            {"index_topk_freq": 4},
            {"index_topk_pattern": "FSS"},
            {"indexer_types": ["full", "shared", "full"]},
            {"index_topk": None},
            {"mlp_layer_types": ["dense", "sparse", "dense"]},
            {"scoring_func": "softmax"},
            {"rope_scaling": {"type": "yarn", "factor": 4.0, "mscale": 0.7}},
        ),
        released=((6144, 2048),),
        refused_on_cpus="Sparse Attention is not supported on CPU",
    ),
    "qwen3_vl_moe": Small(
        {
            "intermediate_size": 96, "moe_intermediate_size": 48, "num_experts": 8, "num_experts_per_tok": 3,
            "head_dim": 32, "mlp_only_layers": [0],
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 4, 4], "mrope_interleaved": True,
            },
        },
        written={"norm_topk_prob": True},
        refused=(
            {"norm_topk_prob": None},
            {"attention_bias": True},
            {"tie_word_embeddings": True},
            {"architectures": ["Qwen3VLMoeForConditionalGenerationX"]},
            {"moe_intermediate_size": 64},
            {"moe_intermediate_size": 32},
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "mrope_section": [8, 4, 4],
                                 "mrope_interleaved": True}},
        ),
        released=((2048, 768), (4096, 1536)),
        outside={"vision_config": {**VISION, "deepstack_visual_indexes": [0]}, **TOKENS_OF_IMAGES},
        stacked=True,
        transposed=True,
        imports="torchvision",
    ),
    "qwen3_5_moe": Small(
        QWEN3_5,
        refused=(
            *QWEN3_5_REFUSED,
            {"architectures": ["Qwen3_5MoeForCausalLM"]},
            {"text_config": {"tie_word_embeddings": True}},
        ),
        released=((2048, 512), (3072, 1024), (4096, 1024)),
        served={"layer_types": ["full_attention"] * 3},  # linear attention takes bfloat16 alone there
        outside={"vision_config": VISION, **TOKENS_OF_IMAGES},
        stacked=True,
        imports="torchvision",
    ),
    "qwen3_5_moe_text": Small(
        QWEN3_5,
        refused=(*QWEN3_5_REFUSED, {"architectures": ["Qwen3_5MoeForConditionalGeneration"]}),
        released=((2048, 512), (3072, 1024), (4096, 1024)),
        served={"layer_types": ["full_attention"] * 3},
        imports="torchvision",
    ),
    "gemma4": Small(
        {
            "intermediate_size": 96, "moe_intermediate_size": 48, "num_experts": 8, "top_k_experts": 3,
            "enable_moe_block": True, "head_dim": 32, "global_head_dim": 64, "num_global_key_value_heads": 1,
            "attention_k_eq_v": True, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "sliding_window": 16, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, "pad_token_id": 0,
            "vocab_size_per_layer_input": 64, "tie_word_embeddings": True, "final_logit_softcapping": 30.0,
            "use_bidirectional_attention": "vision",
        },
        refused=(
            {"attention_bias": True},
            {"hidden_activation": "silu"},
            {"hidden_activation": None},
            {"enable_moe_block": False},
            {"hidden_size_per_layer_input": 16},
            {"num_kv_shared_layers": 1},
            {"use_double_wide_mlp": True},
            {"attn_logit_softcapping": 50.0},
            {"use_bidirectional_attention": "all"},
            {"tie_word_embeddings": False},
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0},
                                 "full_attention": {"rope_type": "proportional"}}},
            {"rope_parameters": {"sliding_attention": {"rope_type": "default", "partial_rotary_factor": 0.5},
                                 "full_attention": {"rope_type": "proportional"}}},
        ),
        released=((2816, 704),),
        outside={
            "vision_config": {
                "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
                "num_key_value_heads": 2, "head_dim": 16, "patch_size": 4, "position_embedding_size": 16,
            },
            "audio_config": None, "tie_word_embeddings": True,
            "image_token_id": 4093, "video_token_id": 4094, "audio_token_id": 4095,
        },
        # transformers has padding in the place of such a token, also of one that a random model makes up.
        served={"image_token_id": 5000, "video_token_id": 5001, "audio_token_id": 5002},
        stacked=True,
        imports="torchvision",
    ),
    "gpt_oss": Small(
        {
            "intermediate_size": 96, "num_local_experts": 8, "num_experts_per_tok": 3, "head_dim": 32,
            "num_attention_heads": 4, "sliding_window": 16, "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 15e4, "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0,
                "truncate": False, "original_max_position_embeddings": 128,
            },
        },
        refused=(
            {"swiglu_limit": 5.0},
            {"swiglu_alpha": 1.0},
            {"attention_bias": False},
            {"rms_norm_eps": 1e-6},
            {"hidden_act": "gelu"},
            {"layer_types": ["full_attention"] * 3},
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        ),
        expert_parallel=True,
        released=((2880, 2880),),
        stacked=True,
    ),
    "llama4": Small(
        LLAMA4,
        refused=(
            *LLAMA4_REFUSED,
            {"architectures": ["Llama4ForCausalLM"]},
            {"tie_word_embeddings": True},
            {"text_config": {"tie_word_embeddings": True}},
        ),
        released=((5120, 8192),),
        outside={
            "vision_config": {
                "hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2,
                "image_size": 16, "patch_size": 4, "vision_output_dim": 40, "projector_input_dim": 40,
                "projector_output_dim": 40,
            },
            "image_token_index": 11, "boi_token_index": 12, "eoi_token_index": 13,
        },
        stacked=True,
        imports="torchvision",
    ),
    "llama4_text": Small(
        LLAMA4,
        refused=LLAMA4_REFUSED,
        expert_parallel=True,
        released=((5120, 8192),),
        stacked=True,
    ),
    "afmoe": Small(
        {
            "intermediate_size": 96, "moe_intermediate_size": 48, "num_experts": 8, "num_experts_per_tok": 3,
            "num_dense_layers": 1, "num_shared_experts": 1, "head_dim": 32, "route_scale": 1.5, "mup_enabled": True,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"], "sliding_window": 16,
        },
        written={"score_func": "sigmoid", "route_norm": True, "n_group": 1, "topk_group": 1},
        refused=(
            {"score_func": "softmax"},
            {"route_norm": False},
            {"n_group": 2},
            {"topk_group": None},
            {"attention_bias": True},
            {"tie_word_embeddings": True},
            {"sliding_window": None},
            {"sliding_window": 0},
            {"partial_rotary_factor": 0.5},
        ),
        released=((2048, 1024), (3072, 3072)),
    ),
    "laguna": Small(
        {
            "intermediate_size": 96, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 80,
            "num_experts": 8, "num_experts_per_tok": 3, "head_dim": 32, "num_attention_heads_per_layer": [2, 4, 2],
            "layer_types": ["full_attention", "sliding_attention", "full_attention"], "sliding_window": 16,
            "moe_routed_scaling_factor": 1.5, "moe_router_logit_softcapping": 8.0, "gating": True,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
        },
        refused=(
            {"gating": False},
            {"swa_attention_sink_enabled": True},
            {"moe_apply_router_weight_on_input": True},
            {"swa_rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
            {"partial_rotary_factor": 0.5},
            {"sliding_window": 0},
            {"mlp_layer_types": None},
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
            {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
                                 "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}},
        ),
        released=((2048, 512),),
        refused_on_cpus="vLLM's CPU backend does not route by sigmoid scores without groups of experts",
    ),
    "exaone_moe": Small(
        {
            "intermediate_size": 96, "moe_intermediate_size": 48, "num_experts": 8, "num_experts_per_tok": 3,
            "num_shared_experts": 1, "head_dim": 32, "routed_scaling_factor": 1.5, "first_k_dense_replace": 1,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"], "sliding_window": 16,
        },
        written={"architectures": ["ExaoneMoEForCausalLM"]},
        refused=(
            {"layer_types": ["full_attention"] * 3},
            {"layer_types": None},
            {"sliding_window": 0},
            {"sliding_windows": [16, 32, 0]},
            {"swiglu_limits": [7.0, 7.0, 7.0]},
            {"attention_bias": True},
            {"bias": True},
            {"mlp_bias": True},
            {"logit_scale": 0.5},
            {"logit_scale": None},
        ),
        released=((6144, 2048),),
    ),
    "mimo_v2_flash": Small(
        {
            "intermediate_size": 96, "moe_intermediate_size": 48, "n_routed_experts": 8, "num_experts_per_tok": 3,
            "num_attention_heads": 4, "head_dim": 32, "v_head_dim": 32, "sliding_window": 16, "attention_bias": True,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
            "mlp_layer_types": ["dense", "sparse", "sparse"], "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 5e4, "partial_rotary_factor": 0.5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
            },
        },
        written={
            "hybrid_layer_pattern": [0, 1, 1], "moe_layer_freq": [0, 1, 1], "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 4, "swa_head_dim": 32, "swa_v_head_dim": 32, "sliding_window_size": 16,
            "layernorm_epsilon": 1e-5, "rope_theta": 5e4, "swa_rope_theta": 1e4, "partial_rotary_factor": 0.5,
            "add_swa_attention_sink_bias": True,
        },
        refused=(
            {"routed_scaling_factor": 2.5},
            {"tie_word_embeddings": True},
            {"add_swa_attention_sink_bias": False},
            {"add_full_attention_sink_bias": True},
            {"sliding_window": 0},
            {"hybrid_layer_pattern": [0, 1, 0]},
            {"moe_layer_freq": [1, 1, 1]},
            {"moe_layer_freq": 1},
            {"swa_num_key_value_heads": 2},
            {"swa_v_head_dim": None},
            {"sliding_window_size": 32},
            {"layernorm_epsilon": 1e-6},
            {"swa_rope_theta": 5e4},
            {"partial_rotary_factor": 0.25},
            {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 5e4}}},
        ),
        released=((4096, 2048),),
    ),
    "granitemoe": Small(
        {
            "intermediate_size": 48, "num_local_experts": 8, "num_experts_per_tok": 2, "embedding_multiplier": 2.0,
            "attention_multiplier": 0.2, "residual_multiplier": 0.5, "logits_scaling": 2.0, "num_hidden_layers": 2,
        },
        refused=(
            {"layer_types": ["full_attention", "full_attention"]},
            {"attention_multiplier": None},
            {"attention_bias": True},
            {"sliding_window": 16},
        ),
        released=((1024, 512), (1536, 512)),
    ),
    "granitemoehybrid": Small(
        {
            "intermediate_size": 48, "shared_intermediate_size": 80, "num_local_experts": 8, "num_experts_per_tok": 3,
            "embedding_multiplier": 2.0, "attention_multiplier": 0.2, "residual_multiplier": 0.5, "logits_scaling": 2.0,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"], "mamba_n_heads": 4,
            "mamba_d_head": 32, "mamba_d_state": 16, "mamba_chunk_size": 16,
        },
        refused=(
            {"mamba_n_groups": 2},
            {"time_step_limit": [0.0, 1.0]},
            {"attention_multiplier": None},
            {"time_step_limit": None},
            {"head_dim": 64},
            {"hidden_act": "gelu"},
        ),
        expert_parallel=True,
        released=((1536, 512), (4096, 768)),
    ),
    "nemotron_h": Small(
        {
            "layers_block_type": ["linear_attention", "moe", "full_attention", "moe", "mlp"], "intermediate_size": 96,
            "moe_intermediate_size": 48, "moe_shared_expert_intermediate_size": 80, "n_routed_experts": 8,
            "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "routed_scaling_factor": 1.5, "head_dim": 32,
            "mamba_num_heads": 4, "mamba_head_dim": 32, "ssm_state_size": 16, "n_groups": 2, "chunk_size": 16,
        },
        refused=(
            {"mlp_hidden_act": "silu"},
            {"mamba_hidden_act": "gelu"},
            {"mlp_bias": True},
            {"n_shared_experts": 2},
            {"n_shared_experts": None},
            {"sliding_window": 16},
            {"tie_word_embeddings": True},
            {"block_configs": [{"block_type": "moe", "n_routed_experts": 4}]},
            {"architectures": ["NemotronHPuzzleForCausalLM"]},
        ),
        expert_parallel=True,
        released=((2688, 1856),),
        ours_alone="is_act_and_mul=False is supported only for CUDA, XPU and ROCm for now",
    ),
}  # fmt: skip
"""By model_type: all that the tests have to be told of a family."""
