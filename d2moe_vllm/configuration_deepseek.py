"""Configuration of DeepSeek v1 (DeepSeekMoE, arXiv 2401.06066), which neither transformers 5 nor vLLM has.

Used by the vLLM plugin, and copied into modeling_d2moe.py of checkpoints.
"""

from __future__ import annotations

from transformers import LlamaConfig


class DeepseekConfig(LlamaConfig):
    """Llama's configuration and the experts', by the names and defaults of the released checkpoints.

    n_routed_experts, num_experts_per_tok: experts and how many of them a token is sent to. n_shared_experts:
    experts that every token passes through, stored as one MLP of as many times moe_intermediate_size.
    first_k_dense_replace, moe_layer_freq: see has_experts. norm_topk_prob: gates of a token add up to 1.
    """

    model_type = "deepseek"

    moe_intermediate_size: int = 1407
    n_routed_experts: int | None = None
    n_shared_experts: int | None = None
    num_experts_per_tok: int | None = None
    first_k_dense_replace: int = 0
    moe_layer_freq: int = 1
    norm_topk_prob: bool = False
    scoring_func: str = "softmax"

    def has_experts(self, layer: int) -> bool:
        """Whether a decoder layer has experts in place of its MLP."""
        return (
            self.n_routed_experts is not None
            and layer >= self.first_k_dense_replace
            and layer % self.moe_layer_freq == 0
        )
