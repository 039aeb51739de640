"""What we rely on of vLLM, as data; read by test_contract.py. New use of vLLM's insides: add a line here.

A name is `module.Name` as our code imports it, wherever vLLM defines it.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Use:
    """One function, class or constant of vLLM, and what of it has to stay as it is.

    parameters: the function takes (or the class's __init__) at least these, by name.
    attributes: instances have these: fields, attributes set in __init__, methods, properties.
    properties: these are properties, which a subclass of ours overrides or inherits as such.
    methods: their parameters, exactly and in order, because we override them or pass them by position.
    values: members of an enum (by value) or Literal, keys of a dict, or the text of a constant, at least these.
    behaves: functions or methods whose code we rely on; it has to be that of the vLLM the tests run with.
    """

    name: str
    parameters: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()
    properties: tuple[str, ...] = ()
    methods: dict[str, tuple[str, ...]] = field(default_factory=dict)
    values: tuple[str, ...] = ()
    behaves: tuple[str, ...] = ()


ALLOWED_IMPORTS = {
    "__init__.py": (
        "vllm",  # its version
        "vllm.model_executor.layers.quantization",  # registration, before anything else of ours is imported
        "vllm.model_executor.layers.quantization.base_config",  # the stand-in that refuses
    ),
    # Registered for every model that is served: it must not import compat.py, which imports the MoE layers.
    "serving/quantization.py": ("vllm.model_executor.layers.quantization.base_config",),
    # The endpoint tells vLLM's version, and names the engine's class for type checkers.
    "observability/info.py": ("vllm",),
    "observability/endpoint.py": ("vllm.engine.protocol",),
}
"""What files other than compat.py import of vLLM, and why."""

LAYERS = "vllm.model_executor.layers"

CONTRACT = (
    # How vLLM finds us.
    Use("vllm.__version__"),
    Use("vllm.plugins.DEFAULT_PLUGINS_GROUP", values=("vllm.general_plugins",)),
    Use("vllm.plugins.load_general_plugins", behaves=("",)),
    Use(f"{LAYERS}.quantization.register_quantization_config", parameters=("quantization",), behaves=("",)),
    Use(
        f"{LAYERS}.quantization.base_config.QuantizationConfig",
        methods={
            "get_name": ("self",),
            "get_supported_act_dtypes": ("self",),
            "get_min_capability": ("cls",),
            "get_config_filenames": (),
            "from_config": ("cls", "config"),
            "override_quantization_method": ("cls", "hf_quant_cfg", "user_quant", "hf_config"),
            "maybe_update_config": ("self", "model_name", "hf_config", "revision"),
            "get_quant_method": ("self", "layer", "prefix"),
        },
        attributes=("online_quantization_config",),
        behaves=("__init__",),
    ),
    # Who rounds what was loaded once more, which our experts refuse.
    Use(f"{LAYERS}.quantization.base_config.resolve_quant_method", parameters=("quant_config", "layer", "prefix")),
    Use(
        f"{LAYERS}.quantization.online.base.OnlineQuantizationConfig",
        methods={"resolve_quant_method_cls": ("self", "layer_cls", "prefix")},
    ),
    Use(
        f"{LAYERS}.quantization.base_config.QuantizeMethodBase",
        methods={"process_weights_after_loading": ("self", "layer")},
    ),
    # Who asks us, when: the order of these calls decides where a bad checkpoint is refused.
    Use("vllm.config.VllmConfig", behaves=("_get_quantization_config",)),
    Use(
        "vllm.model_executor.model_loader.weight_utils.get_quant_config",
        parameters=("model_config", "load_config"),
        behaves=("",),
    ),
    # The fused-MoE method.
    Use(
        f"{LAYERS}.fused_moe.fused_moe_method_base.FusedMoEMethodBase",
        parameters=("moe",),
        attributes=("moe", "moe_kernel", "moe_quant_config"),
        properties=("supports_eplb", "is_monolithic", "mk_can_overlap_shared_experts", "supports_internal_mk"),
        methods={
            "__init__": ("self", "moe"),
            "create_weights": (
                "self",
                "layer",
                "num_experts",
                "hidden_size",
                "intermediate_size_per_partition",
                "params_dtype",
                "extra_weight_attrs",
            ),
            "maybe_roundup_sizes": (
                "self",
                "hidden_size",
                "intermediate_size_per_partition",
                "act_dtype",
                "moe_parallel_config",
            ),
            "get_fused_moe_quant_config": ("self", "layer"),
            "apply": (
                "self",
                "layer",
                "x",
                "topk_weights",
                "topk_ids",
                "shared_experts",
                "shared_experts_input",
            ),
        },
        behaves=("is_monolithic", "supports_eplb", "supports_internal_mk", "topk_indices_dtype"),
    ),
    # What it leaves out of routing, which we refuse.
    Use(f"{LAYERS}.fused_moe.router.cpu_router.CPURouter", behaves=("_compute_routing",)),
    Use(
        f"{LAYERS}.fused_moe.RoutedExperts",
        parameters=(
            "ckpt_gate_proj_name",
            "ckpt_up_proj_name",
            "ckpt_down_proj_name",
            "apply_router_weight_on_input",
        ),
        attributes=(
            "moe_config",
            "ckpt_gate_proj_name",
            "ckpt_up_proj_name",
            "ckpt_down_proj_name",
            "apply_router_weight_on_input",
            "use_grouped_topk",
            "custom_routing_function",
            "scoring_func",
            "e_score_correction_bias",
        ),
        properties=("expert_map",),
        methods={"_map_global_expert_id_to_local_expert_id": ("self", "expert_id")},
        behaves=(
            "expert_map",
            "_map_global_expert_id_to_local_expert_id",
            # Which names of a checkpoint reach our parameters; what maps to nothing is dropped in silence.
            "build_expert_params_mapping",
        ),
    ),
    Use(
        f"{LAYERS}.fused_moe.config.FusedMoEConfig",
        attributes=(
            "num_experts",
            "hidden_dim",
            "intermediate_size",
            "activation",
            "experts_per_token",
            "has_bias",
            "moe_parallel_config",
            "swiglu_limit",
            "swiglu_alpha",
            "swiglu_beta",
            "in_dtype",
            "moe_backend",
        ),
        properties=("dp_size", "pcp_size", "is_sequence_parallel", "tp_size", "ep_size"),
        behaves=("dp_size", "pcp_size", "is_sequence_parallel", "tp_size", "ep_size"),
    ),
    # Who serves layers that are plainly of 8 or 4 bits, under which names.
    Use(
        f"{LAYERS}.quantization.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_wna16"
        ".CompressedTensorsWNA16MoEMethod",
        parameters=("weight_quant", "input_quant", "moe"),
        attributes=("moe_kernel", "moe_quant_config"),
        properties=("is_monolithic",),
        methods={
            "process_weights_after_loading": ("self", "layer"),
            "apply": (
                "self",
                "layer",
                "x",
                "topk_weights",
                "topk_ids",
                "shared_experts",
                "shared_experts_input",
            ),
        },
        behaves=("get_weight_shape", "apply"),
    ),
    Use(
        f"{LAYERS}.fused_moe.config.FusedMoEParallelConfig",
        attributes=("tp_size", "tp_rank", "ep_size", "use_ep"),
    ),
    Use(
        f"{LAYERS}.fused_moe.activation.MoEActivation",
        values=(
            "silu",
            "gelu",
            "gelu_tanh",
            "relu2",
            "swigluoai",
            "silu_no_mul",
            "gelu_no_mul",
            "gelu_tanh_no_mul",
            "relu2_no_mul",
        ),
    ),
    # Its loader drops names of experts that it does not know: we take ours before it.
    Use("vllm.model_executor.models.gpt_oss.GptOssForCausalLM", methods={"load_weights": ("self", "weights")}),
    Use("vllm.model_executor.models.gpt_oss.MLPBlock", behaves=("__init__",)),
    Use(f"{LAYERS}.linear.LinearBase"),
    Use(f"{LAYERS}.linear.UnquantizedLinearMethod", methods={"__init__": ("self",)}),
    Use("vllm.model_executor.models.utils.extract_layer_index", parameters=("layer_name",), behaves=("",)),
    Use("vllm.model_executor.utils.set_weight_attrs", parameters=("weight", "weight_attrs"), behaves=("",)),
    # The engine's configuration.
    Use("vllm.config.get_current_vllm_config", behaves=("",)),
    Use(
        "vllm.config.VllmConfig",
        attributes=(
            "additional_config",
            "cache_config",
            "load_config",
            "lora_config",
            "model_config",
            "parallel_config",
            "quant_config",
        ),
    ),
    Use("vllm.config.CacheConfig", attributes=("enable_prefix_caching",)),
    Use("vllm.config.LoRAConfig", attributes=("target_modules",)),
    Use("vllm.config.LoadConfig", attributes=("load_format", "download_dir")),
    Use(
        "vllm.config.ModelConfig", attributes=("model", "model_impl", "revision", "model_weights", "served_model_name")
    ),
    Use(
        "vllm.config.ParallelConfig",
        attributes=(
            "data_parallel_size",
            "pipeline_parallel_size",
            "enable_expert_parallel",
            "prefill_context_parallel_size",
            "tensor_parallel_size",
        ),
    ),
    Use("vllm.platforms.current_platform"),
    Use("vllm.platforms.interface.Platform", methods={"is_cpu": ("self",)}, attributes=("device_type",)),
    Use(
        "vllm.model_executor.model_loader.LoadFormats",
        values=("dummy", "ipc_cache", "modelexpress", "runai_streamer_sharded", "sharded_state", "tensorizer"),
    ),
    # The running forward pass: None says that nothing is padding.
    Use("vllm.forward_context.is_forward_context_available", behaves=("",)),
    Use("vllm.forward_context.get_forward_context", behaves=("",)),
    Use("vllm.forward_context.ForwardContext", attributes=("attn_metadata", "is_padding")),
    Use("vllm.forward_context.set_forward_context", parameters=("is_padding",)),
    # Logging.
    Use("vllm.logger.init_logger", parameters=("name",)),
    Use(
        "vllm.logger._VllmLogger",
        methods=dict.fromkeys(("info_once", "warning_once"), ("self", "msg", "args", "scope")),
    ),
    Use("vllm.envs.environment_variables", values=("VLLM_BATCH_INVARIANT", "VLLM_CPU_KVCACHE_SPACE", "VLLM_PLUGINS")),
    # Metrics and the endpoint plugin.
    Use("vllm.distributed.parallel_state.get_world_group", behaves=("",)),
    Use("vllm.distributed.parallel_state.GroupCoordinator", attributes=("rank",)),
    Use("vllm.plugins.ENDPOINT_PLUGINS_GROUP", values=("vllm.endpoint_plugins",)),
    Use("vllm.plugins.load_endpoint_plugins", behaves=("",)),
    Use(
        "vllm.plugins.endpoint_plugins.interface.EndpointPlugin",
        attributes=("name", "required_tasks"),
        methods={"attach_router": ("self", "app"), "init_state": ("self", "engine_client", "state", "args")},
    ),
    Use("vllm.engine.protocol.EngineClient", attributes=("vllm_config",)),
    # Which of prometheus_client's registries /metrics shows.
    Use("vllm.v1.metrics.prometheus.get_prometheus_registry", behaves=("",)),
    # What the documentation tells people to type.
    Use(
        "vllm.engine.arg_utils.EngineArgs",
        attributes=(
            "additional_config",
            "trust_remote_code",
            "dtype",
            "load_format",
            "tensor_parallel_size",
            "enable_expert_parallel",
            "enforce_eager",
            "lora_target_modules",
        ),
    ),
)
