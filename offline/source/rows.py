"""Where the experts live in each model family: data, not code paths. A new family is one row."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from d2moe_vllm.format.kinds import Role
from offline.source.agreement import (
    ALIKE,
    alike,
    dense_first,
    gate_of_one,
    groups,
    head_size,
    latent_attention,
    latent_norms,
    no_window,
    one_window,
    rope,
    said,
)
from offline.source.family import SILU, Family, Layout

W: Mapping[Role, str] = MappingProxyType({"gate": "w1", "up": "w3", "down": "w2"})
PROJ: Mapping[Role, str] = MappingProxyType({"gate": "gate_proj", "up": "up_proj", "down": "down_proj"})
NO_BIAS: Mapping[str, tuple[Any, ...]] = MappingProxyType({"attention_bias": (False, None)})
"""Where vLLM's attention has none, or not all of transformers', and leaves those on disk out."""
UNTIED: Mapping[str, tuple[Any, ...]] = MappingProxyType({"tie_word_embeddings": (False, None)})
"""Where vLLM's head is always a tensor of its own."""
NO_WINDOW: Mapping[str, tuple[Any, ...]] = MappingProxyType({"sliding_window": (None, 0)})
"""Where vLLM takes a window that transformers does not know."""
QWEN = Family(
    model_type="qwen2_moe",
    experts="model.layers.{layer}.mlp.experts",
    projections=PROJ,
    attention="heads",
    dense_keys=("decoder_sparse_step", "mlp_only_layers"),
    # vLLM attends to all, and has biases of q, k and v, whatever config.json says.
    requires={
        **SILU,
        "architectures": (["Qwen2MoeForCausalLM"], None),
        "use_sliding_window": (False, None),
        "qkv_bias": (True, None),
        "dual_chunk_attention_config": (None,),
    },
    checks=(rope(*ALIKE), no_window, head_size),
)
DEEPSEEK_V3 = Family(
    model_type="deepseek_v3",
    experts="model.layers.{layer}.mlp.experts",
    projections=PROJ,
    attention="latent",
    num_experts_keys=("n_routed_experts",),
    dense_keys=("first_k_dense_replace",),
    # vLLM takes a missing scoring_func for softmax; transformers always computes sigmoid and bias.
    requires={
        **SILU,
        **NO_BIAS,
        **UNTIED,
        "architectures": (["DeepseekV3ForCausalLM"], None),
        "scoring_func": ("sigmoid",),
        "topk_method": ("noaux_tc",),
        "moe_layer_freq": (1, None),
        "rope_interleave": (True, None),
        "llama_4_scaling": (None,),
    },
    not_null=("moe_layer_freq", "rope_interleave"),
    absent=("index_topk",),
    checks=(rope("default", "yarn"), latent_attention),
    remark=latent_norms,
)
ROWS = (
    Family(
        model_type="mixtral",
        experts="model.layers.{layer}.block_sparse_moe.experts",
        projections=W,
        attention="heads",
        window_keys=("sliding_window",),
        intermediate_size_key="intermediate_size",
        requires={**SILU, "architectures": (["MixtralForCausalLM"], None)},
        checks=(rope(*ALIKE), one_window),
        renames={".block_sparse_moe.": ".mlp."},
    ),
    Family(
        model_type="phimoe",
        experts="model.layers.{layer}.block_sparse_moe.experts",
        projections=W,
        attention="heads",
        window_keys=("sliding_window",),
        intermediate_size_key="intermediate_size",
        # vLLM routes to two experts with this jitter and wants a bias of the head (which it then leaves out),
        # whatever config.json says; it does not know transformers' own spelling of the class.
        requires={
            **SILU,
            **UNTIED,
            "attention_bias": (True,),
            "architectures": (["PhiMoEForCausalLM"],),
            "num_experts_per_tok": (2,),
            "router_jitter_noise": (0.01,),
            "lm_head_bias": (True,),
        },
        checks=(rope("default", "longrope"), one_window),
        renames={".block_sparse_moe.": ".mlp.", ".gate.weight": ".router.weight"},
    ),
    QWEN,
    Family(
        model_type="qwen3_moe",
        experts=QWEN.experts,
        projections=PROJ,
        attention="heads",
        window_keys=("sliding_window", "use_sliding_window"),
        dense_keys=QWEN.dense_keys,
        # Of biases vLLM has those of q, k and v, transformers that of o too; a shared expert only vLLM knows.
        requires={
            **SILU,
            **NO_BIAS,
            "architectures": (["Qwen3MoeForCausalLM"], None),
            "shared_expert_intermediate_size": (0, None),
            "dual_chunk_attention_config": (None,),
        },
        checks=(rope(*ALIKE), one_window),
    ),
    Family(
        model_type="olmoe",
        experts="model.layers.{layer}.mlp.experts",
        projections=PROJ,
        attention="heads",
        intermediate_size_key="intermediate_size",
        requires={
            **SILU,
            **NO_BIAS,
            **UNTIED,
            **NO_WINDOW,
            "architectures": (["OlmoeForCausalLM"], None),
            "norm_topk_prob": (False, None),
            "clip_qkv": (None,),
            "rms_norm_eps": (1e-5, None),  # vLLM has this number in its code
        },
    ),
    Family(
        model_type="deepseek",
        experts="model.layers.{layer}.mlp.experts",
        projections=PROJ,
        attention="heads",
        num_experts_keys=("n_routed_experts",),
        dense_keys=("first_k_dense_replace", "moe_layer_freq"),
        # What vLLM takes from the later versions of this family, transformers' code of this one does not know.
        requires={
            **SILU,
            **NO_BIAS,
            **UNTIED,
            **NO_WINDOW,
            "architectures": (["DeepseekForCausalLM"], None),
            "mlp_bias": (False, None),
            "scoring_func": ("softmax", None),
            "routed_scaling_factor": (1.0, None),
            "n_group": (1, None),
            "topk_group": (1, None),
            "topk_method": ("greedy", None),
            "rswa_window": (None,),
        },
        not_null=("scoring_func", "moe_layer_freq"),
        checks=(rope(*ALIKE), head_size, gate_of_one),
    ),
    Family(
        model_type="deepseek_v2",
        experts="model.layers.{layer}.mlp.experts",
        projections=PROJ,
        attention="latent",
        num_experts_keys=("n_routed_experts",),
        dense_keys=("first_k_dense_replace",),
        # transformers never renormalizes this family's gates.
        requires={
            **SILU,
            "scoring_func": ("softmax", None),
            "topk_method": ("greedy", "group_limited_greedy", None),
            "norm_topk_prob": (False, None),
            "moe_layer_freq": (1, None),
            **NO_BIAS,
            **UNTIED,
            "architectures": (["DeepseekV2ForCausalLM"], None),
            "mlp_bias": (False, None),
            "llama_4_scaling": (None,),
        },
        not_null=("scoring_func", "moe_layer_freq"),
        absent=("index_topk",),
        checks=(rope("default", "yarn"), latent_attention, groups),
        remark=latent_norms,
    ),
    DEEPSEEK_V3,
    Family(
        model_type="kimi_k2",
        experts=DEEPSEEK_V3.experts,
        projections=PROJ,
        attention=DEEPSEEK_V3.attention,
        num_experts_keys=DEEPSEEK_V3.num_experts_keys,
        dense_keys=DEEPSEEK_V3.dense_keys,
        requires=DEEPSEEK_V3.requires,
        not_null=DEEPSEEK_V3.not_null,
        absent=DEEPSEEK_V3.absent,
        checks=DEEPSEEK_V3.checks,
        remark=DEEPSEEK_V3.remark,
        stock="deepseek_v3",
    ),
    Family(
        model_type="glm4_moe",
        experts="model.layers.{layer}.mlp.experts",
        projections=PROJ,
        attention="heads",
        num_experts_keys=("n_routed_experts",),
        dense_keys=("first_k_dense_replace",),
        requires={**SILU, **UNTIED, "architectures": (["Glm4MoeForCausalLM"], None)},
        checks=(rope("default", partial=True), said("head_dim")),
        recipe="deepseek_v3",
    ),
    Family(
        model_type="minimax_m2",
        experts="model.layers.{layer}.block_sparse_moe.experts",
        projections=W,
        attention="heads",
        intermediate_size_key="intermediate_size",
        # transformers always computes sigmoid, with a bias that only chooses experts.
        requires={
            **SILU,
            **NO_BIAS,
            **UNTIED,
            "architectures": (["MiniMaxM2ForCausalLM"], None),
            "scoring_func": ("sigmoid",),
            "use_routing_bias": (True,),
        },
        checks=(rope("default", partial=True), said("rotary_dim", "head_dim")),
        renames={".block_sparse_moe.": ".mlp."},
        recipe="deepseek_v3",
    ),
    Family(
        model_type="ernie4_5_moe",
        experts="model.layers.{layer}.mlp.experts",
        projections=PROJ,
        attention="heads",
        num_experts_keys=("moe_num_experts",),
        experts_per_token_key="moe_k",
        dense_keys=("moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval"),
        # Of biases vLLM leaves out that of o; it has no least sum of gates.
        requires={
            **SILU,
            "architectures": (["Ernie4_5_MoeForCausalLM"], None),
            "use_bias": (False, None),
            "use_moe": (True, None),
            "moe_norm_min": (1e-12, None),
        },
        renames={".mlp.moe_statics.": ".mlp.gate.moe_statics."},
        recipe="deepseek_v3",
    ),
    Family(
        model_type="glm4_moe_lite",
        experts="model.layers.{layer}.mlp.experts",
        projections=PROJ,
        attention="latent",
        num_experts_keys=("n_routed_experts",),
        dense_keys=("first_k_dense_replace", "mlp_layer_types"),
        requires={
            **SILU,
            **NO_BIAS,
            **UNTIED,
            "architectures": (["Glm4MoeLiteForCausalLM"], None),
            "moe_layer_freq": (1, None),
            "rope_interleave": (True, None),
        },
        not_null=("moe_layer_freq", "rope_interleave"),
        absent=("index_topk",),
        checks=(rope("default", "yarn"), latent_attention, dense_first),
        remark=latent_norms,
        recipe="deepseek_v3",
    ),
    Family(
        model_type="hy_v3",
        experts="model.layers.{layer}.mlp.experts",
        projections=PROJ,
        attention="heads",
        dense_keys=("first_k_dense_replace", "mlp_layer_types"),
        # transformers always normalizes gates, queries and keys.
        requires={
            **SILU,
            **NO_BIAS,
            "architectures": (["HYV3ForCausalLM"], None),
            "mlp_bias": (False, None),
            "route_norm": (True,),
            "qk_norm": (True,),
        },
        checks=(rope(*ALIKE), said("head_dim"), dense_first, alike("expert_hidden_dim", "moe_intermediate_size")),
        renames={
            ".mlp.router.gate.": ".mlp.gate.",
            ".mlp.expert_bias": ".mlp.e_score_correction_bias",
            ".mlp.shared_mlp.": ".mlp.shared_experts.",
        },
        recipe="deepseek_v3",
    ),
    Family(
        model_type="granitemoe",
        experts="model.layers.{layer}.block_sparse_moe.experts",
        projections=PROJ,
        attention="heads",
        experts_module="block_sparse_moe.experts",
        intermediate_size_key="intermediate_size",
        # vLLM takes windows and sinks by layer from settings that transformers does not know here.
        requires={
            **SILU,
            **NO_BIAS,
            **NO_WINDOW,
            "architectures": (["GraniteMoeForCausalLM"], None),
            "layer_types": (None,),
            "attention_sinks": (False, None),
            "layer_rope_theta": (None,),
        },
        not_null=("attention_multiplier",),
        checks=(rope(*ALIKE), head_size),
        renames={".router.layer.weight": ".router.weight"},
        released=Layout(
            gate="model.layers.{layer}.block_sparse_moe.input_linear.weight",
            up="model.layers.{layer}.block_sparse_moe.input_linear.weight",
            down="model.layers.{layer}.block_sparse_moe.output_linear.weight",
        ),
    ),
)
