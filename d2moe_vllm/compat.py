"""Everything of vLLM's insides that moves between releases; no other file of ours touches them.

Supported: vLLM 0.32 and 0.33. tests/plugin/test_contract.py names each of these.
"""

from __future__ import annotations

import copy
from functools import wraps
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor
from vllm import envs
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.distributed.parallel_state import get_world_group
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.logger import init_logger as vllm_logger
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.models.utils import extract_layer_index
from vllm.model_executor.utils import set_weight_attrs
from vllm.platforms import current_platform

__all__ = [
    "FusedMoEConfig",
    "FusedMoEMethodBase",
    "LinearBase",
    "RoutedExperts",
    "Served",
    "UnquantizedLinearMethod",
    "activation_of",
    "additional_config",
    "ask_for_amx",
    "batch_invariant",
    "device_type",
    "extract_layer_index",
    "fails_on_cpu",
    "global_rank",
    "init_logger",
    "int_experts",
    "is_profile_run",
    "let_cpus_have_experts_without_a_gate",
    "load_format",
    "local_expert",
    "lora_on_experts",
    "model_class",
    "model_source",
    "on_cpu",
    "padding_mask",
    "prefix_caching",
    "routing_that_cpus_lack",
    "served",
    "set_weight_attrs",
    "shares_out_experts",
    "swiglu_of",
    "tokens_from_other_ranks",
]

BYPASSING_LOAD_FORMATS = ("ipc_cache", "modelexpress", "runai_streamer_sharded", "sharded_state", "tensorizer")
"""Load formats that write parameters without asking their weight_loader, so that nothing can be checked."""


def init_logger(name: str) -> Any:
    """A logger that writes into vLLM's log: one of another name would have no handler, and its lines be lost."""
    return vllm_logger(f"vllm.{name}")


def load_format() -> str:
    """`--load-format` of the model that is being built."""
    return str(get_current_vllm_config().load_config.load_format)


def additional_config() -> dict[str, Any]:
    """`--additional-config`, where it is a dict."""
    content = get_current_vllm_config().additional_config
    return content if isinstance(content, dict) else {}


def batch_invariant() -> bool:
    """Whether the user wants results that do not depend on what else is in a batch (VLLM_BATCH_INVARIANT=1)."""
    return bool(envs.VLLM_BATCH_INVARIANT)


def prefix_caching() -> bool:
    """Whether requests may reuse what others computed of a common prefix."""
    return bool(get_current_vllm_config().cache_config.enable_prefix_caching)


def device_type() -> str:
    """torch's name of the device vLLM runs on."""
    return current_platform.device_type


def on_cpu() -> bool:
    """Whether this is vLLM's CPU backend."""
    return current_platform.is_cpu()


def ask_for_amx() -> None:
    """The kernel's leave to use AMX, where a CPU has it: vLLM's attention in bfloat16 does, and of all that runs before
    only compiling asks. Without, a worker of `--enforce-eager` is killed at the first request (SIGILL)."""
    if on_cpu() and torch.cpu._is_amx_tile_supported() and not torch.cpu._init_amx():
        init_logger(__name__).warning_once(
            "d2moe: the operating system refuses AMX to this process; if it is killed at its first request (SIGILL), "
            "serve with --dtype float32"
        )


def fails_on_cpu() -> str | None:
    """The option of this start with which vLLM's CPU backend starts and then fails at the first request, if any."""
    parallel = get_current_vllm_config().parallel_config
    if not on_cpu():
        return None
    if parallel.data_parallel_size > 1:
        return "--data-parallel-size"
    return "--pipeline-parallel-size" if parallel.pipeline_parallel_size > 1 else None


def routing_that_cpus_lack(layer: Any) -> str | None:
    """What vLLM's CPU backend cannot do of a layer's choice of experts, or leaves out without a word (0.32,
    fused_moe/router/cpu_router.py): it knows groups, models' own functions, plain softmax, and sqrtsoftplus."""
    if not on_cpu() or layer.use_grouped_topk or layer.custom_routing_function is not None:
        return None
    if layer.scoring_func == "sqrtsoftplus":
        return None
    if layer.scoring_func != "softmax":
        return f"does not route by {layer.scoring_func} scores without groups of experts"
    return "leaves out the bias by which experts are chosen" if layer.e_score_correction_bias is not None else None


def transformers_code() -> bool:
    """Whether the model is to be built from transformers' code: `--model-impl transformers`."""
    chosen = getattr(get_current_vllm_config().model_config, "model_impl", "auto")
    return str(getattr(chosen, "value", chosen)) == "transformers"


def shares_out_experts() -> bool:
    """Whether ranks have different experts: `--enable-expert-parallel` with more than one rank."""
    parallel = get_current_vllm_config().parallel_config
    return bool(parallel.enable_expert_parallel) and parallel.tensor_parallel_size > 1


def lora_on_experts() -> bool:
    """Whether adapters may reach the experts: `--enable-lora` without `--lora-target-modules` wraps every layer."""
    lora = get_current_vllm_config().lora_config
    if lora is None:
        return False
    return not lora.target_modules or any("experts" in name.split(".") for name in lora.target_modules)


def model_class(module: str, name: str) -> Any:
    """A class of vLLM's models, by the name of its module among them."""
    return getattr(import_module(f"vllm.model_executor.models.{module}"), name)


def swiglu_of(moe: FusedMoEConfig) -> tuple[float, ...]:
    """Limit, alpha and beta of a layer's clamped SwiGLU (vLLM's activation.py); () where it has another activation."""
    activation, limit = moe.activation.value, moe.swiglu_limit
    if activation == "swigluoai":
        return (7.0, 1.702, 1.0)
    if limit is None or activation not in ("silu", "swigluoai_uninterleave"):
        return ()
    return float(limit), 1.0 if moe.swiglu_alpha is None else float(moe.swiglu_alpha), float(moe.swiglu_beta or 0.0)


_NO_GATE = "_no_mul"
"""How vLLM's names of activations end that are not multiplied with anything."""


def activation_of(moe: FusedMoEConfig) -> str:
    """vLLM's name of a layer's activation, be it of what gate gives or, without one, of what up gives."""
    return str(moe.activation.value).removesuffix(_NO_GATE)


def int_experts(moe: FusedMoEConfig, bits: int, group_size: int) -> Any:
    """vLLM's own method for experts whose matrices are codes of 4 or 8 bits, c for scale * (c - 2^(bits - 1)), with a
    scale for every group of inputs: that of compressed-tensors checkpoints, by Marlin's kernels unless --moe-backend
    names others. It takes parameters w13_weight_packed, int32 [E, out, in bits / 32], w13_weight_scale [E, out, groups]
    and w2's. Raises ValueError, in a few words, for a device, sizes or an activation that these kernels refuse."""
    from compressed_tensors.quantization import QuantizationArgs
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_wna16 import (  # noqa: E501
        CompressedTensorsWNA16MoEMethod,
    )

    own = copy.copy(moe)
    if own.moe_backend == "auto":
        own.moe_backend = "marlin"
    how = QuantizationArgs(num_bits=bits, type="int", symmetric=True, strategy="group", group_size=group_size)
    try:
        method = CompressedTensorsWNA16MoEMethod(how, None, own)
    except (NotImplementedError, ValueError) as error:
        raise ValueError(" ".join(str(error).split())) from None
    if method.is_monolithic:
        raise ValueError(f"vLLM's {own.moe_backend} experts choose experts themselves")
    return method


def let_cpus_have_experts_without_a_gate() -> None:
    """Takes back a refusal of vLLM's CPU backend, for this process's model: it has no kernel for such experts (0.32,
    fused_moe/config.py, the last that a layer's configuration looks at), and ours does."""
    made = FusedMoEConfig.__post_init__
    if not on_cpu() or hasattr(made, "d2moe"):
        return

    @wraps(made)
    def make(moe: FusedMoEConfig) -> None:
        try:
            made(moe)
        except NotImplementedError as error:
            if "is_act_and_mul=False" not in str(error):
                raise

    make.d2moe = True  # type: ignore[attr-defined]
    FusedMoEConfig.__post_init__ = make


def model_source() -> tuple[str, str | None, str | None, bool]:
    """(folder or Hub id, revision, download folder, weights lie elsewhere) of the model that is being built."""
    config = get_current_vllm_config()
    model = config.model_config
    elsewhere = bool(getattr(model, "model_weights", ""))
    return model.model, model.revision, config.load_config.download_dir, elsewhere


def local_expert(layer: Any, expert: int) -> int:
    """A global expert's index on this rank, -1 if it lives elsewhere."""
    return layer._map_global_expert_id_to_local_expert_id(expert)


def tokens_from_other_ranks(moe: FusedMoEConfig) -> bool:
    """Whether the layer's rows are gathered from several ranks, so that the padding mask does not match them."""
    return moe.dp_size > 1 or moe.pcp_size > 1 or moe.is_sequence_parallel


class Served(NamedTuple):
    """What a finished configuration says of the model and its ranks. model: folder or Hub id, as in model_source."""

    name: str
    model: str
    revision: str | None
    download_dir: str | None
    additional_config: dict[str, Any]
    tensor_parallel_size: int
    expert_parallel_size: int


def served(config: VllmConfig) -> Served:
    """For the front-end, where no model is being built."""
    model, parallel, additional = config.model_config, config.parallel_config, config.additional_config
    ranks = parallel.tensor_parallel_size * parallel.data_parallel_size * parallel.prefill_context_parallel_size
    return Served(
        str(model.served_model_name),
        model.model,
        model.revision,
        config.load_config.download_dir,
        additional if isinstance(additional, dict) else {},
        parallel.tensor_parallel_size,
        ranks if parallel.enable_expert_parallel else 1,
    )


def global_rank() -> int:
    """This worker's number among all that serve the model."""
    return get_world_group().rank


def is_profile_run() -> bool:
    """Whether this forward pass is vLLM's measurement of memory, or a warm-up: its rows are no requests'."""
    return is_forward_context_available() and get_forward_context().attn_metadata is None


def padding_mask(num_rows: int) -> Tensor | None:
    """bool [num_rows], True for padding rows of this forward pass; None where nothing is padding.

    A view of vLLM's persistent device tensor: what a captured CUDA graph reads is refreshed at each replay.
    """
    if not is_forward_context_available():
        return None
    mask = get_forward_context().is_padding
    if mask is None:
        return None
    if mask.shape[0] < num_rows:
        # Taking all rows for tokens would let padding choose columns, silently.
        raise RuntimeError(f"vLLM's padding mask has {mask.shape[0]} rows, the MoE layer {num_rows}; use scope 'token'")
    return mask[:num_rows]
