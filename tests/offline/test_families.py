"""Every family's small checkpoint, read and run layer by layer, against transformers' own model of it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import (
    CONFIGS,
    STACKABLE,
    change_config,
    quantize_fp8,
    stock_config,
    stock_model,
    write_exact,
    write_family,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.activations import ACT2FN

from d2moe_vllm.checkpoint import ROLES, CheckpointError, check_checkpoint
from d2moe_vllm.hf import MODEL_CLASSES, register_configs
from offline.errors import InputError
from offline.evaluation import open_evaluated
from offline.families import FAMILIES, find_family, read_shape
from offline.layerwise import LayerwiseModel, next_token_loss, read_hf_config
from offline.source import open_dense
from offline.statistics import DenseExperts
from offline.stored import SourceReader

TOKENS = torch.randint(0, 4096, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A family's float32 checkpoint as released models are laid out. Not to be changed."""
    folders: dict[str, Path] = {}

    def write(family: str) -> Path:
        if family not in folders:
            folders[family] = write_family(tmp_path_factory.mktemp(family) / family, family, dtype=torch.float32)
        return folders[family]

    return write


@torch.no_grad()
def logits(folder: Path) -> Tensor:
    """Of a dense or compressed checkpoint, layer by layer, as `d2moe eval` runs it."""
    evaluated = open_evaluated(str(folder))
    hidden = evaluated.model.embed(TOKENS)
    for number in range(evaluated.model.num_layers):
        layer = evaluated.model.load_layer(number, evaluated.experts(number))
        hidden = evaluated.model.run_layer(number, layer, hidden)
    return evaluated.model.logits(hidden)


def stock_experts(layer: Any, family: str) -> Any | None:
    path = FAMILIES[family].experts_module
    return dict(layer.named_modules()).get(path)


def stock_weight(experts: Any, expert: int, role: str) -> Tensor:
    if not hasattr(experts, "gate_up_proj"):
        return getattr(experts[expert], f"{role}_proj").weight
    if role == "down":
        return experts.down_proj[expert]
    return experts.gate_up_proj[expert].chunk(2)[0 if role == "gate" else 1]


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert float((found - expected).norm() / expected.norm()) < 1e-4


def test_every_family_is_tried() -> None:
    assert set(CONFIGS) == set(FAMILIES) == set(MODEL_CLASSES)


@pytest.mark.parametrize("family", CONFIGS)
@torch.no_grad()
def test_reads_and_runs_as_the_stock_model_does(family: str, released: Callable[[str], Path]) -> None:
    stock = stock_model(stock_config(family))
    model = open_dense(str(released(family)))
    layers = {number: stock_experts(layer, family) for number, layer in enumerate(stock.model.layers)}
    with_experts = [number for number, experts in layers.items() if experts is not None]
    assert model.num_layers == len(layers)
    assert list(model.shape.layers) == with_experts
    assert model.reader.parameters == len(torch.cat([tensor.flatten() for name, tensor in stock.state_dict().items()]))
    for layer in with_experts:
        for role in ROLES:
            for expert in range(model.shape.num_experts):
                weight = model.weight(layer, expert, role)
                assert weight.shape == model.shape.projection(role)
                assert torch.equal(weight, stock_weight(layers[layer], expert, role))
        with pytest.raises((IndexError, AttributeError)):
            stock_weight(layers[layer], model.shape.num_experts, "gate")
    assert_close(logits(model.folder), stock(TOKENS).logits)


@pytest.mark.parametrize("family", CONFIGS)
def test_gradients_are_the_stock_models(family: str, released: Callable[[str], Path]) -> None:
    """What Fisher information is made of: d loss / d input of the first layer, through every layer."""
    stock = stock_model(stock_config(family)).requires_grad_(False)
    embedded = stock.get_input_embeddings()(TOKENS).requires_grad_()
    (expected,) = torch.autograd.grad(next_token_loss(stock(inputs_embeds=embedded).logits, TOKENS), embedded)
    model = open_dense(str(released(family)))
    layerwise = LayerwiseModel(model.reader, model.family, read_hf_config(model.folder))
    hidden = first = layerwise.embed(TOKENS).requires_grad_()
    for number in range(layerwise.num_layers):
        experts = DenseExperts(model.weights(number), ACT2FN["silu"]) if number in model.shape.layers else None
        hidden = layerwise.run_layer(number, layerwise.load_layer(number, experts), hidden)
    (found,) = torch.autograd.grad(next_token_loss(layerwise.logits(hidden), TOKENS), first)
    # Granite scales its embeddings before the first layer.
    assert_close(found * getattr(stock.config, "embedding_multiplier", 1.0), expected)


@pytest.mark.parametrize("family", STACKABLE)
def test_stacked_experts_read_and_are_written_as_released(
    family: str, released: Callable[[str], Path], tmp_path: Path
) -> None:
    original = open_dense(str(released(family)))
    stacked = open_dense(str(write_family(tmp_path / "stacked", family, stacked=True, dtype=torch.float32)))
    assert set(stacked.reader.specs) != set(original.reader.specs)
    assert stacked.shape == original.shape
    assert stacked.other_tensors == original.other_tensors
    for layer in original.shape.layers:
        kept = original.kept_experts(layer)
        assert stacked.kept_experts(layer) == kept
        assert set(kept) <= set(original.reader.specs)
        for name in kept:
            assert torch.equal(stacked.other_tensor(name), original.reader.tensor(name))
            assert torch.equal(original.other_tensor(name), original.reader.tensor(name))
    for name, spec in original.other_tensors.items():
        assert torch.equal(stacked.other_tensor(name), original.other_tensor(name))
        assert stacked.other_tensor(name).shape == spec.shape
    assert_close(logits(stacked.folder), logits(original.folder))


def test_stacks_the_other_way_round(released: Callable[[str], Path], tmp_path: Path) -> None:
    """[experts, in, out], as some conversions write them."""
    original = open_dense(str(released("qwen3_moe")))
    folder = write_family(tmp_path / "stacked", "qwen3_moe", stacked=True, dtype=torch.float32)
    tensors = load_file(folder / "model.safetensors")
    flipped = {n: t.transpose(1, 2).contiguous() if ".experts." in n else t for n, t in tensors.items()}
    save_file(flipped, folder / "model.safetensors", {"format": "pt"})
    model = open_dense(str(folder))
    for role in ROLES:
        assert torch.equal(model.weight(1, 5, role), original.weight(1, 5, role))
    name = next(iter(model.kept_experts(1)))
    assert torch.equal(model.other_tensor(name), original.other_tensor(name))


@pytest.mark.parametrize("family", CONFIGS)
@torch.no_grad()
def test_compressed_without_loss_it_is_the_same_model(
    family: str, released: Callable[[str], Path], tmp_path: Path
) -> None:
    """In plain transformers, with nothing but the checkpoint's own code, and layer by layer; a layer stays dense."""
    source = released(family)
    dense = (open_dense(str(source)).shape.layers[-1],)
    folder = write_exact(tmp_path / "exact", source, dense)
    check_checkpoint(folder)
    expected = stock_model(stock_config(family))(TOKENS).logits
    loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    assert type(loaded).__module__.startswith("transformers_modules")
    assert loaded.config.model_type == family
    assert_close(loaded(TOKENS).logits, expected)
    assert_close(logits(folder), expected)


def test_the_plugins_configuration_of_deepseek_does_not_hide_the_checkpoints_class(
    released: Callable[[str], Path], tmp_path: Path
) -> None:
    """In a process where the plugin was loaded before."""
    folder = write_exact(tmp_path / "exact", released("deepseek"))
    register_configs()
    try:
        loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    finally:
        del CONFIG_MAPPING._extra_content["deepseek"]
    assert type(loaded).__name__ == "D2DeepseekForCausalLM"
    assert loaded.config.first_k_dense_replace == 1


@torch.no_grad()
def test_layers_that_predict_further_tokens_ride_along(released: Callable[[str], Path], tmp_path: Path) -> None:
    """DeepSeek-V3's MTP layer comes after the last decoder layer and has experts of its own."""
    folder = shutil.copytree(released("deepseek_v3"), tmp_path / "v3")
    change_config(folder, num_nextn_predict_layers=1)
    names = ("model.layers.3.mlp.experts.0.up_proj.weight", "model.layers.3.eh_proj.weight")
    extra = {name: torch.randn(48, 64) for name in names}
    save_file({**load_file(folder / "model.safetensors"), **extra}, folder / "model.safetensors", {"format": "pt"})
    model = open_dense(str(folder))
    assert model.shape.layers == (1, 2)
    exact = write_exact(tmp_path / "exact", folder)
    check_checkpoint(exact)
    for name, tensor in extra.items():
        assert torch.equal(SourceReader(exact).tensor(name), tensor)
    loaded = AutoModelForCausalLM.from_pretrained(exact, trust_remote_code=True, dtype=torch.float32)
    assert_close(loaded(TOKENS).logits, logits(model.folder))


def test_the_modeling_file_imports_the_family_that_is_asked_for_only() -> None:
    code = (
        "import sys\n"
        "from d2moe_vllm.hf.modeling_d2moe import D2Qwen3MoeForCausalLM\n"
        "loaded = [name for name in sys.modules if name.startswith('transformers.models.')]\n"
        "print([n for n in ('mixtral', 'granitemoe', 'deepseek_v3') if f'transformers.models.{n}' in loaded])\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@torch.no_grad()
def test_tied_embeddings(tmp_path: Path) -> None:
    """As the released Granite models have them."""
    source = write_family(tmp_path / "tied", "granitemoe", dtype=torch.float32, tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(source / "model.safetensors")
    expected = AutoModelForCausalLM.from_pretrained(source)(TOKENS).logits
    assert_close(logits(source), expected)
    loaded = AutoModelForCausalLM.from_pretrained(write_exact(tmp_path / "exact", source), trust_remote_code=True)
    assert_close(loaded(TOKENS).logits, expected)


@torch.no_grad()
def test_deepseek_v1_is_the_papers(tmp_path: Path) -> None:
    """Equations 9 to 11 of arXiv 2401.06066, each expert by itself, in float64."""
    for normalize in (False, True):
        config = stock_config("deepseek", norm_topk_prob=normalize)
        block = stock_model(config).model.layers[1].mlp.double()
        rows = torch.randn(7, config.hidden_size, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

        def ffn(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
            a = gate @ x
            return down @ (a / (1 + (-a).exp()) * (up @ x))

        shared, size = block.shared_experts, config.moe_intermediate_size
        for x, found in zip(rows, block(rows[None])[0], strict=True):
            scores = (block.gate.weight @ x).exp()
            scores = scores / scores.sum()
            chosen = scores.argsort(descending=True)[: config.num_experts_per_tok].tolist()
            total = scores[chosen].sum() if normalize else 1.0
            expected = torch.zeros_like(x)
            for n in range(config.n_shared_experts):
                part = slice(n * size, (n + 1) * size)
                gate, up, down = shared.gate_proj.weight[part], shared.up_proj.weight[part], shared.down_proj.weight
                expected += ffn(x, gate, up, down[:, part])
            for n in chosen:
                expert = block.experts[n]
                weights = (expert.gate_proj.weight, expert.up_proj.weight, expert.down_proj.weight)
                expected += scores[n] / total * ffn(x, *weights)
            # The gates go through float32.
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("family", "block"), [("deepseek_v3", 128), ("kimi_k2", 32)])
def test_fp8_is_dequantised_by_block(family: str, block: int, tmp_path: Path) -> None:
    folder = write_family(tmp_path / family, family)
    exact = open_dense(str(folder)).reader.parameters
    quantize_fp8(folder, block)
    raw = load_file(folder / "model.safetensors")
    model = open_dense(str(folder))
    assert model.dtype == "bfloat16"
    assert model.reader.parameters == exact
    assert not any("scale" in name for name in model.other_tensors)
    quantized = [name for name, tensor in raw.items() if tensor.dtype == torch.float8_e4m3fn]
    assert len(quantized) > 60
    for name in quantized:
        scale = raw[name.removesuffix("weight") + "weight_scale_inv"].double()
        row, column = (torch.arange(size) // block for size in raw[name].shape)
        expected = (raw[name].double() * scale[row][:, column]).bfloat16()
        assert torch.equal(model.reader.tensor(name), expected)
        if name in model.other_tensors:
            assert model.other_tensors[name].dtype == "BF16"
            assert torch.equal(model.other_tensor(name), expected)
    name = model.family.weight_name(2, 5, "down")
    assert torch.equal(model.weight(2, 5, "down"), model.reader.tensor(name))
    assert torch.equal(model.other_tensor(name), model.reader.tensor(name))
    assert logits(model.folder).isfinite().all()


def test_fp8_without_its_scales(tmp_path: Path) -> None:
    folder = write_family(tmp_path / "v3", "deepseek_v3")
    quantize_fp8(folder)
    tensors = load_file(folder / "model.safetensors")
    scale = "model.layers.1.mlp.experts.3.up_proj.weight_scale_inv"
    for damaged, problem in (
        ({n: t for n, t in tensors.items() if n != scale}, "no scales"),
        ({**tensors, scale: tensors[scale].repeat(1, 2)}, r"is \[1, 2\], expected \[1, 1\]"),
    ):
        save_file(damaged, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(CheckpointError, match=problem):
            open_dense(str(folder))
    save_file({**tensors, scale: tensors[scale] * float("nan")}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="NaN"):
        open_dense(str(folder)).weight(1, 3, "up")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    change_config(folder, quantization_config=None)
    with pytest.raises(CheckpointError, match="stored as F8_E4M3"):
        open_dense(str(folder))


@pytest.mark.parametrize(
    ("family", "changes", "problem"),
    [
        ("mixtral", {"hidden_act": "gelu"}, "hidden_act 'gelu'; vLLM serves mixtral with silu only"),
        ("mixtral", {"num_local_experts": 1}, "a single expert"),
        ("mixtral", {"num_local_experts": 10**9}, "positive number"),
        ("mixtral", {"num_local_experts": 999_999, "num_experts_per_tok": 2}, "no tensor"),
        ("mixtral", {"num_hidden_layers": 999_999}, "no tensor"),
        ("mixtral", {"model_type": "jetmoe"}, "supported families: deepseek, deepseek_v2"),
        ("mixtral", {"model_type": "gpt_oss"}, "biases"),
        ("mixtral", {"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ("mixtral", {"quantization_config": {"quant_method": "fp8"}}, "weight_block_size None"),
        ("phimoe", {"router_jitter_noise": 0.02}, "router_jitter_noise"),
        ("olmoe", {"norm_topk_prob": True}, "norm_topk_prob True"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv"),
        ("qwen2_moe", {"mlp_only_layers": [0, 1, 2]}, "nothing to compress"),
        ("qwen2_moe", {"mlp_only_layers": "all"}, "a list of layer numbers"),
        ("qwen2_moe", {"mlp_only_layers": []}, "no tensor model.layers.0.mlp.experts.0"),
        ("qwen2_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step"),
        ("deepseek", {"first_k_dense_replace": -1}, "first_k_dense_replace"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob"),
        ("deepseek_v3", {"scoring_func": None}, "scoring_func None; vLLM serves deepseek_v3 with sigmoid only"),
        ("deepseek_v3", {"n_group": 3}, "n_group 3 and topk_group 1 do not fit 8 experts"),
        ("deepseek_v3", {"topk_group": 4}, "do not fit"),
        ("deepseek_v3", {"first_k_dense_replace": 2}, "no tensor for model.layers.1.mlp.gate_proj.weight"),
    ],
)
def test_refusals(
    family: str, changes: dict[str, Any], problem: str, released: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / family
    folder.mkdir()
    for file in released(family).iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "config.json").unlink()
    (folder / "config.json").write_text((released(family) / "config.json").read_text())
    change_config(folder, **changes)
    with pytest.raises(InputError, match=problem) as error:
        open_dense(str(folder))
    assert "\n" not in str(error.value)


def test_a_key_that_says_which_layers_have_experts_must_not_be_left_to_defaults(tmp_path: Path) -> None:
    folder = write_family(tmp_path / "v3", "deepseek_v3", first_k_dense_replace=0)
    config = json.loads((folder / "config.json").read_text())
    del config["first_k_dense_replace"]  # transformers takes it for 3
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="leaves open whether layer 0 has experts"):
        open_dense(str(folder))


@pytest.mark.parametrize("stacked", [False, True])
def test_experts_with_biases_are_refused(stacked: bool, tmp_path: Path) -> None:
    folder = write_family(tmp_path / "m", "qwen2_moe", stacked=stacked)
    name = "model.layers.1.mlp.experts." + ("gate_up_proj_bias" if stacked else "3.gate_proj.bias")
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, name: torch.zeros(8)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=f"experts with biases \\({name}\\)"):
        open_dense(str(folder))


def test_attention_biases_and_shared_experts_are_not_the_experts(released: Callable[[str], Path]) -> None:
    others = open_dense(str(released("qwen2_moe"))).other_tensors
    assert "model.layers.0.self_attn.q_proj.bias" in others
    assert "model.layers.1.mlp.shared_expert.down_proj.weight" in others
    assert "model.layers.0.mlp.down_proj.weight" in others
    others = open_dense(str(released("deepseek_v3"))).other_tensors
    assert "model.layers.1.mlp.gate.e_score_correction_bias" in others
    assert "model.layers.1.mlp.shared_experts.gate_proj.weight" in others
    assert not any(".experts." in name for name in others)


@pytest.mark.parametrize("stacked", [False, True])
def test_a_nan_is_refused_where_it_is_read(stacked: bool, tmp_path: Path) -> None:
    folder = write_family(tmp_path / "m", "qwen3_moe", stacked=stacked)
    tensors = load_file(folder / "model.safetensors")
    if stacked:
        tensors["model.layers.1.mlp.experts.gate_up_proj"][3, 60, 7] = float("inf")
    else:
        tensors["model.layers.1.mlp.experts.3.up_proj.weight"][12, 7] = float("inf")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    model = open_dense(str(folder))
    model.weight(1, 3, "gate")
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        model.weight(1, 3, "up")


def test_the_released_sizes() -> None:
    """MoE layers and sizes of well-known models, from what their config.json says."""
    qwen = {
        "model_type": "qwen2_moe", "num_hidden_layers": 24, "num_experts": 60, "num_experts_per_tok": 4,
        "hidden_size": 2048, "moe_intermediate_size": 1408, "intermediate_size": 5632, "decoder_sparse_step": 2,
    }  # fmt: skip
    shape = read_shape(find_family(qwen), qwen)
    assert shape.layers == tuple(range(1, 24, 2))
    assert (shape.num_experts, shape.intermediate_size) == (60, 1408)
    deepseek = {
        "model_type": "deepseek_v3", "num_hidden_layers": 61, "n_routed_experts": 256, "num_experts_per_tok": 8,
        "hidden_size": 7168, "moe_intermediate_size": 2048, "intermediate_size": 18432, "first_k_dense_replace": 3,
        "scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1,
    }  # fmt: skip
    shape = read_shape(find_family(deepseek), deepseek)
    assert shape.layers == tuple(range(3, 61))
    assert shape.expert_parameters == 3 * 7168 * 2048
    v1 = {**deepseek, "model_type": "deepseek", "scoring_func": "softmax", "moe_layer_freq": 2}
    assert read_shape(find_family(v1), v1).layers == tuple(range(4, 61, 2))


def test_reading_a_configuration_runs_no_code_of_the_model(released: Callable[[str], Path], tmp_path: Path) -> None:
    for family in ("kimi_k2", "deepseek"):
        folder = tmp_path / family
        folder.mkdir()
        for file in released(family).iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        change_config(folder, auto_map={"AutoConfig": "configuration_theirs.Config"})
        (folder / "configuration_theirs.py").write_text("raise RuntimeError('run')\n")
        assert open_dense(str(folder)).shape.layers == (1, 2)
