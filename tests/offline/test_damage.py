"""Damaged checkpoints: `inspect` and `eval` refuse each by name, in one line, with exit code 2."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compression import d2moe_here
from safetensors.torch import load_file, save_file

EXPERT = "model.layers.2.block_sparse_moe.experts.5.w2.delta_u"
ATTENTION = "model.layers.1.self_attn.k_proj.weight"
COLUMNS = "model.layers.0.block_sparse_moe.experts.0.w3.base_columns"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def damaged(pruned: Path, tmp_path: Path) -> Path:
    shutil.copytree(pruned, tmp_path / "damaged")
    return tmp_path / "damaged"


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def edit_columns(folder: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Also tells the manifest the file's new size, so that it is the content that is found wrong."""
    edit_tensors(folder, lambda t: t.update({COLUMNS: change(t[COLUMNS].clone()).contiguous()}))
    (file,) = folder.glob("*.safetensors")
    size = file.stat().st_size
    edit_json(folder / "d2moe_manifest.json", lambda m: m["files"][file.name].update(bytes=size))


def edit_config(folder: Path, **changes: Any) -> None:
    edit_json(folder / "config.json", lambda c: c["quantization_config"].update(changes))


def drop_everywhere(folder: Path, name: str) -> None:
    edit_tensors(folder, lambda t: t.pop(name))
    edit_json(folder / INDEX, lambda i: i["weight_map"].pop(name))


def truncate(folder: Path) -> None:
    (file,) = folder.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1000])


def cut_header(folder: Path) -> None:
    (file,) = folder.glob("*.safetensors")
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:100] + b"\0" * (size - 100))


DAMAGES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "expert missing": (lambda f: edit_tensors(f, lambda t: t.pop(EXPERT)), [EXPERT, "missing"]),
    "attention missing": (lambda f: edit_tensors(f, lambda t: t.pop(ATTENTION)), [ATTENTION, "missing"]),
    "expert missing in the index too": (lambda f: drop_everywhere(f, EXPERT), [EXPERT, "missing"]),
    "attention missing in the index too": (lambda f: drop_everywhere(f, ATTENTION), [ATTENTION, "missing"]),
    "expert of another shape": (
        lambda f: edit_tensors(f, lambda t: t.update({EXPERT: t[EXPERT].t().contiguous()})), [EXPERT, "expected"]
    ),
    "attention of another shape": (
        lambda f: edit_tensors(f, lambda t: t.update({ATTENTION: t[ATTENTION][:3].clone()})), [ATTENTION, "expected"]
    ),
    "another dtype": (lambda f: edit_tensors(f, lambda t: t.update({EXPERT: t[EXPERT].float()})), [EXPERT, "F32"]),
    "a tensor too many": (
        lambda f: (edit_tensors(f, lambda t: t.update(extra=torch.zeros(1))),
                   edit_json(f / INDEX, lambda i: i["weight_map"].update(extra=i["weight_map"][EXPERT]))),
        ["extra", "do not belong"],
    ),
    "truncated": (truncate, ["truncated", "model-00001-of-00001.safetensors"]),
    "header destroyed": (cut_header, ["damaged", "model-00001-of-00001.safetensors"]),
    "file missing": (lambda f: next(f.glob("*.safetensors")).unlink(), ["model-00001-of-00001.safetensors", "missing"]),
    "index missing": (lambda f: (f / INDEX).unlink(), [INDEX]),
    "index escapes": (lambda f: edit_json(f / INDEX, lambda i: i["weight_map"].update({EXPERT: "../x"})), ["../x"]),
    "index not JSON": (lambda f: (f / INDEX).write_text("{"), [INDEX, "JSON"]),
    "manifest missing": (lambda f: (f / "d2moe_manifest.json").unlink(), ["d2moe_manifest.json", "missing"]),
    "unknown format version": (lambda f: edit_config(f, format_version=1), ["format version 1"]),
    "unknown manifest version": (
        lambda f: edit_json(f / "d2moe_manifest.json", lambda m: m.update(format_version=9)), ["format version 9"]
    ),
    "no format version": (
        lambda f: edit_json(f / "config.json", lambda c: c["quantization_config"].pop("format_version")),
        ["format_version"],
    ),
    "unknown field": (lambda f: edit_config(f, surprise=1), ["surprise"]),
    "a method that is no name": (lambda f: edit_config(f, method="D3 "), ["method"]),
    "absurd number of experts": (lambda f: edit_config(f, num_experts=10**12), ["num_experts"]),
    "absurd sizes": (lambda f: edit_config(f, hidden_size=10**15), ["hidden_size"]),
    "a rank that does not fit": (
        lambda f: edit_json(
            f / "config.json", lambda c: c["quantization_config"]["layers"]["1"]["up"].update(rank=999)
        ),
        ["layer 1 up", "rank 999"],
    ),
    "columns out of range": (lambda f: edit_columns(f, lambda c: c + 8), [COLUMNS, "0..127"]),
    "columns unsorted": (lambda f: edit_columns(f, lambda c: c.flip(0)), [COLUMNS, "ascend"]),
    "columns uneven": (lambda f: edit_columns(f, lambda c: torch.arange(len(c)).int()), [COLUMNS, "evenly"]),
    "another size": (lambda f: edit_tensors(f, lambda t: None), ["truncated or replaced"]),
    "manifest without files": (
        lambda f: edit_json(f / "d2moe_manifest.json", lambda m: m.update(files={})), ["disagree"]
    ),
    "a version that is nearly right": (lambda f: edit_config(f, format_version=True), ["version True"]),
    "a rank as text": (
        lambda f: edit_json(
            f / "config.json", lambda c: c["quantization_config"]["layers"]["1"]["up"].update(rank="27")
        ),
        ["layers.1.up.rank"],
    ),
    "a prefix with other braces": (lambda f: edit_config(f, experts="m.{layer}.{x}"), ["missing"]),
    "groups that do not divide": (lambda f: edit_config(f, pruning={"scope": "off", "groups": 7}), ["7 groups"]),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_inspect_refuses(name: str, damaged: Path) -> None:
    damage, fragments = DAMAGES[name]
    damage(damaged)
    done = d2moe_here("inspect", damaged)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    for fragment in fragments:
        assert fragment in done.stderr


def test_eval_refuses_too(damaged: Path, texts: tuple[Path, Path]) -> None:
    drop_everywhere(damaged, ATTENTION)
    done = d2moe_here("eval", damaged, "--text", texts[1], "--seq-len", "64")
    assert done.returncode == 2
    assert ATTENTION in done.stderr
