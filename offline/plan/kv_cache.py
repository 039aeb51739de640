"""The KV cache that vLLM keeps of a model on one device: bytes of a token, blocks of a request.

Read from vLLM 0.32 and compared with what its engine allocates (tests/plugin/test_fit_served.py): page sizes and
requests' blocks in v1/kv_cache_interface.py, the pool and its groups in v1/core/kv_cache_utils.py, heads of a rank in
config/model.py, blocks as large as a state in platforms/interface.py, states in layers/mamba/mamba_utils.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from offline.errors import InputError
from offline.io.units import FLOAT32
from offline.source.family import Family, State

KVCacheDtype = Literal["auto", "fp8"]
KV_BYTES: Mapping[KVCacheDtype, int] = {"auto": 2, "fp8": 1}
"""Of one number. `auto` is the model's dtype, which vLLM makes a 16-bit one where it is float32."""
BLOCK_TOKENS = {"heads": 16, "latent": 64, "indexed": 64}
"""Tokens of a block on GPUs: CacheConfig.DEFAULT_BLOCK_SIZE, and FlashMLA's."""
SPARSE_FP8_BYTES = 656
"""Of a token's latent and rotated key for sparse attention in fp8: 512 of fp8, four scales, 64 numbers of 16 bits."""
INDEX_BLOCK = 128
"""Numbers of an indexer's key, in fp8, that share a scale of four bytes."""
STATE_BLOCKS = 2
"""Of a request in layers that keep a state: one as it is, one as it was where a block ended, for prefix caching, which
is vLLM's default on GPUs."""
STATE_BYTES = 2
"""Of one number of a state, by default the model's dtype; Qwen3.5's config.json says float32 of what recurs."""
PADDED = 1.5
"""Kinds of layers whose counts differ by less are put into groups of the larger count."""
CONCURRENT_BATCHES = 2
"""Steps under way at once, by asynchronous scheduling: a sliding window keeps the tokens of all of them."""
NULL_BLOCKS = 1
"""That the pool holds back."""


@dataclass(frozen=True)
class KVCache:
    """Of one rank. layers: that attend; layer_bytes: that one of them keeps of a token; window: tokens that a layer
    looks back on, None for all; block_tokens: tokens of a block; windowed: layers with a window beside those that look
    back on all, 0: it is that of all layers; states: layers that keep a state of a request, whose size a block of one
    layer has then at least; state_blocks: that a request has of a group of these.

    A block is one of the pool, which all kinds of layers draw from: it holds as many tokens, or one state, of a group
    of layers, and a request has blocks of every group.
    """

    layers: int
    layer_bytes: int
    window: int | None
    block_tokens: int
    windowed: int = 0
    states: int = 0
    state_blocks: int = STATE_BLOCKS

    @property
    def token_bytes(self) -> int:
        """Of one token in all layers that attend."""
        return (self.layers + self.windowed) * self.layer_bytes

    @property
    def kinds(self) -> tuple[int, int]:
        """Layers that attend, and those of another kind: with a window, or a state."""
        return self.layers, self.windowed or self.states

    @property
    def groups(self) -> tuple[int, int]:
        """Of either kind of layers, each group of as many layers."""
        counts = self.kinds
        if not counts[1]:
            return 1, 0
        size = max(counts) if max(counts) < PADDED * min(counts) else min(counts)
        return -(-counts[0] // size), -(-counts[1] // size)

    @property
    def block_bytes(self) -> int:
        """Of one block, in all layers of the largest group."""
        counts = zip(self.kinds, self.groups, strict=True)
        return max(-(-count // groups) for count, groups in counts if groups) * self.block_tokens * self.layer_bytes

    def blocks(self, nbytes: int) -> int:
        """As many as vLLM makes of a cache of so many bytes, the one that it holds back included."""
        return nbytes // self.block_bytes

    def request_blocks(self, length: int, batched_tokens: int) -> int:
        """At most, of one request of `length` tokens; batched_tokens: of one step.

        A window's layers give back what they have passed, but for the tokens under way, and begin within a block.
        """
        attending, others = self.groups
        whole = -(-length // self.block_tokens)
        if self.window is None:
            return attending * whole + others * self.state_blocks
        held = min(self.window - 1 + CONCURRENT_BATCHES * batched_tokens, length)
        of_window = -(-held // self.block_tokens) + 1
        return attending * whole + others * of_window if self.windowed else of_window

    def nbytes(self, requests: int, length: int, batched_tokens: int) -> int:
        """What the pool needs for so many requests at once, each of `length` tokens."""
        return (NULL_BLOCKS + requests * self.request_blocks(length, batched_tokens)) * self.block_bytes


def number(config: Mapping[str, Any], key: str) -> int:
    """A positive number of config.json. Raises InputError."""
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"config.json: {key} is {value!r}, and --fit needs a positive number; use --size")
    return value


def head_sizes(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Query heads, KV heads and numbers of a head, of attention that keeps heads. Raises InputError."""
    heads = number(config, "num_attention_heads")
    kv_heads = heads if config.get("num_key_value_heads") is None else number(config, "num_key_value_heads")
    size = config.get("head_dim")
    return heads, kv_heads, number(config, "hidden_size") // heads if size is None else number(config, "head_dim")


def kv_cache(
    family: Family,
    config: Mapping[str, Any],
    *,
    tensor_parallel_size: int = 1,
    dtype: KVCacheDtype = "auto",
    block_tokens: int | None = None,
) -> KVCache:
    """What one of `tensor_parallel_size` ranks caches; block_tokens: None for a GPU's.

    A rank has its share of the KV heads, and one at least, and its share of a state. Of latent attention every rank has
    all: one latent vector and one rotated key serve all heads. Raises InputError where the family's cache is not known.
    """
    if family.attention is None:
        raise InputError(
            f"what attention of {family.model_type} keeps of a token is not known here, so --fit cannot tell what "
            "fits; use --size or --ratio"
        )
    if family.latent:
        layer_bytes = (number(config, "kv_lora_rank") + number(config, "qk_rope_head_dim")) * KV_BYTES[dtype]
    else:
        _, kv_heads, size = head_sizes(config)
        layer_bytes = 2 * max(1, kv_heads // tensor_parallel_size) * size * KV_BYTES[dtype]
    if family.attention == "indexed":
        key = number(config, "index_head_dim")
        layer_bytes = (SPARSE_FP8_BYTES if dtype == "fp8" else layer_bytes) + key + 4 * (key // INDEX_BLOCK)
    tokens, layers = block_tokens or BLOCK_TOKENS[family.attention], number(config, "num_hidden_layers")
    states, windowed, window = 0, 0, _window(family, config)
    if family.state:
        states = layers - attending_layers(config, layers)
        tokens *= -(-state_bytes(family.state, config, tensor_parallel_size) // (tokens * layer_bytes))
    if window is not None and family.window_every != 1:
        every = family.window_every
        windowed = -(-layers // every) if every else layers - attending_layers(config, layers)
    return KVCache(layers - states - windowed, layer_bytes, window, tokens, windowed, states)


def attending_layers(config: Mapping[str, Any], layers: int) -> int:
    """How many of a model's layers attend to all tokens, by config.json: one of every `full_attention_interval`, by
    default of four, where it does not list them. Raises InputError."""
    kinds = config.get("layer_types")
    if kinds is None:
        return layers // number({"full_attention_interval": 4, **config}, "full_attention_interval")
    found = [kind in ("full_attention", "attention") for kind in kinds] if isinstance(kinds, list) else []
    if len(found) != layers or not any(found):
        raise InputError(f"config.json: layer_types is {kinds!r}, expected the kinds of {layers} layers; use --size")
    return sum(found)


def mamba_shared(config: Mapping[str, Any]) -> int:
    """Channels of a Mamba-2 layer, its B and C, that every rank has, as all heads share them: there is one group."""
    return 2 * number(config, "mamba_d_state")


def state_bytes(state: State, config: Mapping[str, Any], ranks: int) -> int:
    """That one layer keeps of one request on one of so many ranks. Raises InputError."""
    if state == "convolution":
        return STATE_BYTES * (number(config, "hidden_size") // ranks) * (number(config, "conv_L_cache") - 1)
    if state == "mamba2":
        recurrent = number(config, "mamba_n_heads") // ranks * number(config, "mamba_d_head")
        recurrent *= number(config, "mamba_d_state")
        channels = number(config, "mamba_expand") * number(config, "hidden_size") // ranks + mamba_shared(config)
        return STATE_BYTES * (channels * (number(config, "mamba_d_conv") - 1) + recurrent)
    heads = {kind: number(config, f"linear_num_{kind}_heads") for kind in ("key", "value")}
    sizes = {kind: number(config, f"linear_{kind}_head_dim") for kind in ("key", "value")}
    channels = (2 * heads["key"] * sizes["key"] + heads["value"] * sizes["value"]) // ranks
    recurrent = heads["value"] // ranks * sizes["value"] * sizes["key"]
    width = FLOAT32 if config.get("mamba_ssm_dtype") == "float32" else STATE_BYTES
    return STATE_BYTES * channels * (number(config, "linear_conv_kernel_dim") - 1) + width * recurrent


def _window(family: Family, config: Mapping[str, Any]) -> int | None:
    """config.json's sliding window where it is in use: every layer has it then, or one of every so many
    (offline/source/agreement.py)."""
    if not family.window_keys or not all(config.get(key) for key in family.window_keys):
        return None
    return number(config, family.window_keys[0])
