"""DeepSeek v1 (DeepSeekMoE, arXiv 2401.06066) of transformers' Llama parts; weights have their released names.

Used by offline/, and copied into modeling_d2moe.py of checkpoints.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from d2moe_vllm.configuration_deepseek import DeepseekConfig


class DeepseekMLP(LlamaMLP):
    """down(act(gate(x)) * up(x)) with `intermediate_size` channels."""

    def __init__(self, config: DeepseekConfig, intermediate_size: int) -> None:
        config = copy.copy(config)
        config.intermediate_size = intermediate_size
        super().__init__(config)


class DeepseekExperts(nn.ModuleList):
    """The routed experts, called as transformers' own experts are."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [tokens, hidden], top_k_index and top_k_weights [tokens, k]: [tokens, hidden]."""
        output = torch.zeros_like(hidden_states)
        for number, expert in enumerate(self):
            token, slot = (top_k_index == number).nonzero(as_tuple=True)
            result = expert(hidden_states[token]) * top_k_weights[token, slot, None]
            output.index_add_(0, token, result.to(output.dtype))
        return output


class DeepseekMoE(nn.Module):
    """Equations 9 to 11 of the paper but for the residual: shared experts, plus the gated k routed ones with the
    highest softmax score. The gates are these scores, divided by their sum where norm_topk_prob says so."""

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__()
        size, routed, shared = config.moe_intermediate_size, config.n_routed_experts, config.n_shared_experts
        if routed is None or config.num_experts_per_tok is None or config.scoring_func != "softmax":
            raise ValueError("DeepSeek v1 needs n_routed_experts, num_experts_per_tok and scoring_func softmax")
        self.top_k, self.normalize = (
            config.num_experts_per_tok,
            config.norm_topk_prob and config.num_experts_per_tok > 1,
        )
        self.gate = nn.Linear(config.hidden_size, routed, bias=False)
        self.experts = DeepseekExperts(DeepseekMLP(config, size) for _ in range(routed))
        self.shared_experts = DeepseekMLP(config, size * shared) if shared else None

    def forward(self, hidden_states: Tensor) -> Tensor:
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        scores = self.gate(rows).softmax(dim=-1, dtype=torch.float32)
        weights, index = scores.topk(self.top_k, dim=-1, sorted=False)
        if self.normalize:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        output = self.experts(rows, index, weights.to(rows.dtype))
        if self.shared_experts is not None:
            output = output + self.shared_experts(rows)
        return output.reshape(hidden_states.shape)


class DeepseekForCausalLM(LlamaForCausalLM):
    """Llama with DeepseekMoE in the layers that have experts."""

    config_class = DeepseekConfig

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__(config)
        for number, layer in enumerate(self.model.layers):
            if config.has_experts(number):
                layer.mlp = DeepseekMoE(config)
        self.post_init()
