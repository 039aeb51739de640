"""What `d2moe plan --fit` counts against what vLLM's engine allocates: KV cache, and weights on every rank.

On a CPU: blocks are as large as its backend wants them, all else is as on any device. Our own kernels for CPUs lay a
matrix out in whole blocks of 16 outputs, which of matrices as small as these is a fifth more: the reference backend has
weights as they are stored, as on a GPU.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compression import d2moe_here
from engine import TWO_RANKS, run_engine
from families import write_family

from d2moe_vllm.format.files import read_config, read_manifest
from d2moe_vllm.format.kinds import TensorSpec
from offline.plan.kv_cache import CONCURRENT_BATCHES, KVCache, kv_cache
from offline.plan.resident import expert_bytes, other_bytes
from offline.source.dense import read_model_config
from offline.source.families import FAMILIES

pytest.importorskip("vllm")

CLOSE = 0.005
"""Of all weights. Experts are few here, so beside them a kilobyte of what a module keeps may count."""
MLA = "deepseek_v2"
LENGTH = 256
DELTA = dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 128)
"""vLLM's kernel for CPUs takes heads of no other size."""
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "heads, fewer for keys and values": ("qwen3_moe", {"num_attention_heads": 4, "num_key_value_heads": 2}, {}),
    # What vLLM's CPU backend needs: its MLA knows one block size, and its rotary kernel misreads MLA's strides.
    "latent": (MLA, {}, {"block_size": 16, "compilation_config": {"custom_ops": ["none"]}}),
    "a window in every layer": ("mixtral", {"sliding_window": 48}, {"max_num_batched_tokens": 64}),
    "a window in every other layer": (
        "gpt_oss",
        {"sliding_window": 48, "num_hidden_layers": 4},
        {"max_num_batched_tokens": 64},
    ),
    # Two layers of three, in groups of one; of one kind alone, in one of four.
    "a window in some layers": ("afmoe", {"sliding_window": 48}, {"max_num_batched_tokens": 64}),
    "a window in three of four layers": (
        "exaone_moe",
        {
            "sliding_window": 48,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
        },
        {"max_num_batched_tokens": 64},
    ),
    "states of Mamba": ("granitemoehybrid", {}, {"block_size": 32}),
    # Blocks so small that a state does not fit into one; a layer that attends, and two that keep states.
    "states of a delta net": ("qwen3_next", DELTA, {"block_size": 32}),
    "states of a convolution": (
        "lfm2_moe",
        {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention", "conv", "full_attention"]},
        {"compilation_config": {"custom_ops": ["none"]}},
    ),
}
"""A family, changes of its configuration, and arguments of the engine."""


def serve(folder: Path, name: str, text: Path, **llm: Any) -> tuple[Path, dict[str, Any]]:
    """A family's small checkpoint, compressed, and what the engine says of it."""
    family, changes, wanted = CASES[name]
    source = write_family(folder / "source", family, **changes)
    given = ("--bits", "4", "--ratio", "0.12", "--windows", "4", "--seq-len", "32", "--calibration", text)
    done = d2moe_here("compress", source, folder / "ours", *given)
    assert done.returncode == 0, done.stderr
    stored = {"d2moe": {"backend": "reference"}}
    llm = {
        "additional_config": stored,
        "dtype": "bfloat16",
        "enforce_eager": True,
        "max_model_len": LENGTH,
        **wanted,
        **llm,
    }
    job = {"storage": True, "kv_cache": True, "max_tokens": 1}
    ranks = llm.get("tensor_parallel_size", 1)
    (folder / "run").mkdir()
    code, log, output = run_engine(folder / "run", folder / "ours", TWO_RANKS if ranks == 2 else {}, **job, llm=llm)
    assert code == 0, log[-5000:]
    return folder / "ours", json.loads(output.read_text())


def counted(checkpoint: Path, found: dict[str, Any], ranks: int, asked: int | None = None) -> tuple[KVCache, int, int]:
    """The KV cache and the bytes of experts and of all else on the rank that has most, by our arithmetic; asked: a
    block's tokens, None for what the engine takes."""
    config, manifest = read_config(checkpoint), read_manifest(checkpoint)
    model, family = read_model_config(checkpoint), FAMILIES[config.family]
    (tokens,) = found["block_tokens"]
    cache = kv_cache(family, model, tensor_parallel_size=ranks, block_tokens=asked or tokens)
    cache = replace(cache, state_blocks=found["state_blocks"])
    assert cache.block_tokens == tokens
    others = {name: TensorSpec(dtype, shape) for name, (dtype, shape) in manifest.other_tensors.items()}
    return cache, expert_bytes(config, ranks), other_bytes(others, model, family, ranks)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_the_engine_allocates_what_is_counted(tmp_path: Path, texts: tuple[Path, Path], name: str, ranks: int) -> None:
    if name == "latent" and torch.cpu._is_amx_tile_supported():
        pytest.skip("vLLM packs the latent's projections for AMX, as no GPU does")
    checkpoint, found = serve(tmp_path, name, texts[0], tensor_parallel_size=ranks)
    cache, experts, others = counted(checkpoint, found, ranks, CASES[name][2].get("block_size"))
    assert found["block_bytes"] == cache.block_bytes
    assert found["blocks"] == cache.blocks(found["memory"])
    # Of a window what is under way counts, of two steps on GPUs.
    under_way = found["batched_tokens"] * found["concurrent_batches"]
    assert found["request_blocks"] == cache.request_blocks(LENGTH, under_way // CONCURRENT_BATCHES)
    assert (cache.window is not None) == ("SlidingWindowSpec" in found["kinds"])
    assert (cache.windowed > 0) == ({"SlidingWindowSpec", "FullAttentionSpec"} <= set(found["kinds"]))
    storage = found["storage"]
    assert max(rank["experts"] for rank in storage) == pytest.approx(experts, abs=1024)
    assert max(sum(rank.values()) for rank in storage) == pytest.approx(experts + others, rel=CLOSE)
