"""How a model is to be served, in vLLM's own terms, and what a device holds then besides weights.

The KV cache is exact (kv_cache.py). Activations and CUDA graphs are formulas: read from vLLM 0.32 and from our backend,
and never measured on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from offline.errors import InputError
from offline.io.units import FLOAT32
from offline.plan.kv_cache import KVCache, KVCacheDtype, head_sizes, kv_cache, mamba_shared, number
from offline.plan.recipe import Recipe
from offline.plan.resident import WIDTH
from offline.source.families import MoEShape
from offline.source.family import Family

GPU_MEMORY_UTILIZATION = 0.92
"""vLLM's default (CacheConfig). What is left is for what vLLM does not count: the driver's context, NCCL's buffers."""
MAX_MODEL_LEN = 8192
"""Tokens of a request at most, unless asked for otherwise or beyond what the model can. vLLM's own default is what the
model can."""
MAX_NUM_SEQS = 4
"""Requests of full length at once. vLLM's own default is 256, which hardly any KV cache holds at full length."""
BATCHED_TOKENS = ((160, 16384), (70, 8192), (0, 2048))
"""GiB of a device -> vllm serve's tokens of one step from there on (EngineArgs.get_batch_defaults)."""
GIB = 2**30

CAPTURED_MOST = 512
GRAPH_BYTES = 2**20
"""Of one CUDA graph at least, by vLLM's own estimate (GPUModelRunner.profile_cudagraph_memory)."""
GRAPH_MODES = 2
"""Every size is captured whole and piecewise (CUDAGraphMode.FULL_AND_PIECEWISE)."""
LOGITS_BYTES = 26
"""A logit in 16 bits and in float32, and what sampling with top-k and top-p sorts: values, numbers, shares, sums."""
OPENED_BYTES = 10
"""A number of an expert while its codes are opened: twice in float32, for gate and up are put side by side, and once as
it is computed with (d2moe_vllm/ops/packing.py)."""


@dataclass(frozen=True)
class Serving:
    """What is asked of one device. device_bytes: of its memory. max_model_len: tokens of a request; None: as many as
    MAX_MODEL_LEN and the model allow. max_num_batched_tokens: of one step; None: vLLM's default for such a device."""

    device_bytes: int
    max_model_len: int | None = None
    max_num_seqs: int = MAX_NUM_SEQS
    max_num_batched_tokens: int | None = None
    tensor_parallel_size: int = 1
    expert_parallel: bool = False
    kv_cache_dtype: KVCacheDtype = "auto"
    gpu_memory_utilization: float = GPU_MEMORY_UTILIZATION

    def resolve(self, config: Mapping[str, Any]) -> Resolved:
        """For one model. Raises InputError where it cannot do as many tokens, or vLLM not so few."""
        positions, length = config.get("max_position_embeddings"), self.max_model_len
        if not isinstance(positions, int):
            positions = None
        if length is None:
            length = min(MAX_MODEL_LEN, positions or MAX_MODEL_LEN)
        elif positions and length > positions:
            raise InputError(
                f"--max-model-len {length} exceeds the model's {positions} positions; use --max-model-len {positions}"
            )
        tokens = self.max_num_batched_tokens
        if tokens is None:
            tokens = next(tokens for least, tokens in BATCHED_TOKENS if self.device_bytes >= least * GIB)
            tokens = max(min(tokens, self.max_num_seqs * length), self.max_num_seqs)
        elif tokens < self.max_num_seqs:
            raise InputError(
                f"--max-num-batched-tokens {tokens} is less than one for each of --max-num-seqs {self.max_num_seqs}, "
                f"which vLLM refuses; use {self.max_num_seqs} or more"
            )
        return Resolved(**{**vars(self), "max_model_len": length, "max_num_batched_tokens": tokens, "asked": self})


@dataclass(frozen=True)
class Resolved(Serving):
    """With nothing left open. asked: what was, before that."""

    max_model_len: int = MAX_MODEL_LEN
    max_num_batched_tokens: int = BATCHED_TOKENS[-1][1]
    asked: Serving | None = None

    @property
    def usable_bytes(self) -> int:
        """What vLLM takes of the device at most."""
        return math.floor(self.device_bytes * self.gpu_memory_utilization)

    def changed(self, config: Mapping[str, Any], **changes: Any) -> Resolved:
        """For another wish; what was left open is decided anew."""
        return replace(self.asked or self, **changes).resolve(config)

    def flags(self) -> list[str]:
        """For `vllm serve`."""
        found = ["--max-model-len", f"{self.max_model_len}", "--max-num-seqs", f"{self.max_num_seqs}"]
        found += ["--max-num-batched-tokens", f"{self.max_num_batched_tokens}"]
        if self.tensor_parallel_size > 1:
            found += ["--tensor-parallel-size", f"{self.tensor_parallel_size}"]
        if self.expert_parallel:
            found += ["--enable-expert-parallel"]
        if self.kv_cache_dtype != "auto":
            found += ["--kv-cache-dtype", self.kv_cache_dtype]
        if self.gpu_memory_utilization != GPU_MEMORY_UTILIZATION:
            found += ["--gpu-memory-utilization", f"{self.gpu_memory_utilization:g}"]
        return found

    def cache(self, family: Family, config: Mapping[str, Any]) -> KVCache:
        return kv_cache(family, config, tensor_parallel_size=self.tensor_parallel_size, dtype=self.kv_cache_dtype)

    def kv_cache_bytes(self, cache: KVCache) -> int:
        """That max_num_seqs requests of max_model_len tokens need at once."""
        return cache.nbytes(self.max_num_seqs, self.max_model_len, self.max_num_batched_tokens)

    def captured(self) -> list[int]:
        """Tokens of the steps that become CUDA graphs, ascending (VllmConfig._set_cudagraph_sizes)."""
        most = min(2 * self.max_num_seqs, CAPTURED_MOST, self.max_num_batched_tokens)
        sizes = {size for size in (1, 2, 4, *range(8, 256, 8), *range(256, most + 1, 16)) if size <= most}
        return sorted(sizes | ({self.max_num_batched_tokens} if self.max_num_batched_tokens <= most else set()))


def activation_bytes(
    serving: Resolved, family: Family, config: Mapping[str, Any], shape: MoEShape, recipe: Recipe, tokens: int
) -> int:
    """The peak of a step of `tokens` tokens on one rank, as vLLM's profile run makes one: hidden states, and the most
    that attention, one MoE layer by our plain torch, a dense MLP or the logits of all requests take beside them."""
    tp, hidden = serving.tensor_parallel_size, shape.model_hidden_size
    states = 3 * WIDTH * tokens * hidden  # as they come in, the residual, the normed
    dense = config.get("intermediate_size")
    beside = (
        _attention(family, config, tokens, tp),
        _experts(serving, shape, recipe, tokens),
        3 * WIDTH * tokens * -(-dense // tp) if isinstance(dense, int) else 0,
        LOGITS_BYTES * serving.max_num_seqs * number(config, "vocab_size"),
    )
    return states + max(beside)


def _attention(family: Family, config: Mapping[str, Any], tokens: int, tp: int) -> int:
    """Queries, keys, values and what comes of them; latent attention opens keys and values for its prefill."""
    if family.latent:
        heads = number(config, "num_attention_heads") / tp
        query = number(config, "qk_nope_head_dim") + number(config, "qk_rope_head_dim")
        return math.ceil(WIDTH * tokens * heads * (3 * query + 3 * number(config, "v_head_dim")))
    heads, kv_heads, size = head_sizes(config)
    attending = math.ceil(WIDTH * tokens * size * (2 * heads / tp + 2 * max(1, kv_heads / tp)))
    return max(attending, _keeping(family, config, tokens, tp))


def _keeping(family: Family, config: Mapping[str, Any], tokens: int, tp: int) -> int:
    """Of a layer that keeps a state instead: what its projections give, what is convolved, what comes of it twice."""
    if family.state is None:
        return 0
    if family.state == "convolution":
        numbers = 6 * number(config, "hidden_size")
    elif family.state == "mamba2":
        inner = number(config, "mamba_expand") * number(config, "hidden_size")
        shared = mamba_shared(config)
        # Every rank has what heads share: counted here so often that the division leaves it once.
        numbers = (2 * inner + tp * shared + number(config, "mamba_n_heads")) + (inner + tp * shared) + 2 * inner
    else:
        key, value = (
            number(config, f"linear_num_{kind}_heads") * number(config, f"linear_{kind}_head_dim")
            for kind in ("key", "value")
        )
        numbers = (2 * key + 2 * value) + (2 * key + value) + 2 * value
    return math.ceil(WIDTH * tokens * numbers / tp)


def _experts(serving: Resolved, shape: MoEShape, recipe: Recipe, tokens: int) -> int:
    """One layer's, by d2moe_vllm/ops/reference.py with static shapes, where every expert computes all rows, one after
    the other. tests/offline/test_fit.py holds it against what that allocates on a CPU.

    The worst moment is one of three: gate's and up's codes are opened, what they make is multiplied, or one expert's
    part is added to the sum. A base is counted wherever the recipe may have one.
    """
    hidden = shape.hidden_size
    channels = shape.intermediate_size // (1 if serving.expert_parallel else serving.tensor_parallel_size)
    packed, base = recipe.bits != 16, recipe.base.kind != "none"
    matrix = channels * hidden
    opening = 2 * OPENED_BYTES * matrix if packed else 0
    opened = WIDTH * matrix if packed else 0
    shrunk = 0 if packed else 2 * WIDTH * min(channels, hidden)
    # Which tokens come to an expert, and their gates.
    routed = tokens * (1 + FLOAT32) * (1 + shape.experts_per_token)
    # The last expert's activations and part, which are there until the next one's replace them, and the sum.
    before = channels * FLOAT32 + hidden * (FLOAT32 + WIDTH)
    # Products of gate and up, both in float32, their activation and what is made of them.
    made = channels * (2 * WIDTH + 4 * FLOAT32)
    # One expert's part, in float32, times its gate, and only where it is routed to.
    added = hidden * 3 * FLOAT32
    beside = 0
    if base:
        # Its product for all tokens, the mix of all experts and the last one's part in it; matrices as a whole.
        beside = tokens * channels * (2 * WIDTH + 2 * FLOAT32) + 3 * opened
        # Widened, and added to the deltas; an expert's channels are picked.
        made += channels * (4 * FLOAT32 - WIDTH)
    moments = (  # down's matrix of the last expert is there until the next one's replaces it
        tokens * before + opening + opened,
        tokens * (before + made + shrunk) + 3 * opened,
        tokens * (before + added) + opened,
    )
    return routed + beside + max(moments)


def graph_bytes(serving: Resolved, family: Family, config: Mapping[str, Any], shape: MoEShape, recipe: Recipe) -> int:
    """CUDA graphs share one pool, which holds the largest step's activations; beside it each takes GRAPH_BYTES."""
    sizes = serving.captured()
    pool = activation_bytes(serving, family, config, shape, recipe, sizes[-1])
    return pool + GRAPH_MODES * len(sizes) * GRAPH_BYTES
