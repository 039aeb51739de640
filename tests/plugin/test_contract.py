"""Every piece of vLLM's insides that we rely on, by name: what breaks here breaks serving.

Run it first against a new vLLM release; then widen d2moe_vllm.SUPPORTED_VLLM.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import get_args

import pytest

pytest.importorskip("vllm")

from vllm import forward_context
from vllm.config import LoadConfig, LoRAConfig, ModelConfig, VllmConfig
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEParallelConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.model_loader import LoadFormats

from d2moe_vllm import compat
from d2moe_vllm.experts import D2MoEMethod
from d2moe_vllm.ops.reference import ACTIVATIONS
from d2moe_vllm.quantization import D2MoEConfig


def names(function: object) -> list[str]:
    return list(inspect.signature(function).parameters)  # type: ignore[arg-type]


def fields(cls: type) -> set[str]:
    return {field.name for field in dataclasses.fields(cls)}


@pytest.mark.parametrize("name", compat.__all__)
def test_compat_has_what_it_exports(name: str) -> None:
    assert hasattr(compat, name)


def test_quantization_config_hooks() -> None:
    assert names(register_quantization_config) == ["quantization"]
    for hook in ("maybe_update_config", "get_quant_method", "override_quantization_method", "from_config"):
        assert names(getattr(D2MoEConfig, hook)) == names(getattr(QuantizationConfig, hook)), hook
    assert not D2MoEConfig.__abstractmethods__


def test_fused_moe_method_hooks() -> None:
    for hook in ("create_weights", "maybe_roundup_sizes", "get_fused_moe_quant_config", "apply"):
        assert names(getattr(D2MoEMethod, hook)) == names(getattr(FusedMoEMethodBase, hook)), hook
    assert not D2MoEMethod.__abstractmethods__
    for attribute in ("supports_eplb", "is_monolithic", "mk_can_overlap_shared_experts", "supports_internal_mk"):
        assert isinstance(getattr(FusedMoEMethodBase, attribute), property), attribute


def test_routed_experts() -> None:
    parameters = names(RoutedExperts.__init__)
    for name in ("ckpt_gate_proj_name", "ckpt_up_proj_name", "ckpt_down_proj_name", "apply_router_weight_on_input"):
        assert name in parameters
    assert isinstance(RoutedExperts.expert_map, property)
    assert callable(RoutedExperts._map_global_expert_id_to_local_expert_id)


def test_checkpoint_names_map_to_our_parameters() -> None:
    """`experts.3.w1.delta_u` must reach the parameter w13_delta_u: vLLM drops what it cannot map in silence."""
    mapping = RoutedExperts.build_expert_params_mapping("w1", "w2", "w3", 8, routed_experts_prefix="")
    assert ("experts.w13_", "experts.3.w1.", 3, "w1") in mapping
    assert ("experts.w13_", "experts.3.w3.", 3, "w3") in mapping
    assert ("experts.w2_", "experts.3.w2.", 3, "w2") in mapping
    # The hand-written loaders of DeepSeek and others come through here.
    legacy = RoutedExperts.build_expert_params_mapping("gate_proj", "down_proj", "up_proj", 8)
    assert ("experts.routed_experts.w13_", "experts.3.gate_proj.", 3, "w1") in legacy


def test_moe_config() -> None:
    needed = {"num_experts", "hidden_dim", "intermediate_size", "activation", "has_bias", "moe_parallel_config"}
    assert needed | {"swiglu_limit", "swiglu_alpha", "swiglu_beta"} <= fields(FusedMoEConfig)
    for name in ("dp_size", "pcp_size", "is_sequence_parallel"):
        assert isinstance(getattr(FusedMoEConfig, name), property), name
    assert {"tp_size", "tp_rank", "ep_size", "use_ep"} <= fields(FusedMoEParallelConfig)


def test_activations() -> None:
    assert set(ACTIVATIONS) <= {activation.value for activation in MoEActivation}


def test_forward_context() -> None:
    """compat.padding_mask reads the attribute as it is: None says that nothing is padding."""
    assert "is_padding" in fields(forward_context.ForwardContext)
    assert "is_padding" in names(forward_context.set_forward_context)


def test_engine_configuration() -> None:
    assert "additional_config" in fields(VllmConfig)
    assert "lora_config" in fields(VllmConfig)
    assert "target_modules" in fields(LoRAConfig)
    assert {"load_format", "download_dir"} <= fields(LoadConfig)
    assert {"model", "revision", "model_weights"} <= fields(ModelConfig)
    assert set(compat.BYPASSING_LOAD_FORMATS) <= set(get_args(LoadFormats))
    assert "dummy" in get_args(LoadFormats)
