"""Small random checkpoints of every family, made with the stock classes: what the tests compress and serve.

Served with enforce_eager, MLA models need `compilation_config={"custom_ops": ["none"]}` too: vLLM 0.32's own rotary
kernel for CPUs misreads their strides.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from small_families import COMMON, SMALL
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer, TokenizersBackend

import d2moe_vllm.hf  # noqa: F401 - registers
from d2moe_vllm.families import (
    MODELING_FILE,
    auto_map,
    checkpoint_modeling_source,
    stock_config_class,
    stock_model_class,
)
from d2moe_vllm.format.config import CheckpointConfig, Layer, Manifest, Projection, Source, swiglu_of
from offline.io.shards import plan_shards, write_shards
from offline.source.dense import open_dense
from offline.source.families import FAMILIES
from offline.source.family import OUTSIDE

TOKENIZER = Path(__file__).parent.parent / "examples" / "tiny-mixtral"
CONFIGS = {name: small.config for name, small in SMALL.items()}
STACKABLE = sorted(set(CONFIGS) - {"deepseek", "gemma4", "gpt_oss", "llama4", "llama4_text"})
"""Families of which transformers writes two forms: the released one, and another."""


def stock_name(family: str) -> str:
    """transformers' model_type."""
    return FAMILIES[family].stock or family


def stock_config(family: str, **changes: Any) -> Any:
    """transformers' configuration of the small model; `changes` go over CONFIGS, and over what is outside of it."""
    outside = copy.deepcopy(dict(SMALL[family].outside))
    outside |= {key: changes.pop(key) for key in outside if key in changes}
    settings = {**COMMON, **CONFIGS[family], **changes}
    if outside:
        settings = {"tie_word_embeddings": False, **outside, "text_config": settings}
    return stock_config_class(stock_name(family))(**settings)


def load_stock(folder: Path, **options: Any) -> Any:
    """By the class that transformers has for the whole of a model."""
    nested = "text_config" in json.loads((folder / "config.json").read_text())
    return (AutoModelForImageTextToText if nested else AutoModelForCausalLM).from_pretrained(folder, **options)


def stock_model(config: Any, seed: int = 0) -> Any:
    """The stock class with random weights in float32, all of them, biases, norms and buffers included."""
    model = stock_model_class(config)._from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("gate_up_proj_bias"):
                tensor.copy_(4 * noise)  # some of what gate and up give is clamped
            elif name.endswith("A_log"):
                tensor.copy_(0.1 * noise)  # decays of Mamba's states
            elif tensor.dim() > 1:
                # Routers apart enough that rounding does not change where a token goes.
                router = name.endswith(("gate.weight", "router.weight", "router.proj.weight"))
                tensor.copy_(noise * (0.5 if router else tensor.shape[-1] ** -0.5))
            elif name == "lm_head.bias":
                tensor.zero_()  # of Phi-3.5-MoE, loaded by vLLM 0.32 and then left out of its logits
            else:
                about_one = ("norm" in name and name.endswith("weight")) or name.endswith(("scale", "layer_scalar"))
                tensor.copy_(0.1 * noise + (1 if about_one else 0))
    return model


def write_family(
    folder: Path, family: str, *, stacked: bool = False, dtype: torch.dtype = torch.bfloat16, **changes: Any
) -> Path:
    """Writes the family's small checkpoint with a tokenizer; stacked: in the other form that transformers can write, of
    most families its modules' own stacks."""
    model = stock_model(stock_config(family, **changes)).to(dtype)
    model.save_pretrained(folder, save_original_format=stacked == SMALL[family].stacked)
    if SMALL[family].transposed and not stacked:
        tensors = load_file(folder / "model.safetensors")
        stacks = {name: tensor.mT.contiguous() for name, tensor in tensors.items() if ".experts." in name}
        save_file({**tensors, **stacks}, folder / "model.safetensors", metadata={"format": "pt"})
    change_config(folder, **SMALL[family].written)
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """The bundled model's, as transformers has it of the family: some it reads in a way of its own, whatever files
    say."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(TOKENIZER / name, folder / name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if type(tokenizer) is not TokenizersBackend:
        tokenizer.save_pretrained(folder)


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(changed(json.loads(path.read_text()), changes), indent=1))


def changed(config: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json with other settings, of a multimodal model within its text_config where they belong there."""
    if "text_config" not in config:
        return {**config, **changes}
    outside = {key: value for key, value in changes.items() if key in (*OUTSIDE, "quantization_config")}
    inside = {key: value for key, value in changes.items() if key not in outside}
    inside |= inside.pop("text_config", {})  # what would be said outside, were it not for this
    return {**config, **outside, "text_config": {**config["text_config"], **inside}}


def quantize_fp8(folder: Path, block: int = 128) -> None:
    """Stores the linears of a checkpoint as DeepSeek-V3 does: float8_e4m3fn with a scale per block."""
    path = folder / "model.safetensors"
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(path).items():
        kept = ("embed_tokens", "lm_head", "mlp.gate.", "norm")
        if tensor.dim() != 2 or any(part in name for part in kept):
            tensors[name] = tensor
            continue
        rows, columns = tensor.shape
        scale = torch.zeros(-(-rows // block), -(-columns // block))
        quantized = torch.zeros(rows, columns)
        for i in range(scale.shape[0]):
            for j in range(scale.shape[1]):
                where = (slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block))
                scale[i, j] = tensor[where].float().abs().max() / 448
                quantized[where] = tensor[where].float() / scale[i, j]
        tensors[name] = quantized.to(torch.float8_e4m3fn)
        tensors[name.removesuffix("weight") + "weight_scale_inv"] = scale
    save_file(tensors, path, metadata={"format": "pt"})
    change_config(
        folder,
        quantization_config={
            "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [block, block],
        },
    )  # fmt: skip


def write_exact(folder: Path, source: Path, dense: Sequence[int] = ()) -> Path:
    """Writes a compressed checkpoint without loss: no base, deltas of full rank, one factor the identity.

    dense: MoE layers that keep their experts.
    """
    model = open_dense(str(source))
    shape, family = model.shape, model.family
    projections = {
        role: Projection(rank=min(shape.projection(role)), kept_columns=0, used_columns=0, bias=shape.biased)
        for role in shape.roles
    }
    config = CheckpointConfig(
        family=family.model_type, family_row=family.row, experts=family.experts, projections=dict(family.projections),
        num_experts=shape.num_experts, hidden_size=shape.hidden_size, intermediate_size=shape.intermediate_size,
        dtype=model.dtype, swiglu=swiglu_of(family.swiglu),
        layers={layer: Layer(**projections) for layer in shape.layers if layer not in dense},
        source=Source(name=source.name, parameters=model.reader.parameters, bytes=model.reader.nbytes),
    )  # fmt: skip
    others = dict(model.other_tensors)
    for layer in dense:
        others |= model.kept_experts(layer)

    def produce(name: str) -> Tensor:
        if name in others:
            return model.other_tensor(name)
        *_, expert, projection, kind = name.split(".")
        layer = family.layer_of(name)
        assert layer is not None
        role = next(role for role in shape.roles if family.projections[role] == projection)
        if kind == "bias":
            return model.bias(layer, int(expert), role)
        weight = model.weight(layer, int(expert), role)
        identity = torch.eye(min(weight.shape), dtype=weight.dtype)
        wide = weight.shape[0] < weight.shape[1]
        return (
            {"delta_u": identity, "delta_v": weight}[kind] if wide else {"delta_u": weight, "delta_v": identity}[kind]
        )

    folder.mkdir(parents=True)
    files = write_shards(folder, plan_shards({**others, **config.expert_tensors()}), produce)
    stored = {name: (spec.dtype, spec.shape) for name, spec in others.items()}
    (folder / "d2moe_manifest.json").write_text(Manifest(other_tensors=stored, files=files).model_dump_json())
    content = {**model.config, "auto_map": auto_map(family.model_type), "quantization_config": config.model_dump()}
    (folder / "config.json").write_text(json.dumps(content))
    (folder / MODELING_FILE).write_text(checkpoint_modeling_source())
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(source / name, folder / name)
    return folder
