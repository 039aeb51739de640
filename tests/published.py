"""Checkpoints as they are published: weights quantized, and read back, by the packages that define the formats.

compressed-tensors' own compressors, and vLLM's emulation of ModelOpt's NVFP4. None of it is ours.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from families import change_config
from safetensors.torch import load_file, save_file
from torch import Tensor

KEPT = ("embed_tokens", "lm_head", "gate.weight", "norm")
"""Of what a linear that is left as it is is called."""
FP4_LARGEST, FP8_LARGEST = 6.0, 448.0

Parts = dict[str, Tensor]


class Form(NamedTuple):
    """quantize: a weight -> its parts, by their names within the module, and what they stand for by the package that
    defines them; config: what config.json then says."""

    quantize: Callable[[Tensor], tuple[Parts, Tensor]]
    config: dict[str, Any]


def publish(folder: Path, form: Form, only: str = "") -> dict[str, Tensor]:
    """Stores a checkpoint's linears so, those that have `only` in their names. Returns what each of them stands for."""
    path = folder / "model.safetensors"
    tensors: Parts = {}
    stands: Parts = {}
    for name, tensor in load_file(path).items():
        if tensor.dim() != 2 or any(part in name for part in KEPT) or only not in name:
            tensors[name] = tensor
            continue
        parts, stands[name] = form.quantize(tensor)
        tensors |= {name.removesuffix("weight") + part: value.contiguous() for part, value in parts.items()}
    save_file(tensors, path, metadata={"format": "pt"})
    change_config(folder, quantization_config=form.config)
    return stands


def compressed_tensors(form: str, order: bool = False, **weights: Any) -> Form:
    """order: columns' groups in an order of their own, as rounding with feedback leaves them."""
    arguments = QuantizationArgs(**weights, **({"actorder": "group"} if order else {}))
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments, format=form)
    compressor = BaseCompressor.get_value_from_registry(form)

    def quantize(weight: Tensor) -> tuple[Parts, Tensor]:
        rows, columns = weight.shape
        state: Parts = {"weight": weight.float()}
        ordered = weight.float()
        if order:
            assert arguments.group_size
            state["weight_g_idx"] = torch.randperm(columns).int() % (columns // arguments.group_size)
            ordered = ordered[:, state["weight_g_idx"].argsort(stable=True)]
        strategy = str(arguments.strategy)
        if strategy == "tensor":
            blocks = ordered.reshape(1, 1, -1)
        elif strategy == "channel":
            blocks = ordered.reshape(rows, 1, -1)
        elif strategy == "block":
            assert arguments.block_structure
            high, wide = arguments.block_structure
            blocks = ordered.reshape(rows // high, high, columns // wide, wide).transpose(1, 2)
            blocks = blocks.reshape(rows // high, columns // wide, -1)
        else:
            blocks = ordered.reshape(rows, -1, arguments.group_size)
        second = None
        if form == "nvfp4-pack-quantized":
            second = (FP8_LARGEST * FP4_LARGEST / weight.float().abs().max()).reshape(1)
            state["weight_global_scale"] = second
        scale, zero = calculate_qparams(blocks.amin(-1), blocks.amax(-1), arguments, second)
        state["weight_scale"] = scale if form.startswith(("mx", "nv")) else scale.to(weight.dtype)
        if not arguments.symmetric:
            state["weight_zero_point"] = zero.round().to(torch.int8)
        if strategy == "tensor":
            state["weight_scale"] = state["weight_scale"].reshape(1)
        parts = compressor.compress(state, scheme)
        stands = compressor.decompress(dict(parts), scheme)["weight"]
        return parts, stands

    described = scheme.model_dump(mode="json", exclude_none=True)
    return Form(
        quantize, {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": described}}
    )


def modelopt() -> Form:
    """NVFP4 as ModelOpt writes it."""
    from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import dequantize_to_dtype

    def quantize(weight: Tensor) -> tuple[Parts, Tensor]:
        wide = weight.float()
        second = wide.abs().max() / (FP4_LARGEST * FP8_LARGEST)
        blocks = wide.reshape(len(wide), -1, 16)
        scale = (blocks.abs().amax(-1) / FP4_LARGEST / second).to(torch.float8_e4m3fn)
        steps = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
        scaled = blocks / (scale.float() * second)[..., None]
        codes = (scaled.abs()[..., None] - steps).abs().argmin(-1) + 8 * (scaled < 0)
        codes = codes.reshape(len(wide), -1, 2).to(torch.uint8)
        packed = codes[..., 0] | (codes[..., 1] << 4)
        parts = {"weight": packed, "weight_scale": scale, "weight_scale_2": second, "input_scale": torch.ones(())}
        return parts, dequantize_to_dtype(packed, scale, second, torch.bfloat16, 16, swizzle=False)

    config = {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head"]}
    return Form(quantize, config)
