"""Sizes as people say them: --size for files, --fit for what one device holds. What an engine really allocates, tells
tests/plugin/test_fit_served.py."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from compression import ROOT, TINY, d2moe_here
from families import CONFIGS, write_family
from hypothesis import given
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from d2moe_vllm import ops
from d2moe_vllm.format.config import CheckpointConfig, Layer, Projection, Pruning, Source, Storage
from d2moe_vllm.format.kinds import ROLES, TensorSpec
from d2moe_vllm.format.recipefile import read_recipe
from d2moe_vllm.ops import reference
from d2moe_vllm.serving.parameters import Share
from offline.cli.options import parse_size
from offline.errors import InputError
from offline.plan.kv_cache import kv_cache
from offline.plan.needs import ratio_of
from offline.plan.recipe import Recipe
from offline.plan.resident import expert_bytes, other_bytes, parallel_problem
from offline.plan.serving import Resolved, Serving, _experts
from offline.source.families import FAMILIES, MoEShape
from offline.work.workdir import WorkDir

MIXTRAL = {
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096,
    "intermediate_size": 14336, "vocab_size": 32000, "num_local_experts": 8, "max_position_embeddings": 32768,
}  # fmt: skip
DEEPSEEK_V3 = {
    "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128, "kv_lora_rank": 512,
    "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "hidden_size": 7168,
}  # fmt: skip
FIT = ("--fit", "21.5MB", "--max-model-len", "256", "--max-num-seqs", "2", "--max-num-batched-tokens", "512")
"""That holds less than the bundled model and more than its smallest."""
SMALL = ("--windows", "4", "--seq-len", "64")


def plan(*arguments: object, source: Path = TINY) -> dict[str, Any]:
    done = d2moe_here("plan", source, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def changed(option: str, value: object) -> list[object]:
    """FIT with another value, or one more option."""
    wish: dict[str, object] = {**dict(zip(FIT[::2], FIT[1::2], strict=True)), option: value}
    return [word for pair in wish.items() for word in pair]


def refused(*arguments: object, source: Path = TINY) -> str:
    done = d2moe_here("plan", source, *arguments)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    return done.stderr


# The KV cache


def test_mixtrals_cache() -> None:
    """Two of 8 heads of 128 numbers in each of 32 layers, in 16 bits: 131,072 bytes a token."""
    cache = kv_cache(FAMILIES["mixtral"], MIXTRAL)
    assert cache.token_bytes == 2 * 8 * 128 * 32 * 2
    assert cache.nbytes(requests=3, length=100, batched_tokens=2048) == (1 + 3 * 7) * 16 * cache.token_bytes
    assert kv_cache(FAMILIES["mixtral"], MIXTRAL, dtype="fp8").token_bytes == cache.token_bytes // 2


@pytest.mark.parametrize(("ranks", "heads"), [(1, 8), (2, 4), (8, 1), (16, 1), (32, 1)])
def test_kv_heads_are_shared_out_and_then_repeated(ranks: int, heads: int) -> None:
    cache = kv_cache(FAMILIES["mixtral"], MIXTRAL, tensor_parallel_size=ranks)
    assert cache.token_bytes == 2 * heads * 128 * 32 * 2


@pytest.mark.parametrize("ranks", [1, 8])
def test_a_latent_is_on_every_rank(ranks: int) -> None:
    cache = kv_cache(FAMILIES["deepseek_v3"], DEEPSEEK_V3, tensor_parallel_size=ranks)
    assert cache.token_bytes == (512 + 64) * 61 * 2


def test_a_window_gives_back_what_it_has_passed() -> None:
    """A window's tokens but one and two steps' under way, in blocks that begin anywhere; never more than a request."""
    cache = kv_cache(FAMILIES["mixtral"], {**MIXTRAL, "sliding_window": 4096})
    assert cache.request_blocks(32768, 512) == -(-(4095 + 2 * 512) // 16) + 1
    assert cache.request_blocks(1024, 512) == 1024 // 16 + 1
    assert kv_cache(FAMILIES["mixtral"], MIXTRAL).request_blocks(32768, 512) == 2048


def test_every_other_layer_with_a_window_is_a_group() -> None:
    """gpt-oss-20b: 12 layers of either kind, which share blocks; 2 x 8 KV heads of 64 numbers in 16 bits a token."""
    config = {
        "num_hidden_layers": 24, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64,
        "hidden_size": 2880, "sliding_window": 128,
    }  # fmt: skip
    cache = kv_cache(FAMILIES["gpt_oss"], config)
    assert (cache.layers, cache.windowed, cache.groups) == (12, 12, (1, 1))
    assert cache.token_bytes == 24 * 2048
    assert cache.block_bytes == 12 * 16 * 2048
    # All of 8,192 tokens, and 127 and two steps' of the window, in blocks that begin anywhere.
    assert cache.request_blocks(8192, 64) == 8192 // 16 + (127 + 2 * 64 + 15) // 16 + 1
    odd = kv_cache(FAMILIES["gpt_oss"], {**config, "num_hidden_layers": 3})
    assert (odd.layers, odd.windowed, odd.groups) == (1, 2, (1, 2))


@pytest.mark.parametrize(("switch", "window"), [(True, 64), (False, None), (None, None)])
def test_a_window_that_is_not_switched_on_is_none(switch: bool | None, window: int | None) -> None:
    config = {**MIXTRAL, "sliding_window": 64, "use_sliding_window": switch}
    assert kv_cache(FAMILIES["qwen3_moe"], config).window == window


NOT_COUNTED = {
    "qwen3_vl_moe", "qwen3_5_moe", "gemma4", "llama4",  # multimodal, with towers that are not counted
    "llama4_text",  # attention within chunks
    "laguna",  # not served here, to be held against
    "mimo_v2_flash",  # layers with a window and without have heads of other sizes
    "nemotron_h",  # states of Mamba beside layers that have neither
    "glm_moe_dsa",  # fp8 on some GPUs, unasked
}  # fmt: skip
"""Families that --fit refuses by name."""


def test_every_other_family_says_what_its_attention_keeps() -> None:
    assert {name for name, family in FAMILIES.items() if family.attention is None} == NOT_COUNTED
    for name in sorted(NOT_COUNTED):
        with pytest.raises(InputError, match=r"not known here.*use --size or --ratio"):
            kv_cache(FAMILIES[name], MIXTRAL)


QWEN3_NEXT = {
    "num_hidden_layers": 48, "hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256,
    "full_attention_interval": 4, "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128,
    "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4, "partial_rotary_factor": 0.25,
}  # fmt: skip
"""Qwen3-Next-80B-A3B's."""


def test_qwen3_nexts_cache() -> None:
    """A state of 1.1 MB, a block of as many bytes in each of 12 layers: vLLM's log says 544 tokens, too."""
    cache = kv_cache(FAMILIES["qwen3_next"], QWEN3_NEXT)
    assert cache.block_tokens == 544
    assert cache.token_bytes == 2 * 2 * 256 * 2 * 12
    assert (cache.layers, cache.states, cache.groups) == (12, 36, (1, 3))
    assert cache.block_bytes == 544 * cache.token_bytes
    # Blocks of its tokens, and in each of three groups a state as it is and one as it was.
    assert cache.request_blocks(8192, 2048) == 16 + 3 * 2
    listed = {**QWEN3_NEXT, "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 12}
    assert kv_cache(FAMILIES["qwen3_next"], listed) == cache
    # Qwen3.5's recurrent part is in float32.
    wide = kv_cache(FAMILIES["qwen3_5_moe_text"], {**QWEN3_NEXT, "mamba_ssm_dtype": "float32"})
    assert wide.block_tokens == 16 * -(-(49_152 + 4 * 32 * 128 * 128) // (16 * 2048))
    # Shared out, a state is half as large, keys and values too: one of two heads.
    assert kv_cache(FAMILIES["qwen3_next"], QWEN3_NEXT, tensor_parallel_size=2).block_tokens == 544
    assert kv_cache(FAMILIES["qwen3_next"], QWEN3_NEXT, tensor_parallel_size=4).block_tokens == 272


@pytest.mark.parametrize(
    ("attending", "states", "groups"), [(6, 18, (1, 3)), (10, 14, (1, 1)), (6, 10, (1, 2)), (18, 6, (3, 1))]
)
def test_layers_of_two_kinds_are_put_into_groups_of_as_many(
    attending: int, states: int, groups: tuple[int, int]
) -> None:
    """Of about as many as there are of the rarer kind; of the larger number where they hardly differ."""
    config = {**MIXTRAL, "num_hidden_layers": attending + states, "conv_L_cache": 3}
    config["layer_types"] = ["conv"] * states + ["full_attention"] * attending
    cache = kv_cache(FAMILIES["lfm2_moe"], config)
    assert cache.groups == groups
    each = max(-(-attending // groups[0]), -(-states // groups[1]))
    assert cache.block_bytes == each * cache.block_tokens * cache.layer_bytes


def test_layers_with_a_window_are_those_that_are_listed() -> None:
    """Trinity: three of four layers look back on 2,048 tokens. Three groups of as many, beside one that attends."""
    kinds = (["sliding_attention"] * 3 + ["full_attention"]) * 14
    config = {**MIXTRAL, "num_hidden_layers": 56, "sliding_window": 2048, "layer_types": kinds}
    cache = kv_cache(FAMILIES["afmoe"], config)
    assert (cache.layers, cache.windowed, cache.window, cache.groups) == (14, 42, 2048, (1, 3))
    assert cache.block_bytes == 14 * 16 * cache.layer_bytes
    of_window = (2047 + 2 * 512 + 15) // 16 + 1
    assert cache.request_blocks(32768, 512) == 32768 // 16 + 3 * of_window


GRANITE_4_SMALL = {
    "num_hidden_layers": 40, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8,
    "layer_types": ["attention" if layer in (5, 15, 25, 35) else "mamba" for layer in range(40)],
    "mamba_n_heads": 128, "mamba_d_head": 64, "mamba_d_state": 128, "mamba_d_conv": 4, "mamba_expand": 2,
}  # fmt: skip


@pytest.mark.parametrize("ranks", [1, 2])
def test_granites_cache(ranks: int) -> None:
    """A state of 128 heads of 64 channels by 128 numbers, and three inputs of the convolution: of 8,192 channels, and
    of 256 that all heads share, which every rank has."""
    cache = kv_cache(FAMILIES["granitemoehybrid"], GRANITE_4_SMALL, tensor_parallel_size=ranks)
    state = 2 * (128 * 64 * 128 // ranks + 3 * (8192 // ranks + 256))
    assert (cache.layers, cache.states, cache.groups) == (4, 36, (1, 9))
    assert cache.layer_bytes == 2 * 8 // ranks * 128 * 2
    assert cache.block_tokens == 16 * -(-state // (16 * cache.layer_bytes))


@pytest.mark.parametrize("kinds", ["conv", ["conv"] * 24, ["conv", "full_attention"]])
def test_kinds_of_layers_that_do_not_work_out(kinds: object) -> None:
    config = {**MIXTRAL, "num_hidden_layers": 24, "conv_L_cache": 3, "layer_types": kinds}
    with pytest.raises(InputError, match=r"layer_types.*use --size"):
        kv_cache(FAMILIES["lfm2_moe"], config)


def test_an_indexers_keys_count() -> None:
    """DeepSeek V3.2's: 128 numbers of a byte and a scale beside the latent."""
    config = {**DEEPSEEK_V3, "index_head_dim": 128}
    assert kv_cache(FAMILIES["deepseek_v32"], config).token_bytes == (2 * (512 + 64) + 132) * 61
    assert kv_cache(FAMILIES["deepseek_v32"], config, dtype="fp8").token_bytes == (656 + 132) * 61


def test_a_cache_that_is_not_known_is_refused() -> None:
    unknown = dataclasses.replace(FAMILIES["mixtral"], attention=None)
    with pytest.raises(InputError, match=r"not known here.*use --size or --ratio"):
        kv_cache(unknown, MIXTRAL)
    with pytest.raises(InputError, match=r"kv_lora_rank is None.*use --size"):
        kv_cache(FAMILIES["deepseek_v3"], {**DEEPSEEK_V3, "kv_lora_rank": None})


# Weights


@pytest.mark.parametrize("ranks", [1, 2, 4, 16])
def test_what_is_not_compressed_on_one_of_mixtrals_ranks(ranks: int) -> None:
    """By hand: cut by heads and rows, keys and values by 8 at most; norms, routers and the rotary table whole."""
    shapes = {"model.embed_tokens.weight": (32000, 4096), "lm_head.weight": (32000, 4096), "model.norm.weight": (4096,)}
    for layer in range(32):
        attention = f"model.layers.{layer}.self_attn"
        shapes |= {f"{attention}.{name}_proj.weight": (4096, 4096) for name in "qo"}
        shapes |= {f"{attention}.{name}_proj.weight": (1024, 4096) for name in "kv"}
        shapes[f"model.layers.{layer}.input_layernorm.weight"] = (4096,)
        shapes[f"model.layers.{layer}.block_sparse_moe.gate.weight"] = (8, 4096)
    shapes["model.layers.32.eh_proj.weight"] = (4096, 8192)  # never loaded
    specs = {name: TensorSpec("BF16", shape) for name, shape in shapes.items()}
    whole = 4096 + 32 * (4096 + 8 * 4096) + 32768 * 128
    cut = (2 * 32000 * 4096 + 32 * 2 * 4096**2) // ranks + 32 * 2 * 1024 * 4096 // min(ranks, 8)
    assert other_bytes(specs, MIXTRAL, FAMILIES["mixtral"], ranks) == 2 * (whole + cut)


def test_a_vocabulary_is_padded_and_biases_of_cut_inputs_are_whole() -> None:
    config = {**MIXTRAL, "max_position_embeddings": None}
    specs = {"model.embed_tokens.weight": TensorSpec("BF16", (65, 8)), "lm_head.bias": TensorSpec("BF16", (65,))}
    assert other_bytes(specs, config, FAMILIES["mixtral"], 2) == 2 * 64 * (8 + 1)
    specs = {f"model.layers.0.self_attn.{name}_proj.bias": TensorSpec("BF16", (32,)) for name in "qo"}
    assert other_bytes(specs, config, FAMILIES["mixtral"], 2) == 2 * (16 + 32)


def layer_config(
    hidden: int, channels: int, *, packed: bool, base: bool, experts: int = 4, bits: int = 4
) -> CheckpointConfig:
    """One layer in few bits, or in factors."""
    shape, storage = MoEShape(experts, 2, hidden, channels, (0,)), Storage(type=f"int{bits}", group_size=64)
    projections = {}
    for role in ROLES:
        kept = shape.projection(role)[1] * 7 // 8 if base else 0
        projections[role] = (
            Projection(delta="dense", delta_storage=storage, full_base=base, base_storage=storage if base else None)
            if packed
            else Projection(rank=min(hidden, channels) // 2, kept_columns=kept, used_columns=kept)
        )
    family = FAMILIES["mixtral"]
    return CheckpointConfig(
        family="mixtral", experts=family.experts, projections=dict(family.projections), num_experts=experts,
        hidden_size=hidden, intermediate_size=channels, dtype="bfloat16", pruning=Pruning(groups=8),
        layers={0: Layer(**projections)}, source=Source(name="x", parameters=1, bytes=1),
    )  # fmt: skip


def test_experts_are_cut_by_channels_or_shared_out_whole() -> None:
    """In 4 bits without a base all of it is cut, but for scales of down's groups, which a cut may double."""
    config = layer_config(512, 1024, packed=True, base=False, experts=6)
    whole = expert_bytes(config)
    assert whole == config.expert_bytes == 6 * 3 * 512 * 1024 * (4 * 64 + 16) // (8 * 64)
    assert expert_bytes(config, 4) == whole // 4
    assert expert_bytes(config, 4, expert_parallel=True) == whole * 2 // 6  # 2, 2, 1 and 1


def test_what_ranks_repeat_of_low_rank_deltas_is_counted() -> None:
    config = layer_config(512, 1024, packed=False, base=False)
    repeated = 2 * 4 * 3 * 256 * 512  # V of gate and up, U of down, in all experts
    assert expert_bytes(config, 2) == (expert_bytes(config) - repeated) // 2 + repeated


@pytest.mark.parametrize(
    ("family", "config", "ranks", "whole", "problem"),
    [
        ("mixtral", MIXTRAL, 3, False, "32 attention heads"),
        ("mixtral", {**MIXTRAL, "num_attention_heads": 48}, 3, False, "32000 rows"),
        ("mixtral", {**MIXTRAL, "num_attention_heads": 48, "vocab_size": 192}, 3, False, "14336 intermediate"),
        ("mixtral", {**MIXTRAL, "num_key_value_heads": 12}, 8, False, "12 KV heads"),
        ("mixtral", MIXTRAL, 16, False, "8 slices"),
        ("mixtral", MIXTRAL, 16, True, "8 experts"),
        ("mixtral", MIXTRAL, 8, False, None),
        ("mixtral", MIXTRAL, 8, True, None),
    ],
)
def test_ranks_that_do_not_divide(
    family: str, config: dict[str, Any], ranks: int, whole: bool, problem: str | None
) -> None:
    found = parallel_problem(config, FAMILIES[family], 8, ranks, expert_parallel=whole)
    assert found is None if problem is None else problem in str(found)


# Activations


def allocated(config: CheckpointConfig, tokens: int) -> int:
    """The peak of what the reference backend allocates for a layer with static shapes, as torch's profiler sees it."""
    share = Share(config, 0, range(config.num_experts))
    parameters = share.empty_parameters(torch.bfloat16)
    spec = share.spec("off", activation="silu", prune_down=True, static_shapes=True)
    halves = ops.halves([parameters.get(name) for name in ops.PARAMETERS])
    x = torch.zeros(tokens, config.hidden_size, dtype=torch.bfloat16)
    gates, ids = torch.rand(tokens, 2), torch.randint(0, config.num_experts, (tokens, 2), dtype=torch.int32)
    # oneDNN copies matrices to the order that AMX wants, which is no GPU's way.
    with (
        torch.backends.mkldnn.flags(enabled=False),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found,
    ):
        reference.fused_experts(x, gates, ids, *halves, None, spec)
    held = most = 0
    for event in found.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


@pytest.mark.parametrize("base", [True, False])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("hidden", "channels"), [(128, 512), (512, 128)])
@pytest.mark.parametrize("tokens", [16, 512])
def test_a_layers_activations_are_at_most_what_is_counted(
    hidden: int, channels: int, packed: bool, base: bool, tokens: int
) -> None:
    """And hardly less than seven tenths of it. In 3 bits, whose opening takes most."""
    config = layer_config(hidden, channels, packed=packed, base=base, bits=3)
    shape = MoEShape(4, 2, hidden, channels, (0,))
    content = {"ratio": 0.5, "bits": 3 if packed else 16, "base": {"kind": "auto" if base else "none"}}
    counted = _experts(Resolved(10**9, max_num_batched_tokens=tokens), shape, Recipe.model_validate(content), tokens)
    assert 0.68 * counted < allocated(config, tokens) <= counted


def test_what_vllm_would_do_by_itself() -> None:
    """Tokens of a step and sizes of CUDA graphs by its defaults."""
    assert Serving(24 * 10**9).resolve(MIXTRAL).max_num_batched_tokens == 2048
    assert Serving(80 * 10**9).resolve(MIXTRAL).max_num_batched_tokens == 8192
    assert Serving(24 * 10**9, max_model_len=64, max_num_seqs=2).resolve(MIXTRAL).max_num_batched_tokens == 128
    assert Serving(10**9, max_num_seqs=6).resolve(MIXTRAL).captured() == [1, 2, 4, 8]
    sizes = Serving(10**9, max_num_seqs=1000).resolve(MIXTRAL).captured()
    assert sizes[:5] == [1, 2, 4, 8, 16]
    assert sizes[-3:] == [480, 496, 512]
    with pytest.raises(InputError, match=r"exceeds the model's 32768 positions; use --max-model-len 32768"):
        Serving(10**9, max_model_len=40000).resolve(MIXTRAL)


# Files


@given(source=st.integers(10**6, 10**12), share=st.floats(0.001, 0.999))
def test_a_ratio_of_files_is_never_too_low_and_told_in_six_digits(source: int, share: float) -> None:
    target = int(share * source)
    ratio = ratio_of(target, source)
    assert int((1 - ratio) * source) <= target
    assert (1 - ratio) * source > target - source / 10**6 - 1
    assert float(f"{ratio:.6f}") == ratio


@pytest.mark.parametrize("given_", ["4MB", "3.7MB", "4000000", "4096KiB"])
@pytest.mark.parametrize("bits", ["auto", "16"])
def test_files_are_at_most_as_large_as_asked(given_: str, bits: str) -> None:
    content, asked = plan("--size", given_, "--bits", bits), parse_size(given_) or 0
    assert 0.995 * asked < content["result"]["bytes"] <= asked
    assert plan("--ratio", content["recipe"]["ratio"], "--bits", bits)["result"] == content["result"]


@pytest.mark.parametrize("options", [(), ("--bits", "16"), ("--method", "moe-svd"), ("--method", "mobe")])
def test_files_that_are_too_small_are_refused_with_the_least(options: tuple[str, ...]) -> None:
    least = re.search(
        r"is less than this method can reach; choose --size (\S+) or more", refused("--size", "1MB", *options)
    )
    assert least is not None
    assert plan("--size", least[1], *options)["result"]["bytes"] <= (parse_size(least[1]) or 0)


def test_files_as_large_as_the_source_are_refused() -> None:
    assert "has already; choose a smaller one" in refused("--size", "9MB")
    assert "is no size; write it as 24GB" in refused("--size", "much")


def test_two_ways_to_say_how_small_are_refused() -> None:
    assert "--ratio and --size both say how small" in refused("--ratio", "0.4", "--size", "4MB")
    assert "--size and --fit both" in refused("--size", "4MB", *FIT)
    assert "--max-num-seqs says what --fit has to hold" in refused("--ratio", "0.4", "--max-num-seqs", "4")
    assert "--enable-expert-parallel says" in refused("--ratio", "0.4", "--enable-expert-parallel")
    assert "--size or --fit" in refused()
    assert "count bytes" in refused("--size", "4MB", "--accounting", "paper")


def test_the_command_line_wins_over_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("{ratio: 0.3, bits: 8}")
    content = plan("--size", "4MB", "--recipe", tmp_path / "recipe.yaml")
    assert content["recipe"]["bits"] == 8
    assert content["recipe"]["ratio"] > 0.5


# Devices


def test_the_arithmetic_adds_up_and_is_of_this_plan() -> None:
    content = plan(*FIT)
    fit = content["fit"]
    lines = {line["what"]: line["bytes"] for line in fit["lines"]}
    assert sum(lines[what] for what in list(lines)[:6]) == lines["room for experts"]
    assert lines["room for experts"] + lines["experts, compressed"] == lines["spare"] == fit["spare_bytes"]
    assert 0 <= fit["spare_bytes"] <= 0.01 * fit["weight_bytes"]["room"]
    assert lines["reserve"] == fit["usable_bytes"] - 21_500_000
    assert fit["usable_bytes"] == 0.92 * 21_500_000
    # Two requests of 256 tokens: 2 of 4 heads of 32 in each of 4 layers.
    assert fit["kv_cache_bytes"] == (1 + 2 * 16) * 16 * fit["kv_cache_bytes_per_token"]
    assert content["recipe"]["ratio"] == fit["ratio"]
    assert plan("--ratio", fit["ratio"])["result"] == content["result"]
    # On one device weights are the files, but for headers and the table of rotary embeddings.
    assert sum(fit["weight_bytes"][part] for part in ("others", "experts")) == pytest.approx(
        content["result"]["bytes"], rel=0.03
    )
    assert fit["unmeasured"] == ["activation_bytes", "cuda_graph_bytes"]


def test_more_of_anything_leaves_less_for_weights() -> None:
    usual = plan(*FIT)["fit"]
    for option, value in (
        ("--max-model-len", 512),
        ("--max-num-seqs", 3),
        ("--max-num-batched-tokens", 520),
        ("--gpu-memory-utilization", 0.91),
    ):
        assert plan(*changed(option, value))["fit"]["ratio"] > usual["ratio"]
    less = plan(*FIT, "--kv-cache-dtype", "fp8")["fit"]
    assert less["ratio"] < usual["ratio"]
    assert less["kv_cache_bytes"] == usual["kv_cache_bytes"] // 2


def test_neighbours_are_about_right() -> None:
    around = {one["what"]: one for one in plan(*FIT, "--bits", "16")["fit"]["around"]}
    assert around["--fit 16GB"]["verdict"] == "fits uncompressed"
    for what in ("--max-model-len 512", "--max-num-seqs 1", "--kv-cache-dtype fp8"):
        option, value = what.split()
        found = plan(*changed(option, value), "--bits", "16")["fit"]
        assert around[what]["ratio"] == pytest.approx(found["ratio"], abs=0.02)


def test_two_devices_hold_more() -> None:
    assert "is enough for" in refused(*FIT, "--tensor-parallel-size", "2")
    two = ("--tensor-parallel-size", "2")
    for size, options in (("16MB", two), ("18.3MB", (*two, "--enable-expert-parallel"))):
        smaller = changed("--fit", size)
        assert "does not suffice" in refused(*smaller)
        fit = plan(*smaller, *options)["fit"]
        assert fit["spare_bytes"] >= 0
        assert fit["weight_bytes"]["others"] < 0.6 * plan(*FIT)["fit"]["weight_bytes"]["others"]
        assert fit["serve"][6:] == list(options)


def test_a_device_that_is_too_small_is_refused_with_what_fits() -> None:
    asked = ("--max-model-len", "256", "--max-num-seqs", "2")
    line = refused("--fit", "10MB", *asked)
    assert "KV cache" in line
    least = re.search(r"use --fit (\S+)", line)
    assert least is not None
    assert plan("--fit", least[1].rstrip(","), *asked)["fit"]["spare_bytes"] >= 0
    longer = refused("--fit", "21.5MB", "--max-model-len", "512", "--max-num-seqs", "64")
    fewer = re.search(r"or --max-num-seqs (\d+)", longer)
    assert fewer is not None
    assert plan("--fit", "21.5MB", "--max-model-len", "512", "--max-num-seqs", fewer[1])["fit"]["spare_bytes"] >= 0


def test_a_device_that_holds_the_original_is_refused() -> None:
    assert "is enough for tiny-mixtral as it is" in refused("--fit", "24GB", "--max-model-len", "256")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--tensor-parallel-size", "3"), "does not divide 4 attention heads; use 1, 2 or 4"),
        (("--max-model-len", "4096"), "exceeds the model's 1024 positions"),
        (("--max-num-batched-tokens", "3"), "less than one for each of --max-num-seqs 4"),
        (("--gpu-memory-utilization", "1.5"), "is no share"),
    ],
)
def test_what_cannot_be_served_is_refused(options: tuple[str, ...], said: str) -> None:
    assert said in refused("--fit", "21.5MB", *options)


def test_a_plan_that_fits_needs_no_vllm() -> None:
    code = (
        f"import sys; sys.modules['vllm'] = None; from offline.cli import main; main(['plan', {str(TINY)!r}, *{FIT}])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "room for experts" in done.stdout
    assert "serve it with --max-model-len 256 --max-num-seqs 2" in done.stdout


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_every_family_can_be_fitted(tmp_path: Path, family: str) -> None:
    """Into a device between the least that a refusal names and one that holds the original."""
    source = write_family(tmp_path / family, family)
    if FAMILIES[family].attention is None:
        assert f"attention of {family} keeps of a token is not known here" in refused("--fit", "1MB", source=source)
        return
    asked = ("--max-model-len", "64", "--max-num-seqs", "1", "--bits", "16")
    line = refused("--fit", "1MB", *asked, source=source)
    least = re.search(r"use --fit (\S+)", line)
    assert least is not None
    fit = plan("--fit", least[1].rstrip(","), *asked, source=source)["fit"]
    assert fit["spare_bytes"] >= 0
    assert sum(fit["weight_bytes"][part] for part in ("others", "experts")) <= fit["weight_bytes"]["room"]


def test_what_is_compressed_fits_and_says_so(
    tmp_path: Path, texts: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ratio that plan tells is the one that the checkpoint's recipe has: a run that was begun with it goes on, and
    writes no part again."""
    planned = plan(*FIT, *SMALL)
    rest = (*SMALL, "--calibration", texts[0], "--json")
    with monkeypatch.context() as broken:
        broken.setattr("offline.run.compress.publish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            d2moe_here("compress", TINY, tmp_path / "out", "--ratio", planned["fit"]["ratio"], *rest)
    with monkeypatch.context() as done_already:
        done_already.setattr(WorkDir, "save_part", lambda *_: 1 / 0)
        done = d2moe_here("compress", TINY, tmp_path / "out", *FIT, *rest)
    assert done.returncode == 0, done.stderr
    content = json.loads(done.stdout)
    assert content["recipe"]["ratio"] == planned["recipe"]["ratio"] == planned["fit"]["ratio"]
    assert read_recipe(tmp_path / "out") == content["recipe"]
    assert content["fit"]["spare_bytes"] >= 0
    assert content["fit"]["weight_bytes"]["others"] == planned["fit"]["weight_bytes"]["others"]


@pytest.mark.slow
def test_files_that_are_compressed_are_at_most_as_large_as_asked(tmp_path: Path, texts: tuple[Path, Path]) -> None:
    done = d2moe_here("compress", TINY, tmp_path / "out", "--size", "4MB", *SMALL, "--calibration", texts[0])
    assert done.returncode == 0, done.stderr
    written = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert 3_960_000 < written <= 4_000_000
