"""The KV cache that vLLM keeps of a model on one device: bytes of a token, blocks of a request.

Read from vLLM 0.32 and compared with what its engine allocates (tests/plugin/test_fit_served.py): page sizes and
requests' blocks in v1/kv_cache_interface.py, the pool in v1/core/kv_cache_utils.py, heads of a rank in config/model.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from offline.errors import InputError
from offline.source.family import Family

KVCacheDtype = Literal["auto", "fp8"]
KV_BYTES: Mapping[KVCacheDtype, int] = {"auto": 2, "fp8": 1}
"""Of one number. `auto` is the model's dtype, which vLLM makes a 16-bit one where it is float32."""
BLOCK_TOKENS = {"heads": 16, "latent": 64}
"""Tokens of a block on GPUs: CacheConfig.DEFAULT_BLOCK_SIZE, and FlashMLA's."""
CONCURRENT_BATCHES = 2
"""Steps under way at once, by asynchronous scheduling: a sliding window keeps the tokens of all of them."""
NULL_BLOCKS = 1
"""That the pool holds back."""


@dataclass(frozen=True)
class KVCache:
    """Of one rank. layers: that attend; numbers: that one layer keeps of a token; width: bytes of a number; window:
    tokens that a layer looks back on, None for all; block_tokens: tokens of a block."""

    layers: int
    numbers: int
    width: int
    window: int | None
    block_tokens: int

    @property
    def token_bytes(self) -> int:
        """Of one token in all layers."""
        return self.layers * self.numbers * self.width

    @property
    def block_bytes(self) -> int:
        """Of one block in all layers."""
        return self.block_tokens * self.token_bytes

    def blocks(self, nbytes: int) -> int:
        """As many as vLLM makes of a cache of so many bytes, the one that it holds back included."""
        return nbytes // self.block_bytes

    def request_blocks(self, length: int, batched_tokens: int) -> int:
        """At most, of one request of `length` tokens; batched_tokens: of one step.

        A window's layers give back what they have passed, but for the tokens under way, and begin within a block.
        """
        if self.window is None:
            return -(-length // self.block_tokens)
        held = min(self.window - 1 + CONCURRENT_BATCHES * batched_tokens, length)
        return -(-held // self.block_tokens) + 1

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

    A rank has its share of the KV heads, and one at least. Of latent attention every rank has all: one latent vector
    and one rotated key serve all heads. Raises InputError where the family's cache is not known.
    """
    if family.attention is None:
        raise InputError(
            f"what attention of {family.model_type} keeps of a token is not known here, so --fit cannot tell what "
            "fits; use --size or --ratio"
        )
    if family.attention == "latent":
        numbers = number(config, "kv_lora_rank") + number(config, "qk_rope_head_dim")
    else:
        _, kv_heads, size = head_sizes(config)
        numbers = 2 * max(1, kv_heads // tensor_parallel_size) * size
    return KVCache(
        layers=number(config, "num_hidden_layers"),
        numbers=numbers,
        width=KV_BYTES[dtype],
        window=_window(family, config),
        block_tokens=block_tokens or BLOCK_TOKENS[family.attention],
    )


def _window(family: Family, config: Mapping[str, Any]) -> int | None:
    """config.json's sliding window where it is in use: every layer has it then (offline/source/agreement.py)."""
    if not family.window_keys or not all(config.get(key) for key in family.window_keys):
        return None
    return number(config, family.window_keys[0])
