"""Layers that turn out to be plainly of 8 or 4 bits, through vLLM's own fused experts (docs/adr/0025-plain-layers.md).

Nothing is rounded again: codes and scales are as vLLM's compressed-tensors checkpoints have them.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from d2moe_vllm.compat import (
    FusedMoEConfig,
    RoutedExperts,
    batch_invariant,
    int_experts,
    tokens_from_other_ranks,
)
from d2moe_vllm.format.config import CheckpointConfig, Layer, Scope, Storage
from d2moe_vllm.format.kinds import STORAGES
from d2moe_vllm.observability import recorder
from d2moe_vllm.ops.selfcheck import Theirs
from d2moe_vllm.overrides import VLLM
from d2moe_vllm.serving.experts import D2MoEMethod

BITS = (8, 4)
"""Whose codes stand for scale * (code - 2^(bits - 1)), in vLLM's kernels as in our format."""


class NotPlainError(ValueError):
    """Why vLLM's own experts do not serve a layer, in a few words."""


def plain_storage(layer: Layer) -> Storage | None:
    """How all matrices of a layer's experts are packed, where they are all that it has and one storage is theirs."""
    projections = [layer[role] for role in layer.roles]
    own = projections[0].delta_storage
    if own is None or STORAGES[own.type].bits not in BITS or layer.channels is not None:
        return None
    alike = all(one.delta == "dense" and one.delta_storage == own and not one.has_base for one in projections)
    return own if alike else None


def experts_of(moe: FusedMoEConfig, config: CheckpointConfig, layer: int, scope: Scope) -> Any:
    """vLLM's method for a layer's experts. Raises NotPlainError where this layer or this start is none for it."""
    if (storage := plain_storage(config.layers[layer])) is None:
        raise NotPlainError(f"layer {layer} is not plainly 8 or 4 bits of one group size")
    group = storage.group_size
    if any(config.layers[layer][role].bias for role in config.roles) or config.swiglu:
        raise NotPlainError("experts have biases or a clamped SwiGLU")
    if scope == "token" or batch_invariant():
        raise NotPlainError("their sums depend on the number of rows, and bits must not")
    if moe.in_dtype != torch.bfloat16:
        raise NotPlainError(f"scales are bfloat16, and activations {str(moe.in_dtype).removeprefix('torch.')}")
    if tokens_from_other_ranks(moe):
        raise NotPlainError("ranks exchange tokens (data, context or sequence parallelism)")
    if moe.num_experts % moe.ep_size:
        raise NotPlainError(f"{moe.num_experts} experts are not the same number on each of {moe.ep_size} ranks")
    if config.hidden_size % group or config.intermediate_size % (group * moe.tp_size):
        raise NotPlainError(f"groups of {group} inputs are not whole on every rank")
    try:
        return int_experts(moe, STORAGES[storage.type].bits, group)
    except ValueError as error:
        raise NotPlainError(str(error)) from None


class PlainMethod(D2MoEMethod):
    """Serves a layer with vLLM's method for it (`experts_of`); loads, checks and records as for any other of ours."""

    def __init__(self, moe: FusedMoEConfig, config: CheckpointConfig, layer: int, scope: Scope, theirs: Any) -> None:
        super().__init__(moe, config, layer, scope, VLLM)
        self.theirs = theirs

    def _pack(self, layer: nn.Module) -> None:
        """Hands the layer's parameters over, in their storage, under the names that vLLM's method gives them."""
        groups = []
        for half in ("w13", "w2"):
            # [E, out, bytes of codes] along the inputs, lowest first: eight or four codes to an int32.
            codes, scales = getattr(layer, f"{half}_dense"), getattr(layer, f"{half}_dense_scales")
            setattr(layer, f"{half}_dense", None)
            setattr(layer, f"{half}_dense_scales", None)
            for name, tensor in (("packed", codes.data.view(torch.int32)), ("scale", scales.data)):
                setattr(layer, f"{half}_weight_{name}", nn.Parameter(tensor, requires_grad=False))
            groups.append(scales.shape[-1])
        layer.num_groups_w13, layer.num_groups_w2 = groups
        self.theirs.process_weights_after_loading(layer)
        # Who runs the layer asks its method for these.
        self.moe_quant_config, self.moe_kernel = self.theirs.moe_quant_config, self.theirs.moe_kernel

    def _in_place_of_backend(self, layer: nn.Module) -> Theirs:
        numbers = torch.tensor(self.loader.experts, dtype=torch.int32)

        def compute(x: Tensor, gates: Tensor, ids: Tensor) -> Tensor:
            # Local numbers to the model's; who is elsewhere gives nothing, as one with weight 0 does.
            known, gates = numbers.to(ids.device)[ids.clamp(min=0).long()], gates.masked_fill(ids < 0, 0)
            if layer.apply_router_weight_on_input:  # of the one expert that there is then; the check weights its output
                return self.theirs.apply(layer, x, torch.ones_like(gates), known, None, None) * gates.to(x.dtype)
            return self.theirs.apply(layer, x, gates, known, None, None)

        return compute

    def apply(
        self,
        layer: RoutedExperts,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any = None,
        shared_experts_input: Tensor | None = None,
    ) -> Any:
        """See FusedMoEMethodBase."""
        started = time.perf_counter()
        output = self.theirs.apply(layer, x, topk_weights, topk_ids, shared_experts, shared_experts_input)
        recorder.record(self.constants["layer"], self.local_ids(layer, topk_ids), time.perf_counter() - started)
        return output
