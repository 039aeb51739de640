"""Features of the server that do not touch expert weights, each beside stock vLLM on the dense reconstruction."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from engine import PROMPTS, TWO_RANKS, assert_same, generate, run_engine
from safetensors.torch import load_file, save_file
from synthetic import write_dense

from d2moe_vllm.format.config import CheckpointConfig
from offline.compare.server import Server, ServerError

pytest.importorskip("vllm")

STOCK = {"VLLM_PLUGINS": ""}
EAGER = {"dtype": "float32", "enforce_eager": True}
LONG = " ".join(PROMPTS)
"""Several blocks of the KV cache."""


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    folder = tmp_path_factory.mktemp("features") / "dense"
    write_dense(checkpoint, folder, torch.float32)
    return folder


@pytest.mark.slow
def test_prefix_caching(tmp_path: Path, checkpoint: Path, dense: Path) -> None:
    """Requests with a common beginning, one after the other: the later ones find it computed."""
    job = {
        "prompts": [f"{LONG} {end}" for end in ("and so", "but not", "for all")],
        # A request for them would not use the cache.
        "sampling": {"prompt_logprobs": None},
    }
    llm = {**EAGER, "block_size": 32, "one_by_one": True}
    ours = generate(tmp_path / "ours", checkpoint, job=job, enable_prefix_caching=True, **llm)
    assert [result["cached_tokens"] > [0] for result in ours] == [False, True, True]
    assert_same(ours, generate(tmp_path / "stock", dense, STOCK, job=job, **llm))


@pytest.mark.slow
def test_chunked_prefill(tmp_path: Path, checkpoint: Path, dense: Path) -> None:
    """A prompt in pieces of 16 tokens, mixed with the decoding of others."""
    job = {"prompts": [LONG, *PROMPTS]}
    llm = {**EAGER, "enable_chunked_prefill": True, "max_num_batched_tokens": 16, "max_num_seqs": 4}
    ours = generate(tmp_path / "ours", checkpoint, job=job, **llm)
    assert len(ours[0]["prompt_ids"]) > 32
    assert_same(ours, generate(tmp_path / "stock", dense, STOCK, job=job, **EAGER))


def write_adapter(folder: Path, config: CheckpointConfig, seed: int = 0) -> None:
    """A LoRA adapter for attention in PEFT's form, strong enough to change what is generated."""
    hidden, rank = config.hidden_size, 8
    generator = torch.Generator().manual_seed(seed)
    sizes = {"q_proj": hidden, "k_proj": hidden // 2, "v_proj": hidden // 2, "o_proj": hidden}
    tensors = {}
    for layer in config.layers:
        for name, out in sizes.items():
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, hidden, generator=generator) * hidden**-0.5
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(out, rank, generator=generator) * rank**-0.5
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    content = {"peft_type": "LORA", "r": rank, "lora_alpha": 16, "target_modules": list(sizes), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(content))


def merge_adapter(dense: Path, adapter: Path) -> None:
    """W + alpha / r B A, into the dense checkpoint's own files."""
    factors = load_file(adapter / "adapter_model.safetensors")
    for file in dense.glob("*.safetensors"):
        tensors = load_file(file)
        for name in tensors:
            lora = "base_model.model." + name.removesuffix(".weight")
            if f"{lora}.lora_A.weight" in factors:
                tensors[name] += 2 * factors[f"{lora}.lora_B.weight"] @ factors[f"{lora}.lora_A.weight"]
        save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.slow
def test_lora_adapters_on_attention(tmp_path: Path, checkpoint: Path, dense: Path, config: CheckpointConfig) -> None:
    """Against the adapter merged into the dense weights: stock vLLM 0.32 has no LoRA for MoE models on CPUs."""
    write_adapter(tmp_path / "adapter", config)
    merge_adapter(shutil.copytree(dense, tmp_path / "merged"), tmp_path / "adapter")
    adapted = {"lora": str(tmp_path / "adapter")}
    llm = {**EAGER, "enable_lora": True, "lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    ours = generate(tmp_path / "ours", checkpoint, job=adapted, **llm)
    assert_same(ours, generate(tmp_path / "stock", tmp_path / "merged", STOCK, **EAGER))
    without = generate(tmp_path / "without", checkpoint, **llm)
    assert [result["ids"] for result in without] != [result["ids"] for result in ours]


@pytest.mark.slow
def test_compiled_tensor_parallel(tmp_path: Path, checkpoint: Path, dense: Path) -> None:
    ours = generate(tmp_path / "ours", checkpoint, TWO_RANKS, dtype="float32", tensor_parallel_size=2)
    assert_same(ours, generate(tmp_path / "stock", dense, STOCK, **EAGER))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("llm", "words"),
    [
        ({"enable_lora": True}, "d2moe experts take no LoRA; name other layers: --lora-target-modules q_proj"),
        ({"hf_overrides": {"quantization_config": {"quant_method": "d2moe"}}}, "--hf-overrides replaces it as a whole"),
        ({"model_impl": "transformers"}, "leave --model-impl transformers out"),
        ({"additional_config": {"d2moe": {"scope": "tokens"}}}, "scope 'tokens' is none of batch, token, off"),
    ],
)
def test_what_is_refused_by_the_engine_itself(tmp_path: Path, checkpoint: Path, llm: dict, words: str) -> None:
    code, log, _ = run_engine(tmp_path, checkpoint, {}, llm={**EAGER, **llm})
    assert code != 0
    assert words in log


@pytest.mark.slow
def test_data_parallel_is_refused_by_the_server(tmp_path: Path, checkpoint: Path) -> None:
    """At start-up, where stock vLLM on CPUs starts and then fails every request."""
    arguments = ["--data-parallel-size", "2", "--enforce-eager"]
    env = {**TWO_RANKS, "VLLM_CPU_KVCACHE_SPACE": "1"}
    with pytest.raises(ServerError), Server(checkpoint, arguments, log=tmp_path / "log", env=env):
        pass
    assert "vLLM's CPU backend does not serve with --data-parallel-size" in (tmp_path / "log").read_text()
