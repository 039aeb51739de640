"""Original checkpoints read in every layout and number format, and what is refused instead."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import change_config, quantize_fp8, write_family
from safetensors.torch import load_file, save_file

from d2moe_vllm.format.config import CheckpointError
from d2moe_vllm.format.kinds import ROLES
from offline.errors import InputError
from offline.source.dense import open_dense
from offline.source.families import FAMILIES, find_family, moe_layers, read_shape


def test_stacks_the_other_way_round(tmp_path: Path) -> None:
    """[experts, in, out], as some conversions write them."""
    original = open_dense(str(write_family(tmp_path / "released", "qwen3_moe", dtype=torch.float32)))
    folder = write_family(tmp_path / "stacked", "qwen3_moe", stacked=True, dtype=torch.float32)
    tensors = load_file(folder / "model.safetensors")
    flipped = {n: t.transpose(1, 2).contiguous() if ".experts." in n else t for n, t in tensors.items()}
    save_file(flipped, folder / "model.safetensors", {"format": "pt"})
    model = open_dense(str(folder))
    for role in ROLES:
        assert torch.equal(model.weight(1, 5, role), original.weight(1, 5, role))
    name = next(iter(model.kept_experts(1)))
    assert torch.equal(model.other_tensor(name), original.other_tensor(name))


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
    name = model.family.layouts[0].name(2, 5, "down")
    assert torch.equal(model.weight(2, 5, "down"), model.reader.tensor(name))
    assert torch.equal(model.other_tensor(name), model.reader.tensor(name))


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
        ("mixtral", {"num_local_experts": [4, 3]}, r"num_local_experts is \[4, 3\]: layers with experts of different"),
        ("mixtral", {"model_type": "jetmoe"}, "supported families: afmoe, deepseek, deepseek_v2"),
        ("mixtral", {"model_type": "cohere2_moe"}, "windows"),
        ("mixtral", {"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ("phimoe", {"router_jitter_noise": 0.02}, "router_jitter_noise"),
        ("olmoe", {"norm_topk_prob": True}, "norm_topk_prob True"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv"),
        ("qwen2_moe", {"mlp_only_layers": [0, 1, 2]}, "nothing to compress"),
        ("qwen2_moe", {"mlp_only_layers": "all"}, "a list of layer numbers"),
        ("qwen2_moe", {"mlp_only_layers": []}, "no tensor model.layers.0.mlp.experts.0"),
        ("qwen2_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step"),
        ("granitemoehybrid", {"num_local_experts": 0}, "num_local_experts is 0"),
        ("deepseek", {"first_k_dense_replace": -1}, "first_k_dense_replace"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob"),
        ("deepseek_v3", {"scoring_func": None}, "scoring_func None; vLLM serves deepseek_v3 with sigmoid only"),
        ("deepseek_v3", {"n_group": 3}, "n_group 3 and topk_group 1 do not fit 8 experts"),
        ("deepseek_v3", {"topk_group": 4}, "do not fit"),
        ("deepseek_v3", {"first_k_dense_replace": 2}, "no tensor for model.layers.1.mlp.gate_proj.weight"),
    ],
)
def test_refusals(family: str, changes: dict[str, Any], problem: str, tmp_path: Path) -> None:
    folder = write_family(tmp_path / family, family)
    change_config(folder, **changes)
    with pytest.raises(InputError, match=problem) as error:
        open_dense(str(folder))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("said", [8, 7])
def test_layers_with_experts_of_different_numbers_are_refused(said: int, stacked: bool, tmp_path: Path) -> None:
    """As pruning layer by layer leaves them, whichever of the numbers config.json says; a hole is something missing."""
    folder = write_family(tmp_path / "m", "qwen2_moe", stacked=stacked)
    tensors = load_file(folder / "model.safetensors")
    last = "model.layers.2.mlp.experts."
    pruned = {name: tensor[:7].contiguous() if name.startswith(last) and stacked else tensor
              for name, tensor in tensors.items() if not name.startswith(f"{last}7.")}  # fmt: skip
    save_file(pruned, folder / "model.safetensors", {"format": "pt"})
    change_config(folder, num_experts=said)
    with pytest.raises(InputError, match="layer 2 has 7 experts and layer 1 8: layers with experts of different numb"):
        open_dense(str(folder))
    if not stacked:
        save_file({name: tensor for name, tensor in tensors.items() if f"{last}3." not in name},
                  folder / "model.safetensors", {"format": "pt"})  # fmt: skip
        change_config(folder, num_experts=8)
        with pytest.raises(InputError, match=r"the source has no tensor model\.layers\.2\.mlp\.experts\.3"):
            open_dense(str(folder))


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
    v1 = {**deepseek, "model_type": "deepseek", "scoring_func": "softmax", "topk_method": "greedy", "moe_layer_freq": 2}
    assert read_shape(find_family(v1), v1).layers == tuple(range(4, 61, 2))


def test_layers_with_experts_may_be_told_one_by_one() -> None:
    assert moe_layers(FAMILIES["mimo_v2_flash"], {"moe_layer_freq": [0, 1, 1]}, 3) == (1, 2)
    for family, listed in (("mimo_v2_flash", [0, 1]), ("mimo_v2_flash", [0, 1, 2]), ("deepseek", [0, 1, 1])):
        with pytest.raises(InputError, match="moe_layer_freq"):
            moe_layers(FAMILIES[family], {"moe_layer_freq": listed}, 3)


@pytest.mark.parametrize("family", ["kimi_k2", "deepseek"])
def test_reading_a_configuration_runs_no_code_of_the_model(family: str, tmp_path: Path) -> None:
    folder = write_family(tmp_path / family, family)
    change_config(folder, auto_map={"AutoConfig": "configuration_theirs.Config"})
    (folder / "configuration_theirs.py").write_text("raise RuntimeError('run')\n")
    assert open_dense(str(folder)).shape.layers == (1, 2)
