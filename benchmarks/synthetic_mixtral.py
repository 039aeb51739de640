"""Mixtral-like models of any size, dense and compressed, with random weights: for benchmarks, not for text.

Nothing is compressed. The compressed checkpoints are what `d2moe compress` would write of the dense one (the same
budget, writer and files) but for the numbers in them, which are drawn and have nothing to do with the dense model's.
Attention, router, embeddings and norms are the same in all. One tensor is in memory at a time.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2moe_vllm.families import MODELING_FILE, auto_map, checkpoint_modeling_source
from d2moe_vllm.format.config import MANIFEST_FILE, STATS_FILE, CheckpointConfig, Manifest
from d2moe_vllm.format.files import check_checkpoint
from d2moe_vllm.format.kinds import ROLES, TensorSpec
from offline.io.folders import new_folder
from offline.io.shards import Shard, plan_shards, write_file, write_shards
from offline.plan.make import make_plan
from offline.plan.recipe import Recipe
from offline.source.dense import DenseModel, open_dense
from offline.source.families import find_family
from offline.source.folder import find_companions

TINY = Path(__file__).resolve().parent.parent / "examples" / "tiny-mixtral"
"""Whose tokenizer, and so whose vocabulary, the models have."""
SPARSITY = {"off": 0.1, "token": 0.6, "batch": 0.6}
"""Share of the base's columns that are unused, by scope: METHODS' default, and its throughput setting."""


@dataclass(frozen=True)
class Size:
    """Of a Mixtral-like model; the default is 2.95 GB in bfloat16, 96 % of it in the experts. chosen: experts that a
    token is routed to."""

    hidden: int = 2048
    intermediate: int = 7168
    experts: int = 8
    layers: int = 4
    chosen: int = 2

    @property
    def name(self) -> str:
        return f"h{self.hidden}-i{self.intermediate}-e{self.experts}x{self.chosen}-l{self.layers}"

    @property
    def heads(self) -> int:
        """Of 128 dimensions, as Mixtral's."""
        return self.hidden // 128

    @property
    def kv_heads(self) -> int:
        return max(self.heads // 2, 1)

    def config(self) -> dict[str, Any]:
        """config.json of the dense model: the bundled one's but for its sizes."""
        return {
            **json.loads((TINY / "config.json").read_text(encoding="utf-8")),
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_local_experts": self.experts,
            "num_experts_per_tok": self.chosen,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": 128,
            "max_position_embeddings": 2048,
        }

    def tensors(self) -> dict[str, TensorSpec]:
        """Every tensor of the dense model."""
        config, hidden = self.config(), self.hidden
        kv = self.kv_heads * 128
        vocabulary = (config["vocab_size"], hidden)
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": vocabulary, "lm_head.weight": vocabulary}
        shapes["model.norm.weight"] = (hidden,)
        family = find_family(config)
        for layer in range(self.layers):
            at = f"model.layers.{layer}"
            shapes |= {f"{at}.{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
            for name, out in (("q", hidden), ("k", kv), ("v", kv), ("o", hidden)):
                shapes[f"{at}.self_attn.{name}_proj.weight"] = (out, hidden)
            shapes[f"{at}.block_sparse_moe.gate.weight"] = (self.experts, hidden)
            for expert in range(self.experts):
                for role in ROLES:
                    out_in = (hidden, self.intermediate) if role == "down" else (self.intermediate, hidden)
                    shapes[family.layouts[0].name(layer, expert, role)] = out_in
        return {name: TensorSpec("BF16", shape) for name, shape in shapes.items()}


def write_dense(root: Path, size: Size) -> Path:
    """The dense model's folder under `root`, written unless it is there."""
    out = root / size.name / "dense"
    if out.exists():
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    specs = size.tensors()

    def produce(name: str) -> Tensor:
        if "norm" in name:
            return torch.ones(specs[name].shape, dtype=torch.bfloat16)
        # Embeddings of variance 1; what multiplies by the rest keeps the variance of its input.
        return _normal(name, specs[name], 1.0 if "embed" in name else specs[name].shape[-1] ** -0.5)

    with new_folder(out) as folder:
        write_shards(folder, plan_shards(specs), produce)
        _write_json(folder / "config.json", size.config())
        _copy_tokenizer(folder)
        open_dense(str(folder))
    return out


def write_compressed(dense: Path, ratio: float, scope: str = "off", method: str = "d2") -> Path:
    """A compressed checkpoint beside the dense model, written unless it is there: uniform ranks, a pruned base.

    ratio: share of the dense model's bytes that is gone. scope: to serve with; decides how much of the base is cut.
    method: d2 or mobe.
    """
    out = dense.with_name(f"{method}-{100 * ratio:g}" + ("" if scope == "off" else f"-{scope}"))
    if out.exists():
        return out
    model = open_dense(str(dense))
    parts = {"base": {"sparsity": SPARSITY[scope], "column_multiple": 16}} if method == "d2" else {"method": method}
    settings = {"ratio": ratio, "allocation": "uniform", "scope": scope, "delta": {"rank_multiple": 16}, **parts}
    recipe = Recipe.model_validate(settings)
    plan = make_plan(model, recipe)
    _write_checkpoint(out, model, plan.budget.config, plan.budget.shards)
    return out


def write_packed(dense: Path, base: int | None, delta: int) -> Path:
    """A compressed checkpoint beside the dense model, written unless it is there: every expert's whole matrices in
    `delta` bits, on a base in `base` bits, None for none; one scale for every 64 inputs."""
    out = dense.with_name(f"int{delta}" if base is None else f"int{base}-int{delta}")
    if out.exists():
        return out
    model = open_dense(str(dense))
    # Names, sizes and layers of any checkpoint of it.
    any_one = make_plan(model, Recipe(ratio=0.5, bits=16, allocation="uniform")).budget.config
    stored: dict[str, Any] = {"delta": "dense", "delta_storage": {"type": f"int{delta}"}}
    if base is not None:
        stored |= {"full_base": True, "base_storage": {"type": f"int{base}"}}
    layers = {number: dict.fromkeys(ROLES, stored) for number in any_one.layers}
    config = CheckpointConfig.model_validate({**any_one.model_dump(), "layers": layers})
    _write_checkpoint(out, model, config, plan_shards({**model.other_tensors, **config.expert_tensors()}))
    return out


def _write_checkpoint(out: Path, model: DenseModel, config: CheckpointConfig, shards: list[Shard]) -> None:
    specs = config.expert_tensors()

    def produce(name: str) -> Tensor:
        return _expert_tensor(config, specs, name) if name in specs else model.other_tensor(name)

    with new_folder(out) as folder:
        files = write_shards(folder, shards, produce)
        others = {name: (spec.dtype, spec.shape) for name, spec in model.other_tensors.items()}
        write_file(folder / MANIFEST_FILE, Manifest(other_tensors=others, files=files).model_dump_json(indent=1) + "\n")
        _write_json(folder / "config.json", _compressed_config(model, config))
        _write_json(folder / STATS_FILE, _statistics(config))
        write_file(folder / MODELING_FILE, checkpoint_modeling_source())
        _copy_tokenizer(folder)
        check_checkpoint(folder)


def _expert_tensor(config: CheckpointConfig, specs: Mapping[str, TensorSpec], name: str) -> Tensor:
    """One tensor of a base or delta; base and delta have half of the weight's variance each, with MoBE about all."""
    prefix, kind = name.rsplit(".", 1)
    if specs[name].dtype == "U8":
        return torch.randint(0, 256, specs[name].shape, generator=_generator(name), dtype=torch.uint8)
    if kind.endswith("_scales"):
        return _scales(config, prefix, kind, specs[name])
    if kind == "alpha":
        return torch.full(specs[name].shape, 1 / specs[name].numel, dtype=torch.bfloat16)
    if kind == "base_columns":
        return _columns(config, prefix, specs[name].shape[0])
    if kind == "base_norms":
        return _expert_tensor(config, specs, f"{prefix}.base").float().norm(dim=0)
    inputs = {name: i for role, name in config.projections.items() for i in [config.shape(role)[1]]}
    fan_in = inputs[prefix.rsplit(".", 1)[1]]
    fan_in = specs[name].shape[1] if kind in ("delta_u", "a") else 2 * fan_in
    return _normal(name, specs[name], fan_in**-0.5)


def _scales(config: CheckpointConfig, prefix: str, kind: str, spec: TensorSpec) -> Tensor:
    """Of codes that are drawn evenly: of base and delta each has half of the weight's variance."""
    role = next(role for role, name in config.projections.items() if prefix.endswith(f".{name}"))
    layer = next(iter(config.layers.values()))[role]
    storage = layer.base_storage if kind.startswith("base") else layer.delta_storage
    assert storage is not None
    deviation = (2 ** (2 * int(storage.type.removeprefix("int"))) / 12) ** 0.5
    size = ((2 if layer.has_base else 1) * config.shape(role)[1]) ** -0.5 / deviation
    return ((torch.rand(spec.shape, generator=_generator(f"{prefix}.{kind}")) + 0.5) * size).bfloat16()


def _columns(config: CheckpointConfig, prefix: str, kept: int) -> Tensor:
    """int [kept], ascending, as many in every group; gate and up have the same."""
    stem, projection = prefix.rsplit(".", 1)
    role = next(role for role, name in config.projections.items() if name == projection)
    groups, inputs = config.pruning.groups, config.shape(role)[1]
    generator = _generator(f"{stem}.{'middle' if role == 'down' else 'input'}")
    own = [torch.randperm(inputs // groups, generator=generator)[: kept // groups].sort().values for _ in range(groups)]
    return torch.cat([columns + group * (inputs // groups) for group, columns in enumerate(own)]).int()


def _normal(name: str, spec: TensorSpec, deviation: float) -> Tensor:
    """Normal numbers that depend on the tensor's name alone."""
    return (torch.randn(spec.shape, generator=_generator(name)) * deviation).bfloat16()


def _generator(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def _compressed_config(model: DenseModel, config: CheckpointConfig) -> dict[str, Any]:
    ours = {"auto_map": auto_map(model.family.model_type), "quantization_config": config.model_dump(mode="json")}
    return {**model.config, **ours}


def _statistics(config: CheckpointConfig) -> dict[str, Any]:
    """No token was seen, and all of the source is lost."""
    lost = {role: [1.0] * config.num_experts for role in ROLES}
    layer = {"tokens": [0] * config.num_experts, "relative_error": lost}
    return {"format_version": config.format_version, "layers": {str(number): layer for number in config.layers}}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_file(path, json.dumps(content, indent=1) + "\n")


def _copy_tokenizer(folder: Path) -> None:
    for name in find_companions(TINY, ()).carried:
        if name != "training.json":
            shutil.copyfile(TINY / name, folder / name)
