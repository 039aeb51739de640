"""Originals as they are published, quantized: read to the bit as the packages that define the formats read them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compression import d2moe_here
from families import change_config, write_family
from hostile import refused
from published import Form, compressed_tensors, modelopt, publish
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from d2moe_vllm.format.config import CheckpointError
from d2moe_vllm.format.kinds import ROLES, TensorSpec
from offline.errors import InputError
from offline.source.dense import open_dense
from offline.source.quantized import find_quantized, read_schemes

INT, FLOAT = {"type": "int", "symmetric": True}, {"type": "float", "symmetric": True}
NVFP4 = {"num_bits": 4, "strategy": "tensor_group", "group_size": 16, "scale_dtype": torch.float8_e4m3fn}
MX = {"strategy": "group", "group_size": 32, "scale_dtype": torch.uint8}
FORMS: dict[str, Callable[[], Form]] = {
    "int4": lambda: compressed_tensors("pack-quantized", num_bits=4, strategy="group", group_size=32, **INT),
    "int4, zeros": lambda: compressed_tensors(
        "pack-quantized", num_bits=4, strategy="group", group_size=32, type="int", symmetric=False
    ),
    "int4, order": lambda: compressed_tensors(
        "pack-quantized", order=True, num_bits=4, strategy="group", group_size=16, **INT
    ),
    # Ten in 32 bits: the last of a row are filled up.
    "int3": lambda: compressed_tensors("pack-quantized", num_bits=3, strategy="group", group_size=32, **INT),
    "int8, rows": lambda: compressed_tensors("pack-quantized", num_bits=8, strategy="channel", **INT),
    "w8a8": lambda: compressed_tensors("int-quantized", num_bits=8, strategy="channel", **INT),
    "fp8, rows": lambda: compressed_tensors("float-quantized", num_bits=8, strategy="channel", **FLOAT),
    "fp8": lambda: compressed_tensors("float-quantized", num_bits=8, strategy="tensor", **FLOAT),
    "fp8, blocks": lambda: compressed_tensors(
        "float-quantized", num_bits=8, strategy="block", block_structure=[16, 32], **FLOAT
    ),
    "nvfp4": lambda: compressed_tensors("nvfp4-pack-quantized", **NVFP4, **FLOAT),
    "mxfp4": lambda: compressed_tensors("mxfp4-pack-quantized", num_bits=4, **MX, **FLOAT),
    "mxfp8": lambda: compressed_tensors("mxfp8-quantized", num_bits=8, **MX, **FLOAT),
    "ModelOpt's nvfp4": modelopt,
}


@pytest.mark.parametrize("name", FORMS)
def test_it_is_read_as_by_who_defined_it(name: str, tmp_path: Path) -> None:
    folder = write_family(tmp_path / "m", "mixtral")
    exact = open_dense(str(folder))
    before, plain = exact.reader.nbytes, load_file(folder / "model.safetensors")
    stands = publish(folder, FORMS[name]())
    model = open_dense(str(folder))
    assert model.dtype == "bfloat16"
    assert model.reader.specs == exact.reader.specs
    assert model.reader.nbytes < before
    assert len(stands) > 20
    for weight, expected in stands.items():
        assert torch.equal(model.reader.tensor(weight), expected.bfloat16()), weight
        error = (expected.float() - plain[weight].float()).norm() / plain[weight].float().norm()
        assert error < 0.25, (weight, error)
    for role in ROLES:
        weight = model.family.layouts[0].name(1, 3, role)
        assert torch.equal(model.weight(1, 3, role), stands[weight].bfloat16())
    assert model.stored_as in model.remarks[0]


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """gpt-oss as it is published, stacks in blocks of mxfp4; and each as transformers reads it, [experts, in, out]."""
    folder = write_family(tmp_path_factory.mktemp("published") / "gpt-oss", "gpt_oss")
    path, generator = folder / "model.safetensors", torch.Generator().manual_seed(0)
    tensors, stands = {}, {}
    for name, tensor in load_file(path).items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            tensors[name] = tensor
            continue
        experts, inputs, outputs = tensor.shape
        blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(119, 125, blocks.shape[:-1], generator=generator, dtype=torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        stands[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
    save_file(tensors, path, metadata={"format": "pt"})
    change_config(folder, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    return folder, stands


def test_stacks_of_blocks_are_read_as_by_transformers(gpt_oss: tuple[Path, dict[str, Tensor]]) -> None:
    folder, stands = gpt_oss
    model = open_dense(str(folder))
    assert model.stored_as == "mxfp4"
    for layer in model.shape.layers:
        gate_up, down = (stands[f"model.layers.{layer}.mlp.experts.{name}_proj"].mT for name in ("gate_up", "down"))
        for expert in range(model.shape.num_experts):
            expected = {"gate": gate_up[expert][::2], "up": gate_up[expert][1::2], "down": down[expert]}
            for role in ROLES:
                assert torch.equal(model.weight(layer, expert, role), expected[role])


def test_gpt_oss_through_every_command(
    gpt_oss: tuple[Path, dict[str, Tensor]], few_words: Path, tmp_path: Path
) -> None:
    """What comes of it is exported in the layout of transformers' own, without blocks."""
    source, out, dense = gpt_oss[0], tmp_path / "out", tmp_path / "dense"
    sizes = ("--windows", "4", "--seq-len", "32")
    for arguments in (
        ("compress", source, out, "--bits", "2", "--ratio", "0.12", *sizes, "--calibration", few_words),
        ("verify", out, "--source", source),
        ("export", out, dense),
        ("eval", dense, "--text", few_words, *sizes),
    ):
        done = d2moe_here(*arguments)
        assert done.returncode == 0, done.stderr
    exported = load_file(dense / "model-00001-of-00001.safetensors")
    assert {name: exported[name].shape for name in gpt_oss[1]} == {n: tensor.shape for n, tensor in gpt_oss[1].items()}
    for name, tensor in load_file(source / "model.safetensors").items():
        if name.endswith("down_proj_bias"):
            assert torch.equal(exported[name], tensor)


def test_blocks_of_another_number(gpt_oss: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    shutil.copytree(gpt_oss[0], tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    name = "model.layers.1.mlp.experts.down_proj_scales"
    tensors[name] = tensors[name][..., :1].contiguous()
    save_file(tensors, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"down_proj_scales is \[8, 64, 1\], expected \[8, 64, 3\]; download"):
        open_dense(str(tmp_path / "m"))


def test_through_every_command(few_words: Path, tmp_path: Path) -> None:
    """Kimi-K2-Thinking as it is published: its routed experts in groups of 4-bit integers, the rest in bfloat16."""
    source = write_family(tmp_path / "kimi", "kimi_k2", n_routed_experts=32)
    form = compressed_tensors("pack-quantized", num_bits=4, strategy="group", group_size=16, **INT)
    publish(source, form, only=".mlp.experts.")
    sizes = ("--windows", "4", "--seq-len", "32")
    for asked, why in (
        (("0.2", "--bits", "16"), "even at rank 1 the ratio is"),
        (("0.2", "--accounting", "paper"), "would not make the model smaller"),
    ):
        refused(d2moe_here("plan", source, *sizes, "--ratio", *asked), why, "4-bit integers are read as bfloat16")
    planned = json.loads(d2moe_here("plan", source, "--ratio", "0.1", *sizes, "--json").stdout)
    assert "the source's weights are 4-bit integers; they are read as bfloat16" in planned["notes"]
    assert planned["source"]["bytes"] == (source / "model.safetensors").stat().st_size
    assert planned["result"]["bytes"] <= 0.9 * planned["source"]["bytes"]
    out, dense = tmp_path / "out", tmp_path / "dense"
    for arguments in (
        ("compress", source, out, "--ratio", "0.1", *sizes, "--calibration", few_words),
        ("verify", out, "--source", source),
        ("export", out, dense),
        ("eval", dense, "--text", few_words, *sizes),
    ):
        done = d2moe_here(*arguments)
        assert done.returncode == 0, done.stderr
    assert "quantization_config" not in json.loads((dense / "config.json").read_text())
    assert open_dense(str(dense)).dtype == "bfloat16"


PACKED = "model.layers.1.block_sparse_moe.experts.2.w1.weight_"


def _without(tensors: dict[str, Tensor], part: str) -> None:
    del tensors[PACKED + part]


def _shorter(tensors: dict[str, Tensor], part: str) -> None:
    tensors[PACKED + part] = tensors[PACKED + part][:, :1].contiguous()


def _other_shape(tensors: dict[str, Tensor], part: str) -> None:
    tensors[PACKED + part] = tensors[PACKED + part] + 1


def _infinite(tensors: dict[str, Tensor], part: str) -> None:
    tensors[PACKED + part][3, 1] = float("inf")


def _wide(tensors: dict[str, Tensor], part: str) -> None:
    tensors[PACKED + part] = tensors[PACKED + part].double()


@pytest.mark.parametrize(
    ("damage", "part", "problem"),
    [
        (_without, "scale", "no scales"),
        (_without, "shape", "no .*weight_shape for a weight in 4-bit integers"),
        (_without, "packed", "no tensor"),
        (_shorter, "scale", r"too few for 64 columns"),
        (_shorter, "packed", r"weight_scale is \[96, 2\], expected \[96, 1\]"),
        (_other_shape, "shape", "by its own word"),
        (_infinite, "scale", "NaN or infinite"),
        (_wide, "scale", "stored as F64, expected F32 or BF16 or F16"),
    ],
)
def test_damaged(damage: Callable[[dict[str, Tensor], str], None], part: str, problem: str, tmp_path: Path) -> None:
    folder = write_family(tmp_path / "m", "mixtral")
    publish(folder, FORMS["int4"]())
    tensors = load_file(folder / "model.safetensors")
    damage(tensors, part)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises((CheckpointError, InputError), match=problem) as error:
        open_dense(str(folder)).weight(1, 2, "gate")
    assert "\n" not in str(error.value)


WEIGHTS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"quant_method": "awq"}, "quantized \\(awq\\)"),
        ("gptq", "quantized \\(gptq\\)"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "not two numbers"),
        ({"quant_method": "modelopt", "quant_algo": "MXFP8"}, "ModelOpt as MXFP8"),
        ({"quant_method": "compressed-tensors"}, "without config_groups"),
        ({"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24"),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "marlin-24",
                "config_groups": {"group_0": {"weights": WEIGHTS}},
            },
            "marlin-24, int of 4 bits by group",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "config_groups": {"group_0": {"weights": {**WEIGHTS, "group_size": 0}}},
            },
            "which is not read",
        ),
    ],
)
def test_what_is_not_read_is_refused(config: Any, problem: str, tmp_path: Path) -> None:
    folder = write_family(tmp_path / "m", "mixtral")
    change_config(folder, quantization_config=config)
    with pytest.raises(InputError, match=problem) as error:
        open_dense(str(folder))
    assert "\n" not in str(error.value)
    assert "original" in str(error.value) or "config.json" in str(error.value)


def test_two_sorts_of_integers_are_told_apart_or_refused(tmp_path: Path) -> None:
    """Some layers in 4 bits, others in 8; where no tensor tells which, neither is guessed."""
    folder = write_family(tmp_path / "m", "mixtral")
    four, eight = FORMS["int4"](), FORMS["int8, rows"]()

    def by_size(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        return (four if weight.shape[0] == 96 else eight).quantize(weight)

    both = {"group_0": four.config["config_groups"]["group_0"], "group_1": eight.config["config_groups"]["group_0"]}
    stands = publish(folder, Form(by_size, {**four.config, "config_groups": both}))
    model = open_dense(str(folder))
    for weight, expected in stands.items():
        assert torch.equal(model.reader.tensor(weight), expected.bfloat16())
    assert model.stored_as == "4-bit integers and 8-bit integers"
    # 8 numbers of 4 bits, 32 with a scale; or 4 of 8 bits, 16 with one: as many elements, as many scales.
    both["group_1"] = {"weights": {"num_bits": 8, "type": "int", "strategy": "group", "group_size": 16}}
    change_config(folder, quantization_config={**four.config, "config_groups": both})
    with pytest.raises(CheckpointError, match="may be 4-bit integers or 8-bit integers"):
        open_dense(str(folder))


def test_a_matrix_of_one_row_has_one_scale_either_way() -> None:
    """A shared expert's gate: one scale for each row, and one for the matrix, are the same."""
    specs = {"gate.weight": TensorSpec("F8_E4M3", (1, 64)), "gate.weight_scale": TensorSpec("F32", (1,))}
    (found,) = find_quantized(specs, read_schemes(Path("none"), {"quantization_config": {"quant_method": "fp8"}}))
    codes, scale = torch.randn(1, 64).to(torch.float8_e4m3fn), torch.tensor([0.5])
    read = {"gate.weight": codes, "gate.weight_scale": scale}
    assert torch.equal(found.dequantise(read.__getitem__, torch.bfloat16), (codes.float() / 2).bfloat16())


def test_what_modelopt_says_beside_config_json(tmp_path: Path) -> None:
    folder = write_family(tmp_path / "m", "mixtral")
    form = modelopt()
    stands = publish(folder, form)
    change_config(folder, quantization_config=None)
    said = {key: value for key, value in form.config.items() if key != "quant_method"}
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": said}))
    name = "model.layers.0.block_sparse_moe.experts.0.w2.weight"
    assert torch.equal(open_dense(str(folder)).weight(0, 0, "down"), stands[name])


def test_a_float16_original_stays_so(tmp_path: Path) -> None:
    folder = write_family(tmp_path / "m", "mixtral", dtype=torch.float16)
    stands = publish(folder, FORMS["w8a8"]())
    model = open_dense(str(folder))
    assert model.dtype == "float16"
    name = "model.layers.0.block_sparse_moe.experts.0.w2.weight"
    assert torch.equal(model.weight(0, 0, "down"), stands[name].to(torch.float16))
