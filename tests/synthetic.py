"""Small d2moe checkpoints for tests, written without offline/: an independent reading of the format.

Made from the bundled model: base = mean of the experts' columns of largest norm, deltas = truncated SVD.
Not a good compression, but one whose text stays text, with every feature of the format in it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from d2moe_vllm.hf import MODELING_FILE, auto_map, checkpoint_modeling_source

SOURCE = Path(__file__).parent.parent / "examples" / "tiny-mixtral"
NAMES = {"gate": "w1", "up": "w3", "down": "w2"}
PREFIX = "model.layers.{layer}.block_sparse_moe.experts"


@dataclass
class Synthetic:
    """What to write: per role rank, kept and used columns; the layers in `dense` keep their experts."""

    rank: dict[str, int] = field(default_factory=lambda: {"gate": 24, "up": 16, "down": 32})
    kept: dict[str, int] = field(default_factory=lambda: {"gate": 96, "up": 96, "down": 192})
    used: dict[str, int] = field(default_factory=lambda: {"gate": 64, "up": 64, "down": 128})
    scope: str = "off"
    groups: int = 8
    dtype: torch.dtype = torch.bfloat16
    dense: tuple[int, ...] = ()


def write_checkpoint(folder: Path, what: Synthetic | None = None) -> dict[str, Tensor]:
    """Writes a compressed checkpoint in two shards; returns its expert tensors by name."""
    what = what or Synthetic()
    folder.mkdir(parents=True)
    source = load_file(SOURCE / "model.safetensors")
    config = json.loads((SOURCE / "config.json").read_text())
    others = {name: tensor.to(what.dtype) for name, tensor in source.items() if not _compressed(name, what)}
    experts: dict[str, Tensor] = {}
    for layer in range(config["num_hidden_layers"]):
        if layer not in what.dense:
            for role in NAMES:
                experts.update(_factor(source, config["num_local_experts"], layer, role, what))
    config |= {
        "dtype": str(what.dtype).removeprefix("torch."),
        "auto_map": auto_map("mixtral"),
        "quantization_config": _quantization_config(config, what),
    }
    _write(folder, config, others, experts)
    return experts


def write_dense(checkpoint: Path, folder: Path, dtype: torch.dtype) -> None:
    """Writes the dense model that a compressed checkpoint (scope off) stands for, computed in float64."""
    folder.mkdir(parents=True)
    tensors: dict[str, Tensor] = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        tensors |= load_file(file)
    config = json.loads((checkpoint / "config.json").read_text())
    settings = config.pop("quantization_config")
    config.pop("auto_map")
    config["dtype"] = str(dtype).removeprefix("torch.")
    dense = {}
    for layer in settings["layers"]:
        for expert in range(settings["num_experts"]):
            for role, projection in NAMES.items():
                prefix = f"{PREFIX.format(layer=layer)}.{expert}.{projection}"
                dense[f"{prefix}.weight"] = dense_expert(tensors, int(layer), expert, role).to(dtype)
    kept = {name: t.to(dtype) for name, t in tensors.items() if not name.split(".")[-1].startswith(("delta_", "base"))}
    save_file(kept | dense, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    _copy_tokenizer(folder)


def dense_expert(tensors: dict[str, Tensor], layer: int, expert: int, role: str) -> Tensor:
    """`W_b + U V` of one expert in float64, the pruned columns of W_b being zero."""
    prefix = PREFIX.format(layer=layer)
    config_shape = (256, 128) if role != "down" else (128, 256)
    weight = torch.zeros(config_shape, dtype=torch.float64)
    own, shared = f"{prefix}.{expert}.{NAMES[role]}", f"{prefix}.0.{NAMES[role]}"
    if f"{shared}.base" in tensors:
        weight[:, tensors[f"{shared}.base_columns"].long()] = tensors[f"{shared}.base"].double()
    if f"{own}.delta_u" in tensors:
        weight += tensors[f"{own}.delta_u"].double() @ tensors[f"{own}.delta_v"].double()
    return weight


def _compressed(name: str, what: Synthetic) -> bool:
    return ".experts." in name and int(name.split(".")[2]) not in what.dense


def _factor(source: dict[str, Tensor], num_experts: int, layer: int, role: str, what: Synthetic) -> dict[str, Tensor]:
    prefix = PREFIX.format(layer=layer)
    weights = [source[f"{prefix}.{e}.{NAMES[role]}.weight"].double() for e in range(num_experts)]
    base = torch.zeros_like(weights[0])
    tensors: dict[str, Tensor] = {}
    if kept := what.kept[role]:
        mean = torch.stack(weights).mean(0)
        # Gate and up must keep the same columns: choose by gate's norms for both.
        chooser = [source[f"{prefix}.{e}.{NAMES['gate']}.weight"].double() for e in range(num_experts)]
        norms = (torch.stack(chooser).mean(0) if role == "up" else mean).norm(dim=0)
        size = norms.numel() // what.groups
        best = norms.view(what.groups, size).argsort(dim=1, descending=True)[:, : kept // what.groups]
        columns = (best.sort(dim=1).values + size * torch.arange(what.groups)[:, None]).flatten()
        stored = mean[:, columns].to(what.dtype)
        base[:, columns] = stored.double()
        shared = f"{prefix}.0.{NAMES[role]}"
        tensors[f"{shared}.base"] = stored.contiguous()
        tensors[f"{shared}.base_columns"] = columns.int()
        tensors[f"{shared}.base_norms"] = stored.float().norm(dim=0)
    if rank := what.rank[role]:
        for expert, weight in enumerate(weights):
            u, s, vt = torch.linalg.svd(weight - base, full_matrices=False)
            root = s[:rank].sqrt()
            tensors[f"{prefix}.{expert}.{NAMES[role]}.delta_u"] = (u[:, :rank] * root).to(what.dtype).contiguous()
            tensors[f"{prefix}.{expert}.{NAMES[role]}.delta_v"] = (root[:, None] * vt[:rank]).to(what.dtype)
    return tensors


def _quantization_config(config: dict, what: Synthetic) -> dict:
    layer = {
        role: {"rank": what.rank[role], "kept_columns": what.kept[role], "used_columns": what.used[role]}
        for role in NAMES
    }
    return {
        "quant_method": "d2moe",
        "format_version": 1,
        "method": "d2",
        "family": "mixtral",
        "experts": PREFIX,
        "projections": NAMES,
        "num_experts": config["num_local_experts"],
        "hidden_size": config["hidden_size"],
        "intermediate_size": config["intermediate_size"],
        "dtype": str(what.dtype).removeprefix("torch."),
        "pruning": {"scope": what.scope, "groups": what.groups},
        "layers": {str(n): layer for n in range(config["num_hidden_layers"]) if n not in what.dense},
        "source": {"name": "tiny-mixtral", "parameters": 4_400_000, "bytes": 8_800_000},
    }


def _write(folder: Path, config: dict, others: dict[str, Tensor], experts: dict[str, Tensor]) -> None:
    shards = {"model-00001-of-00002.safetensors": others, "model-00002-of-00002.safetensors": experts}
    names = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
    for file, tensors in shards.items():
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / file, {"format": "pt"})
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    manifest = {
        "format_version": 1,
        "other_tensors": {name: [names[tensor.dtype], list(tensor.shape)] for name, tensor in others.items()},
        "files": {file: _entry(folder / file) for file in shards},
    }
    (folder / "d2moe_manifest.json").write_text(json.dumps(manifest))
    (folder / MODELING_FILE).write_text(checkpoint_modeling_source())
    _copy_tokenizer(folder)


def _entry(path: Path) -> dict:
    content = path.read_bytes()
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _copy_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        shutil.copyfile(SOURCE / name, folder / name)
