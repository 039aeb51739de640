"""Why a tensor is not there, and what mends it."""

from __future__ import annotations

from collections.abc import Mapping

from offline.io.shards import Reader

QUANTIZED: Mapping[str, str] = {
    "quantize_config.json": "GPTQ", "quant_config.json": "AWQ", "hf_quant_config.json": "ModelOpt",
}  # fmt: skip
"""Files that lie beside quantized weights -> what they are quantized by."""
PACKED = (".qweight", ".qzeros", ".weight_packed", ".weight.absmax", ".weight.quant_map", ".SCB", ".weight_scale")
"""How the tensors of a quantized weight end, as GPTQ, AWQ, compressed-tensors, bitsandbytes and others write them."""


def remedy(reader: Reader, name: str) -> str:
    """What to do where `name` is not among a checkpoint's tensors."""
    if packed := next((one for one in reader.specs if one.endswith(PACKED)), None):
        method = next((how for file, how in QUANTIZED.items() if (reader.folder / file).exists()), None)
        by = f" by {method}" if method else ""
        return f"it is already quantized{by} ({packed}); give the original model"
    if longer := next((one for one in reader.specs if one.endswith(f".{name}")), None):
        prefix = longer.removesuffix(name)
        return f"its names begin with {prefix!r} ({longer}); take that away, and save the model again"
    if name.startswith("model.") and (shorter := name.removeprefix("model.")) in reader.specs:
        return f"its names lack the 'model.' in front ({shorter}); save the model with its head again"
    return "download the model again"
