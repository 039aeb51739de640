"""The fused-MoE method of d2moe layers: parameters, loading, and the call of the backend's operator."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from d2moe_vllm import ops
from d2moe_vllm.compat import (
    BYPASSING_LOAD_FORMATS,
    FusedMoEConfig,
    FusedMoEMethodBase,
    RoutedExperts,
    activation_of,
    batch_invariant,
    init_logger,
    load_format,
    local_expert,
    lora_on_experts,
    on_cpu,
    padding_mask,
    routing_that_cpus_lack,
    set_weight_attrs,
    swiglu_of,
    tokens_from_other_ranks,
)
from d2moe_vllm.format.config import CheckpointConfig, CheckpointError, Scope
from d2moe_vllm.format.kinds import BASE_NAMES, ROLES
from d2moe_vllm.observability import recorder
from d2moe_vllm.observability.metrics import columns_used_ratio
from d2moe_vllm.ops import selfcheck
from d2moe_vllm.ops.reference import ACTIVATIONS
from d2moe_vllm.serving.loading import LayerLoader

logger = init_logger(__name__)


class D2MoEMethod(FusedMoEMethodBase):
    """Serves one layer's routed experts from a shared base and per-expert deltas (METHODS 1.6).

    Raises CheckpointError or ValueError, in one line, for what this layer needs and we do not do.
    """

    def __init__(self, moe: FusedMoEConfig, config: CheckpointConfig, layer: int, scope: Scope, backend: str) -> None:
        super().__init__(moe)
        self.config, self.layer, self.scope, self.backend = config, layer, scope, backend
        self.load_format = load_format()
        _refuse_unsupported(moe, config, layer, scope, self.load_format)

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Registers the layer's parameters (ops.PARAMETERS), each with our own weight_loader."""
        if layer.apply_router_weight_on_input and self.moe.experts_per_token != 1:
            raise ValueError(
                "d2moe applies router weights to the experts' input only where one expert is chosen per token, "
                f"not {self.moe.experts_per_token}"
            )
        if lack := routing_that_cpus_lack(layer):
            raise ValueError(f"vLLM's CPU backend {lack}, whatever the model; serve it on another device")
        names = (layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name, layer.ckpt_down_proj_name)
        own = tuple(self.config.projections[role] for role in self.config.roles)
        # Of experts without a gate vLLM calls up so.
        if names != (own if len(own) == len(ROLES) else (own[0], None, own[1])):
            raise CheckpointError(
                f"config.json calls {', '.join(self.config.roles)} {', '.join(own)}, this architecture "
                f"{', '.join(name for name in names if name)}; restore the original config.json"
            )
        parallel = self.moe.moe_parallel_config
        self.loader = LayerLoader(
            self.config,
            self.layer,
            num_local_experts=num_experts,
            local_expert=lambda expert: local_expert(layer, expert),
            tp_rank=parallel.tp_rank,
            tp_size=parallel.tp_size,
        )
        self.dtype = params_dtype
        delta_bytes = 0
        for name, tensor in self.loader.empty_parameters(params_dtype).items():
            parameter = nn.Parameter(tensor, requires_grad=False)
            layer.register_parameter(name, parameter)
            kind = name.split("_", 1)[1]
            set_weight_attrs(parameter, {"weight_loader": self.loader.weight_loader(kind)})
            delta_bytes += 0 if kind in BASE_NAMES else tensor.nbytes
        distributed = parallel.use_ep and parallel.ep_size > 1
        if distributed and self.scope != "off":
            logger.info_once("d2moe: no dynamic column selection on down projections under expert parallelism")
        self.spec = self.loader.spec(
            self.scope,
            activation="silu" if self.config.swiglu else activation_of(self.moe),
            prune_down=not distributed,
            # Scope "token" promises that a request's output never depends on its neighbours: to the last bit.
            batch_invariant=self.scope == "token" or batch_invariant(),
            # Wherever a graph may be captured.
            static_shapes=not on_cpu(),
        )
        recorded = recorder.add_layer(
            self.config,
            self.layer,
            # Tensor-parallel ranks all see the same tokens.
            experts=self.loader.experts if parallel.tp_rank == 0 else (),
            delta_bytes=delta_bytes,
            used=columns_used_ratio(self.config, self.layer, self.scope, prune_down=not distributed),
            masked=not tokens_from_other_ranks(self.moe),
        )
        # The operator's constants. A text, and not a number that a table of this process gives a meaning: vLLM keeps
        # compiled graphs with their constants on disk, and another process would fill its table in another order.
        self.constants: dict[str, Any] = {"backend": self.backend, "spec": ops.encoded(self.spec), "layer": recorded}

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Refuses a layer that is not complete: vLLM itself drops unknown names and misses none."""
        missing = self.loader.missing() if self.load_format != "dummy" else []
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise CheckpointError(
                f"layer {self.layer}: {len(missing)} tensors were not loaded: {', '.join(missing[:3])}{more}; "
                "copy the checkpoint again"
            )
        sizes = {"hidden_size": self.config.hidden_size, "top_k": self.moe.experts_per_token}
        theirs = self._in_place_of_backend(layer)
        known: tuple[Any, ...] = (lambda: _parameters(layer), self.backend, self.spec)
        with (
            selfcheck.against_reference(*known, **sizes, dtype=self.dtype, theirs=theirs),
            selfcheck.how_far_off(*known, **sizes, dtype=self.dtype, say=self._say_how_far_off),
        ):
            self._pack(layer)

    def _say_how_far_off(self, error: float) -> None:
        logger.info(
            "d2moe: backend %r changes what layer %d gives for a random token by %.1f %% (root mean square)",
            self.backend,
            self.layer,
            100 * error,
        )

    def _in_place_of_backend(self, layer: nn.Module) -> selfcheck.Theirs | None:
        """What computes the layer once it is packed, given x, gates and local ids, where that is no backend of ours."""
        return None

    def _pack(self, layer: nn.Module) -> None:
        if (pack := ops.BACKENDS[self.backend].pack) is not None:
            packed = ops.flat(*pack(*ops.halves(_parameters(layer)), self.spec))
            for name, tensor in zip(ops.PARAMETERS, packed, strict=True):
                if tensor is not None and tensor is not getattr(layer, name):
                    setattr(layer, name, nn.Parameter(tensor, requires_grad=False))

    def get_fused_moe_quant_config(self, layer: nn.Module) -> None:
        return None

    def maybe_roundup_sizes(
        self, hidden_size: int, intermediate_size_per_partition: int, act_dtype: torch.dtype, moe_parallel_config: Any
    ) -> tuple[int, int]:
        """Unchanged: factors have the model's own sizes, and nothing of ours needs padding."""
        return hidden_size, intermediate_size_per_partition

    def apply(
        self,
        layer: RoutedExperts,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any = None,
        shared_experts_input: Tensor | None = None,
    ) -> Tensor:
        """x [T, H], topk_weights [T, K], topk_ids [T, K]: [T, H]. Shared experts are the runner's business."""
        if layer.apply_router_weight_on_input:
            x, topk_weights = x * topk_weights.to(x.dtype), torch.ones_like(topk_weights)
        topk_ids = self.local_ids(layer, topk_ids)
        return torch.ops.d2moe.fused_experts(x, topk_weights, topk_ids, *_parameters(layer), **self.constants)

    @staticmethod
    def local_ids(layer: RoutedExperts, topk_ids: Tensor) -> Tensor:
        """Experts by this rank's numbers, -1 for those that are elsewhere."""
        if (expert_map := layer.expert_map) is None:
            return topk_ids
        return torch.where(topk_ids >= 0, expert_map[topk_ids.clamp(min=0).long()], -1)


def _parameters(layer: nn.Module) -> list[Tensor | None]:
    return [getattr(layer, name, None) for name in ops.PARAMETERS]


def _refuse_unsupported(
    moe: FusedMoEConfig, config: CheckpointConfig, layer: int, scope: Scope, load_format: str
) -> None:
    if load_format in BYPASSING_LOAD_FORMATS:
        raise ValueError(f"--load-format {load_format} does not work with d2moe checkpoints; leave it out")
    if moe.moe_parallel_config.enable_eplb:
        raise ValueError("d2moe does not move experts from rank to rank; leave --enable-eplb out")
    if lora_on_experts():
        raise ValueError(
            "d2moe experts take no LoRA; name other layers: --lora-target-modules q_proj k_proj v_proj o_proj"
        )
    sizes = (config.num_experts, config.hidden_size, config.intermediate_size)
    model_sizes = (moe.num_experts, moe.hidden_dim, moe.intermediate_size)
    if sizes != model_sizes:
        raise CheckpointError(
            f"layer {layer}: experts, hidden and intermediate size are {model_sizes} in the model and {sizes} in "
            "quantization_config; restore the original config.json"
        )
    if any(config.layers[layer][role].bias != moe.has_bias for role in config.roles):
        raise CheckpointError(
            f"layer {layer}: experts have {'' if moe.has_bias else 'no '}biases in the model, and "
            f"{'not all of them' if moe.has_bias else 'some'} in quantization_config; restore the original config.json"
        )
    swiglu = config.gating
    if swiglu != (found := swiglu_of(moe)):
        raise CheckpointError(
            f"limit, alpha and beta of the experts' clamped SwiGLU are {found or 'none'} in the model and "
            f"{swiglu or 'none'} in quantization_config; restore the original config.json"
        )
    clamped = any(getattr(moe, name, None) is not None for name in ("swiglu_limit", "swiglu_alpha", "swiglu_beta"))
    if not swiglu and (activation_of(moe) not in ACTIVATIONS or clamped):
        raise ValueError(
            f"d2moe does not support the experts' activation {moe.activation.value!r}{' with clamping' * clamped}; "
            f"supported: {', '.join(ACTIVATIONS)}"
        )
    if scope == "batch" and tokens_from_other_ranks(moe):
        raise ValueError(
            "scope 'batch' does not work where ranks exchange tokens (data, context or sequence parallelism), "
            """because padding is not known there; use --additional-config '{"d2moe": {"scope": "token"}}'"""
        )


def _fused_experts(
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *parameters: Tensor | None,
    backend: str,
    spec: str,
    layer: int,
) -> Tensor:
    started = time.perf_counter()
    known = ops.decoded(spec)
    # Read here and not passed in: a traced graph would take it for a constant. Only a selection that the
    # batch shares can be influenced by padding rows.
    mask = padding_mask(x.shape[0]) if known.scope == "batch" else None
    output = ops.fused_experts(backend, x, topk_weights, topk_ids, *ops.halves(parameters), mask, known)
    recorder.record(layer, topk_ids, time.perf_counter() - started)
    return output


def _fused_experts_fake(x: Tensor, *args: Any, **constants: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _register_operator() -> torch.library.Library:
    """Defines torch.ops.d2moe.fused_experts: opaque to compilation, which on CPU traces through apply."""
    inputs = "Tensor x, Tensor topk_weights, Tensor topk_ids"
    parameters = ", ".join(f"Tensor? {name}" for name in ops.PARAMETERS)
    library = torch.library.Library("d2moe", "FRAGMENT")
    library.define(f"fused_experts({inputs}, {parameters}, *, str backend, str spec, int layer) -> Tensor")
    library.impl("fused_experts", _fused_experts, "CompositeExplicitAutograd")
    torch.library.register_fake("d2moe::fused_experts", _fused_experts_fake, lib=library)
    return library


_LIBRARY = _register_operator()
"""Kept alive: operators are unregistered with their library."""
