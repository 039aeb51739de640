"""`d2moe export`: a dense checkpoint of the original architecture, which needs nothing of ours to load."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from d2moe_vllm.format.config import CheckpointConfig, CheckpointError
from d2moe_vllm.format.files import check_checkpoint, read_manifest
from d2moe_vllm.format.kinds import DTYPES, Role, TensorSpec
from offline.checkpoint.card import source_metadata
from offline.checkpoint.inspect import count_parameters, read_statistics
from offline.checkpoint.reconstruction import Reconstruction
from offline.io.folders import check_new_folder, check_space, new_folder
from offline.io.progress import Steps
from offline.io.shards import TORCH_DTYPES, Reader, plan_shards, write_file, write_shards
from offline.methods import find_method
from offline.source.dense import open_dense, read_model_config
from offline.source.families import family_of, known, read_shape
from offline.source.folder import find_companions, is_repository
from offline.source.stored import expert_tensors

CARD = """---
{metadata}---

# {name}, exported from a d2moe checkpoint

This is **not** a compressed model: it is as large as the original. `d2moe export` rebuilt every expert's dense weight,
rounded to {dtype}, from a checkpoint that {method} had compressed to {bytes:,} bytes.
It loads in transformers and vLLM without any plugin and computes what the compressed checkpoint computes, so it has the
compressed model's quality and the original's size. All but the experts is the original's.

| | original | compressed | this export |
|---|---|---|---|
| parameters | {source.parameters:,} | {compressed_parameters:,} | {parameters:,} |
"""


def export(folder: Path, out: Path, steps: Callable[[float], Steps]) -> dict[str, Any]:
    """Write the dense checkpoint that the compressed one in `folder` stands for into the new folder `out`.

    One tensor in memory at a time; `out` appears when it is whole. Returns what was written, for printing.
    Raises InputError where `out` exists, the disk is too small or the method is unknown, CheckpointError for a damaged
    checkpoint.
    """
    out = out.expanduser().absolute()
    check_new_folder(out)
    config = check_checkpoint(folder)
    find_method(config.method)
    reader = Reader(folder)
    original = _original_config(folder)
    family = family_of(config)
    stored = DTYPES[config.dtype]
    dtype = TORCH_DTYPES[stored]
    experts = dict(expert_tensors(read_shape(family, original), family.layouts[0], config.layers))
    specs = {name: reader.specs[name] for name in read_manifest(folder).other_tensors}
    specs |= {name: TensorSpec(stored, tensor.shape) for name, tensor in experts.items()}
    shards = plan_shards(specs)
    nbytes = sum(shard.nbytes for shard in shards)
    check_space(out.parent, nbytes)
    rebuilt = Reconstruction(reader, config)

    def rounded(layer: int, expert: int, role: Role) -> Tensor:
        """Summed in float32 and rounded once. Raises CheckpointError where that overflows."""
        weight = rebuilt.weight(layer, expert, role).to(dtype)
        if not torch.isfinite(weight).all():
            raise CheckpointError(f"layer {layer}, expert {expert}, {role}: the rebuilt weight is beyond {stored}")
        return weight

    with new_folder(out) as target, steps(nbytes) as progress:

        def produce(name: str) -> Tensor:
            progress.advance(specs[name].nbytes)
            return experts[name].assemble(rounded, rebuilt.bias, dtype) if name in experts else reader.tensor(name)

        progress.label("writing the checkpoint")

        write_shards(target, shards, produce)
        write_file(target / "config.json", json.dumps(original, indent=2, ensure_ascii=False) + "\n")
        parameters = sum(spec.numel for spec in specs.values())
        write_file(target / "README.md", _card(folder, config, reader, parameters))
        find_companions(folder, reader.files).copy(folder, target)
        with known(family):
            open_dense(str(target))  # whole and loadable, or it is not published
    return {
        "path": str(out),
        "source": config.source.model_dump(),
        "parameters": parameters,
        "bytes": nbytes,
        "files": len(shards),
        "compressed_bytes": reader.nbytes,
    }


def _original_config(folder: Path) -> dict[str, Any]:
    """config.json without what compression added; the source's own auto_map, which it had to replace, is put back."""
    content = read_model_config(folder)
    del content["quantization_config"]
    content.pop("auto_map", None)
    if original := read_statistics(folder).get("source_auto_map"):
        content["auto_map"] = original
    return content


def _card(folder: Path, config: CheckpointConfig, reader: Reader, parameters: int) -> str:
    metadata: dict[str, object] = {
        **({"base_model": config.source.name} if is_repository(config.source.name) else {}),
        "library_name": "transformers",
        "pipeline_tag": family_of(config).pipeline,
        "tags": ["d2moe", "moe"],
    }
    metadata |= {
        key: value for key, value in source_metadata(folder).items() if key.startswith("licen") or key == "language"
    }
    return CARD.format(
        metadata=yaml.safe_dump(metadata, sort_keys=False),
        name=config.source.name,
        method=find_method(config.method).title,
        source=config.source,
        dtype=config.dtype,
        bytes=reader.nbytes,
        compressed_parameters=count_parameters(reader, config),
        parameters=parameters,
    )
