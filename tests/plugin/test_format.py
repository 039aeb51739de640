"""The format's variants: what config.json may say, and damaged files, which every reader refuses by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from d2moe_vllm.format.config import CheckpointError, parse_config
from d2moe_vllm.format.files import check_checkpoint, read_config
from d2moe_vllm.hf.checks import check_files

P = "model.layers.{}.block_sparse_moe.experts.{}.{}"
ROLES = ("gate", "up", "down")
SHARD = "model-00002-of-00002.safetensors"


@pytest.fixture
def content(variants: Path) -> dict[str, Any]:
    return json.loads((variants / "config.json").read_text())["quantization_config"]


def test_tensors_are_what_the_config_says(variants: Path) -> None:
    config = check_checkpoint(variants)
    stored = load_file(variants / SHARD)
    assert {name: spec.shape for name, spec in config.expert_tensors().items()} == {
        name: tuple(tensor.shape) for name, tensor in stored.items()
    }
    assert config.untrimmed(0) == [0, 1, 2, 3]
    assert config.untrimmed(2) == [1, 2, 3, 4, 5, 7]


def test_fields_of_the_variants_have_defaults(content: dict[str, Any], config: Any) -> None:
    """A config without them reads as before."""
    written = json.loads(config.model_dump_json())
    for layer in written["layers"].values():
        del layer["trimmed"]
        for role in ROLES:
            for name in ("base_rank", "delta", "shared_v", "distinct_u"):
                del layer[role][name]
    assert parse_config(written) == config


def both(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda layer: [layer[role].update(changes) for role in ("gate", "up")]


def one(role: str, **changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda layer: layer[role].update(changes)


# The layers: 0 low-rank base, trimmed; 1 delta columns, trimmed; 2 all shared, trimmed; 3 U's shared.
RULES: list[tuple[int, Callable[[dict[str, Any]], object], str]] = [
    (0, one("down", kept_columns=8), "a base is a full_base, or has kept_columns or a base_rank"),
    (0, one("down", base_rank=129), "layer 0 down: base_rank 129 exceeds the matrix"),
    (0, one("down", base_rank=-1), "layers.0.down.base_rank"),
    (0, one("down", base_rank=0), "trimmed experts run on the base alone, but down have no base"),
    (3, one("down", base_rank=0, rank=0), "rank, kept_columns and base_rank are all 0"),
    (1, one("gate", delta="factors"), "gate and up have different delta"),
    (1, one("down", delta="rows"), "layers.1.down.delta"),
    (1, one("down", rank=36), "layer 1 down: 36 columns do not fit the groups"),
    (1, one("down", rank=264), "layer 1 down: rank 264 exceeds the matrix"),
    (1, one("down", shared_v=True), "need delta 'factors'"),
    (1, both(distinct_u=2), "need delta 'factors'"),
    (2, one("gate", shared_v=False), "gate and up have different shared_v"),
    (2, one("up", shared_v=1), "layers.2.up.shared_v"),
    (2, one("up", distinct_u=2), "gate and up have different distinct_u"),
    (2, both(distinct_u=7), "layer 2 gate: distinct_u 7 exceeds the 6 experts that have deltas"),
    (2, one("gate", rank=129), "layer 2 gate: rank 129 exceeds the matrix"),
    (3, one("down", delta="factors", rank=129), "layer 3 down: rank 129 exceeds the matrix"),
    (0, lambda layer: layer.update(trimmed=[5, 4]), "trimmed must list experts in ascending order"),
    (0, lambda layer: layer.update(trimmed=[4, 4]), "trimmed must list experts in ascending order"),
    (0, lambda layer: layer.update(trimmed=[4, 8]), "layer 0: trimmed experts must lie in 0..7"),
    (0, lambda layer: layer.update(trimmed=[-1]), "layer 0: trimmed experts must lie in 0..7"),
    (3, lambda layer: layer.update(trimmed=[1]), "but gate and up have no base"),
]


@pytest.mark.parametrize(("layer", "change", "words"), RULES, ids=[words for _, _, words in RULES])
def test_rules_between_fields(
    content: dict[str, Any], layer: int, change: Callable[[dict[str, Any]], object], words: str
) -> None:
    change(content["layers"][str(layer)])
    with pytest.raises(CheckpointError) as error:
        parse_config(content)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_rank_of_zero_stores_nothing_whatever_else_is_said(content: dict[str, Any]) -> None:
    for role in ROLES:
        content["layers"]["2"][role]["rank"] = 0
    names = [name for name in parse_config(content).expert_tensors() if ".layers.2." in name]
    assert {name.rpartition(".")[2] for name in names} == {"base", "base_columns", "base_norms"}


def edit(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Also in the index and the size in the manifest, so that it is the content that is found wrong."""
    tensors = load_file(folder / SHARD)
    change(tensors)
    save_file(tensors, folder / SHARD, {"format": "pt"})
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    others = {name: file for name, file in index["weight_map"].items() if file != SHARD}
    index["weight_map"] = others | dict.fromkeys(tensors, SHARD)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    manifest = json.loads((folder / "d2moe_manifest.json").read_text())
    manifest["files"][SHARD]["bytes"] = (folder / SHARD).stat().st_size
    (folder / "d2moe_manifest.json").write_text(json.dumps(manifest))


def put(name: str, place: int, value: int) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors[name].__setitem__(place, value)


def drop(name: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.pop(name)


def add(name: str, like: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({name: tensors[like].clone()})


INDEX = P.format(2, 0, "w2") + ".u_index"
COLUMNS = P.format(1, 3, "w3") + ".delta_columns"
TRIMMED = P.format(0, 5, "w1")
DAMAGES: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "u_index beyond the stored U's": (put(INDEX, 1, 5), INDEX),
    "u_index of an expert with deltas is none": (put(INDEX, 1, -1), INDEX),
    "u_index of a trimmed expert is a U": (put(INDEX, 6, 0), INDEX),
    "u_index below none": (put(INDEX, 6, -2), INDEX),
    "u_index differs between gate and up": (put(P.format(2, 0, "w3") + ".u_index", 1, 2), "differ"),
    "u_index as int64": (lambda t: t.update({INDEX: t[INDEX].long()}), INDEX),
    "u_index too short": (lambda t: t.update({INDEX: t[INDEX][1:].clone()}), INDEX),
    "u_index missing": (drop(INDEX), INDEX),
    "delta columns unsorted": (lambda t: t.update({COLUMNS: t[COLUMNS].flip(0)}), f"{COLUMNS}: columns must ascend"),
    "delta columns twice": (lambda t: t[COLUMNS].__setitem__(1, t[COLUMNS][0]), f"{COLUMNS}: columns must ascend"),
    "delta columns out of range": (put(COLUMNS, -1, 128), COLUMNS),
    "delta columns negative": (put(COLUMNS, 0, -1), COLUMNS),
    "delta columns uneven": (
        lambda t: t.update({COLUMNS: torch.arange(len(t[COLUMNS])).int()}), "evenly over 8 groups"
    ),
    "delta columns missing": (drop(COLUMNS), COLUMNS),
    "a trimmed expert with tensors": (add(f"{TRIMMED}.delta_u", P.format(0, 0, "w1") + ".delta_u"), TRIMMED),
    "a U too many": (add(P.format(2, 5, "w2") + ".delta_u", P.format(2, 0, "w2") + ".delta_u"), "do not belong"),
    "a U missing": (drop(P.format(2, 0, "w1") + ".delta_u"), P.format(2, 0, "w1") + ".delta_u"),
    "an own V where all share one": (
        add(P.format(2, 1, "w2") + ".delta_v", P.format(2, 0, "w2") + ".shared_v"), "do not belong"
    ),
    "shared V missing": (drop(P.format(2, 0, "w2") + ".shared_v"), "shared_v"),
    "low-rank base missing": (drop(P.format(0, 0, "w2") + ".base_v"), "base_v"),
    "low-rank base transposed": (
        lambda t: t.update({P.format(0, 0, "w2") + ".base_v": t[P.format(0, 0, "w2") + ".base_v"].t().contiguous()}),
        "base_v",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_refused_by_name(variants: Path, tmp_path: Path, name: str) -> None:
    damage, words = DAMAGES[name]
    folder = shutil.copytree(variants, tmp_path / "damaged")
    edit(folder, damage)
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    for reader, error in ((lambda: check_checkpoint(folder), CheckpointError),
                          (lambda: check_files(str(folder), settings), ValueError)):  # fmt: skip
        with pytest.raises(error) as caught:
            reader()
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)


def test_what_is_not_damaged_is_not_refused(variants: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(variants, tmp_path / "whole")
    edit(folder, lambda tensors: None)
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    check_files(str(folder), settings)
    assert check_checkpoint(folder) == read_config(variants)
