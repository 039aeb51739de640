"""Small d2moe checkpoints for tests, written without offline/: an independent reading of the format.

Made from the bundled model: base = mean of the experts' columns of largest norm, or its truncated SVD; deltas =
truncated SVD, or columns of largest norm. Not a good compression, but one whose text stays text, with every
feature of the format in it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from d2moe_vllm.families import MODELING_FILE, auto_map, checkpoint_modeling_source

SOURCE = Path(__file__).parent.parent / "examples" / "tiny-mixtral"
NAMES = {"gate": "w1", "up": "w3", "down": "w2"}
PREFIX = "model.layers.{layer}.block_sparse_moe.experts"


@dataclass
class Synthetic:
    """What to write: per role rank, kept and used columns or a full base, base rank, and how deltas are stored; the
    layers in `dense` keep their experts, those in `special` differ in some of these fields."""

    rank: dict[str, int] = field(default_factory=lambda: {"gate": 24, "up": 16, "down": 32})
    kept: dict[str, int] = field(default_factory=lambda: {"gate": 96, "up": 96, "down": 192})
    used: dict[str, int] = field(default_factory=lambda: {"gate": 64, "up": 64, "down": 128})
    full_base: tuple[str, ...] = ()
    base_rank: dict[str, int] = field(default_factory=dict)
    delta: dict[str, str] = field(default_factory=dict)
    shared_v: tuple[str, ...] = ()
    distinct_u: dict[str, int] = field(default_factory=dict)
    bases: dict[str, int] = field(default_factory=dict)
    function: str = "silu"
    trimmed: tuple[int, ...] = ()
    scope: str = "off"
    groups: int = 8
    dtype: torch.dtype = torch.bfloat16
    dense: tuple[int, ...] = ()
    special: dict[int, dict[str, Any]] = field(default_factory=dict)

    def layer(self, number: int) -> Synthetic:
        return replace(self, **self.special.get(number, {}))


NO_BASE = {"gate": 0, "up": 0, "down": 0}


def every_variant(**changes: Any) -> Synthetic:
    """Each of the format's variants in one of the model's four layers."""
    low_rank = {"kept": NO_BASE, "used": NO_BASE, "base_rank": {"gate": 40, "up": 24, "down": 48}}
    special = {
        # The second of two expert-parallel ranks has no deltas at all.
        0: {**low_rank, "trimmed": (4, 5, 6, 7)},
        1: {"delta": dict.fromkeys(NAMES, "columns"), "trimmed": (1,)},
        # More shared rows than a single expert of this shape could use; expert 0 is trimmed but lends its name.
        2: {
            "rank": {"gate": 40, "up": 32, "down": 136},
            "shared_v": ("gate", "up", "down"),
            "distinct_u": {"gate": 3, "up": 3, "down": 5},
            "trimmed": (0, 6),
        },
        # U's shared but not V's, no base in gate and up, a low-rank one under columns in down.
        3: {
            "kept": NO_BASE,
            "used": NO_BASE,
            "base_rank": {"down": 48},
            "distinct_u": {"gate": 5, "up": 5},
            "delta": {"down": "columns"},
        },
    }
    return Synthetic(special=special, **changes)


def mixed(function: str = "silu", **changes: Any) -> Synthetic:
    """MoBE's tensors in layers 0 and 1, a base and deltas in layer 2; layer 3 stays dense."""
    special = {
        number: {
            "rank": {"gate": 40, "up": 24, "down": 0},
            "kept": NO_BASE,
            "used": NO_BASE,
            "delta": {"gate": "bases", "up": "bases", "down": "dense"},
            "bases": {"gate": 3, "up": 3},
            "function": function,
        }
        for number in (0, 1)
    }
    return Synthetic(special=special, dense=(3,), **changes)


_MADE: dict[str, dict[str, Tensor]] = {}
"""A Synthetic's repr -> its experts: most tests want one of the same few, and singular values take most of the time."""


def write_checkpoint(folder: Path, what: Synthetic | None = None) -> dict[str, Tensor]:
    """Writes a compressed checkpoint in two shards; returns its expert tensors by name."""
    what = what or Synthetic()
    folder.mkdir(parents=True)
    source = load_file(SOURCE / "model.safetensors")
    config = json.loads((SOURCE / "config.json").read_text())
    others = {name: tensor.to(what.dtype) for name, tensor in source.items() if not _compressed(name, what)}
    if repr(what) not in _MADE:
        _MADE[repr(what)] = _experts(source, config, what)
    experts = {name: tensor.clone() for name, tensor in _MADE[repr(what)].items()}
    config |= {
        "dtype": str(what.dtype).removeprefix("torch."),
        "auto_map": auto_map("mixtral"),
        "quantization_config": _quantization_config(config, what),
    }
    write_files(folder, config, others, experts)
    return experts


def _experts(source: dict[str, Tensor], config: dict[str, Any], what: Synthetic) -> dict[str, Tensor]:
    experts: dict[str, Tensor] = {}
    for layer in range(config["num_hidden_layers"]):
        if layer not in what.dense:
            for role in NAMES:
                experts.update(_factor(source, config["num_local_experts"], layer, role, what.layer(layer)))
    return experts


def write_dense(checkpoint: Path, folder: Path, dtype: torch.dtype, meaning: dict[str, Tensor] | None = None) -> None:
    """Writes the dense model that a compressed checkpoint (scope off) stands for, computed in float64; meaning: what
    its expert tensors stand for, where they are packed."""
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
                dense[f"{prefix}.weight"] = dense_expert(meaning or tensors, int(layer), expert, role).to(dtype)
    kept = {name: t.to(dtype) for name, t in tensors.items() if ".experts." not in name or name.endswith(".weight")}
    save_file(kept | dense, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    _copy_tokenizer(folder)


def dense_expert(tensors: dict[str, Tensor], layer: int, expert: int, role: str, function: str = "silu") -> Tensor:
    """`W_b + U V` of one expert in float64, columns that are pruned or not in the delta being zero; or what it is
    mixed to from bases, or as it is stored."""
    prefix = PREFIX.format(layer=layer)
    own, shared = f"{prefix}.{expert}.{NAMES[role]}", f"{prefix}.0.{NAMES[role]}"

    def get(name: str) -> Tensor | None:
        return tensors[name].double() if name in tensors else None

    weight = torch.zeros((256, 128) if role != "down" else (128, 256), dtype=torch.float64)
    if (base := get(f"{shared}.base")) is not None:
        columns = tensors.get(f"{shared}.base_columns", torch.arange(weight.shape[1]))
        weight[:, columns.long()] = base
    if (base_u := get(f"{shared}.base_u")) is not None:
        weight += base_u @ tensors[f"{shared}.base_v"].double()
    if (kept := tensors.get(f"{prefix}.{expert}.kept")) is not None:
        mask = kept.double() if role == "down" else kept.double()[:, None]
        whole = {name: tensor for name, tensor in tensors.items() if not name.endswith(".kept")}
        return dense_expert(whole, layer, expert, role, function) * mask
    if (dense := get(f"{own}.dense")) is not None:
        return weight + dense
    if (bases := get(f"{shared}.bases")) is not None:
        v = sum(factor * basis for factor, basis in zip(get(f"{own}.alpha"), bases, strict=True))
        v = torch.tanh(v) if function == "tanh" else v / (1 + torch.exp(-v))
        return get(f"{own}.a") @ v
    index = tensors.get(f"{shared}.u_index")
    # Expert -1 has no tensors.
    u = get(f"{prefix}.{expert if index is None else int(index[expert])}.{NAMES[role]}.delta_u")
    if u is None:
        return weight
    if (columns := tensors.get(f"{own}.delta_columns")) is not None:
        weight[:, columns.long()] += u
        return weight
    v = get(f"{shared}.shared_v") if f"{shared}.shared_v" in tensors else get(f"{own}.delta_v")
    return weight + u @ v


def _compressed(name: str, what: Synthetic) -> bool:
    return ".experts." in name and int(name.split(".")[2]) not in what.dense


def _factor(source: dict[str, Tensor], num_experts: int, layer: int, role: str, what: Synthetic) -> dict[str, Tensor]:
    prefix = PREFIX.format(layer=layer)
    weights = [source[f"{prefix}.{e}.{NAMES[role]}.weight"].double() for e in range(num_experts)]
    base = torch.zeros_like(weights[0])
    tensors: dict[str, Tensor] = {}
    mean, shared = torch.stack(weights).mean(0), f"{prefix}.0.{NAMES[role]}"
    if kept := what.kept[role]:
        # Gate and up must keep the same columns: choose by gate's norms for both.
        chooser = [source[f"{prefix}.{e}.{NAMES['gate']}.weight"].double() for e in range(num_experts)]
        norms = (torch.stack(chooser).mean(0) if role == "up" else mean).norm(dim=0)
        columns = _best_columns(norms, kept, what.groups)
        stored = mean[:, columns].to(what.dtype)
        base[:, columns] = stored.double()
        tensors[f"{shared}.base"] = stored.contiguous()
        tensors[f"{shared}.base_columns"] = columns.int()
        tensors[f"{shared}.base_norms"] = stored.float().norm(dim=0)
    if role in what.full_base:
        stored = mean.to(what.dtype)
        base = stored.double()
        tensors[f"{shared}.base"] = stored
    if base_rank := what.base_rank.get(role, 0):
        u, v = (factor.to(what.dtype) for factor in _truncated(mean, base_rank))
        base = u.double() @ v.double()
        tensors |= {f"{shared}.base_u": u, f"{shared}.base_v": v}
    deltas = {expert: weights[expert] - base for expert in range(num_experts) if expert not in what.trimmed}
    if what.delta.get(role) == "dense":
        dense = {f"{prefix}.{e}.{NAMES[role]}.dense": delta.to(what.dtype) for e, delta in deltas.items()}
        return tensors | dense
    for kind, expert, tensor in _deltas(deltas, num_experts, role, what) if what.rank[role] else ():
        stored = tensor if tensor.dtype == torch.int32 else tensor.to(what.dtype)
        tensors[f"{prefix}.{expert}.{NAMES[role]}.{kind}"] = stored.contiguous()
    return tensors


def _best_columns(norms: Tensor, count: int, groups: int) -> Tensor:
    size = norms.numel() // groups
    best = norms.view(groups, size).argsort(dim=1, descending=True)[:, : count // groups]
    return (best.sort(dim=1).values + size * torch.arange(groups)[:, None]).flatten()


def _truncated(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * vt[:rank]


def _deltas(
    deltas: dict[int, Tensor], num_experts: int, role: str, what: Synthetic
) -> Iterator[tuple[str, int, Tensor]]:
    """(kind, expert it rides with, tensor)."""
    rank, distinct, shared_v = what.rank[role], what.distinct_u.get(role, 0), role in what.shared_v
    if what.delta.get(role) == "bases":
        yield from _mixed(deltas, rank, what.bases[role], what.function)
        return
    if what.delta.get(role) == "columns":
        for expert, delta in deltas.items():
            columns = _best_columns(delta.norm(dim=0), rank, what.groups)
            yield "delta_columns", expert, columns.int()
            yield "delta_u", expert, delta[:, columns]
        return
    members = {e: [e] for e in deltas}
    if distinct:
        members = {j: [e for e in deltas if e % distinct == j] for j in range(distinct)}
        index = [e % distinct if e in deltas else -1 for e in range(num_experts)]
        yield "u_index", 0, torch.tensor(index, dtype=torch.int32)
    if shared_v:
        v = torch.linalg.svd(torch.cat(list(deltas.values())), full_matrices=False)[2][:rank]
        yield "shared_v", 0, v
    for j, own in members.items():
        if shared_v:
            yield "delta_u", j, torch.stack([deltas[e] for e in own]).mean(0) @ v.t()
            continue
        u, _ = _truncated(torch.cat([deltas[e] for e in own], dim=1), rank)
        yield "delta_u", j, u
        for e in own:
            yield "delta_v", e, torch.linalg.lstsq(u, deltas[e]).solution


def _mixed(deltas: dict[int, Tensor], rank: int, count: int, function: str) -> Iterator[tuple[str, int, Tensor]]:
    """Bases that are some experts' right singular vectors, large enough for the function to bend them."""
    bases = torch.stack([torch.linalg.svd(deltas[e], full_matrices=False)[2][:rank] for e in range(count)])
    bases *= 0.8 / bases.abs().max()
    yield "bases", 0, bases
    for e, delta in deltas.items():
        alpha = torch.full((count,), 0.2, dtype=torch.float64).index_fill(0, torch.tensor([e % count]), 0.6)
        v = torch.tensordot(alpha, bases, dims=1)
        v = torch.tanh(v) if function == "tanh" else torch.nn.functional.silu(v)
        yield "alpha", e, alpha
        yield "a", e, delta @ torch.linalg.pinv(v)


def _quantization_config(config: dict, what: Synthetic) -> dict:
    def layer(own: Synthetic) -> dict:
        roles = {
            role: {
                "rank": own.rank[role],
                "full_base": role in own.full_base,
                "kept_columns": own.kept[role],
                "used_columns": own.used[role],
                "base_rank": own.base_rank.get(role, 0),
                "delta": own.delta.get(role, "factors"),
                "shared_v": role in own.shared_v,
                "distinct_u": own.distinct_u.get(role, 0),
                "bases": own.bases.get(role, 0),
                "function": own.function if role in own.bases else None,
            }
            for role in NAMES
        }
        return {**roles, "trimmed": list(own.trimmed)}

    return {
        "quant_method": "d2moe",
        "format_version": 2,
        "method": "d2",
        "family": "mixtral",
        "experts": PREFIX,
        "projections": NAMES,
        "num_experts": config["num_local_experts"],
        "hidden_size": config["hidden_size"],
        "intermediate_size": config["intermediate_size"],
        "dtype": str(what.dtype).removeprefix("torch."),
        "pruning": {"scope": what.scope, "groups": what.groups},
        "layers": {str(n): layer(what.layer(n)) for n in range(config["num_hidden_layers"]) if n not in what.dense},
        "source": {"name": "tiny-mixtral", "parameters": 4_400_000, "bytes": 8_800_000},
    }


def write_files(folder: Path, config: dict, others: dict[str, Tensor], experts: dict[str, Tensor]) -> None:
    shards = {"model-00001-of-00002.safetensors": others, "model-00002-of-00002.safetensors": experts}
    names = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
    for file, tensors in shards.items():
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / file, {"format": "pt"})
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    manifest = {
        "format_version": 2,
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
