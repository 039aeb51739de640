"""Originals as they should not be, in their numbers, files and configurations: a finite result, or one line and exit
code 2; and never half of something in place of something good."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from compression import d2moe_here
from hostile import RECIPES, compress, cut, edit, finite_result, refused
from safetensors.torch import load_file, save_file
from torch import Tensor

EXPERT = "model.layers.1.mlp.experts.3"
LAYERS, EXPERTS = 2, 8
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


# Numbers


def never_routed(tensors: dict[str, Tensor]) -> None:
    """Expert 5's logit is 0, and of two pairs of opposite ones each has one above it."""
    for layer in range(LAYERS):
        rows = tensors[f"model.layers.{layer}.mlp.gate.weight"]
        rows[5] = 0
        rows[1], rows[3] = -rows[0], -rows[2]


def zero_experts(tensors: dict[str, Tensor], experts: range) -> None:
    for expert in experts:
        for projection in PROJECTIONS:
            tensors[f"model.layers.1.mlp.experts.{expert}.{projection}.weight"].zero_()


def identical(tensors: dict[str, Tensor]) -> None:
    """All of a layer's experts are one, so the base is every expert."""
    for projection in PROJECTIONS:
        first = tensors[f"model.layers.1.mlp.experts.0.{projection}.weight"]
        for expert in range(EXPERTS):
            tensors[f"model.layers.1.mlp.experts.{expert}.{projection}.weight"] = first.clone()


def as_float16(tensors: dict[str, Tensor], scale: float) -> None:
    for name, tensor in tensors.items():
        tensors[name] = (tensor.float() * (scale if ".experts." in name else 1)).clamp(-65504, 65504).half()


ODDITIES: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "as it is": lambda t: None,
    "never routed": never_routed,
    "zero embeddings": lambda t: t["model.embed_tokens.weight"].zero_(),
    "one expert zero": lambda t: zero_experts(t, range(3, 4)),
    "all experts zero": lambda t: zero_experts(t, range(EXPERTS)),
    "identical experts": identical,
    "float16": lambda t: as_float16(t, 1.0),
    "large float16": lambda t: as_float16(t, 1000.0),
    "tiny weights": lambda t: [t[name].mul_(1e-18) for name in t if ".experts." in name],
}
CASES = [
    pytest.param(oddity, recipe, id=f"{oddity}-{recipe}", marks=[] if recipe == "default" else pytest.mark.slow)
    for oddity in ODDITIES
    for recipe in RECIPES
]


@pytest.mark.parametrize(("oddity", "recipe"), CASES)
def test_odd_weights_give_a_finite_result(
    oddity: str, recipe: str, source: Path, few_words: Path, tmp_path: Path
) -> None:
    edit(source, ODDITIES[oddity])
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPES[recipe]))
    done = compress(source, tmp_path / "out", few_words, "--recipe", tmp_path / "recipe.yaml")
    assert done.returncode == 0, done.stderr
    stats = finite_result(source, tmp_path / "out")
    if oddity == "never routed":
        assert all(layer["tokens"][5] == 0 for layer in stats["layers"].values())


def test_weights_at_the_end_of_float16(source: Path, few_words: Path, tmp_path: Path) -> None:
    """Balanced factors stay far below what float16 holds; a delta that is kept as it is does not."""

    def extreme(tensors: dict[str, Tensor]) -> None:
        as_float16(tensors, 1.0)
        for name, tensor in tensors.items():
            if name.startswith("model.layers.1.mlp.experts."):
                even = int(name.split(".")[5]) % 2
                tensors[name] = torch.where(tensor > 0, 65000.0, -65000.0).half() * (1 if even else -1)
            elif name == "model.layers.1.post_attention_layernorm.weight":
                tensor.mul_(1e-6)  # activations that float32 can hold

    edit(source, extreme)
    done = compress(source, tmp_path / "out", few_words)
    assert done.returncode == 0, done.stderr
    finite_result(source, tmp_path / "out")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPES["ties, prune"]))
    done = compress(source, tmp_path / "other", few_words, "--recipe", tmp_path / "recipe.yaml")
    refused(done, "layer 1", "NaN or infinite")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    "name",
    [f"{EXPERT}.up_proj.weight", "model.layers.0.mlp.gate.weight", "model.layers.1.self_attn.k_proj.weight",
     "model.embed_tokens.weight", "lm_head.weight"],
)  # fmt: skip
def test_a_weight_that_is_no_number_is_named(
    name: str, value: float, source: Path, few_words: Path, tmp_path: Path
) -> None:
    edit(source, lambda tensors: tensors[name].view(-1)[7:8].fill_(value))
    refused(compress(source, tmp_path / "out", few_words), name, "NaN or infinite")
    assert not (tmp_path / "out").exists()


def test_activations_that_overflow_are_said_so(source: Path, few_words: Path, tmp_path: Path) -> None:
    edit(source, lambda tensors: [tensors[name].mul_(1e15) for name in tensors if name.startswith(EXPERT[:14])])
    refused(compress(source, tmp_path / "out", few_words), "layer", "text")
    assert not (tmp_path / "out").exists()


# Originals that are not whole


@pytest.fixture
def shards(source: Path) -> Path:
    """The original in three files with an index."""
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    weight_map = {name: f"model-0000{1 + number % 3}-of-00003.safetensors" for number, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        part = {name: tensor for name, tensor in tensors.items() if weight_map[name] == file}
        save_file(part, source / file, {"format": "pt"})
    (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return source


SECOND = "model-00002-of-00003.safetensors"


def point(folder: Path, name: str, file: object) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][name] = file
    path.write_text(json.dumps(index))


def outside(folder: Path) -> None:
    shutil.copy(folder / SECOND, folder.parent / "outside.safetensors")
    point(folder, f"{EXPERT}.up_proj.weight", "../outside.safetensors")


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a shard is missing": (lambda f: (f / SECOND).unlink(), SECOND),
    "a shard is truncated": (lambda f: cut(f / SECOND, -1000), SECOND),
    "a shard ends in its header": (lambda f: cut(f / SECOND, 100), SECOND),
    "a shard is empty": (lambda f: cut(f / SECOND, 0), SECOND),
    "a shard is a folder": (lambda f: ((f / SECOND).unlink(), (f / SECOND).mkdir()), SECOND),
    "the index points at another file": (
        lambda f: [point(f, f"{EXPERT}.{p}.weight", "model-00001-of-00003.safetensors") for p in PROJECTIONS],
        "says it is in",
    ),
    "the index points outside": (outside, "outside"),
    "the index points at an absolute path": (lambda f: point(f, "lm_head.weight", "/etc/passwd"), "/etc/passwd"),
    "the index points at no text": (lambda f: point(f, "lm_head.weight", 7), "lm_head.weight points at 7"),
    "the index lists a tensor that is not there": (lambda f: point(f, "model.ghost", SECOND), "model.ghost"),
    "the index is a list": (lambda f: (f / "model.safetensors.index.json").write_text("[]"), "weight_map"),
    "the index is not text": (lambda f: (f / "model.safetensors.index.json").write_bytes(b"\xff\xfe{"), "index.json"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_original_is_refused(name: str, shards: Path, few_words: Path, tmp_path: Path) -> None:
    assert d2moe_here("plan", shards, "--ratio", "0.08").returncode == 0
    damage, fragment = DAMAGES[name]
    damage(shards)
    before = sorted(tmp_path.iterdir())
    refused(d2moe_here("plan", shards, "--ratio", "0.08"), fragment)
    refused(compress(shards, tmp_path / "out", few_words), fragment)
    assert sorted(tmp_path.iterdir()) == before


ABSURD: list[dict[str, Any]] = [
    {key: value}
    for key in ("num_hidden_layers", "num_experts", "hidden_size", "intermediate_size", "num_experts_per_tok",
                "num_attention_heads", "num_key_value_heads", "vocab_size")
    for value in (-1, 0, "64", 10**6, 10**15, 1.5, None, True, [2])
    # Two heads' worth of keys is what None means; transformers takes True for 1.
    if (key, value) not in (("num_key_value_heads", None),)
] + [
    {"max_position_embeddings": "many"},
    {"max_position_embeddings": -5},
    {"hidden_act": ["silu"]},
    {"rms_norm_eps": "small"},
    {"rope_parameters": {"rope_type": "from Mars"}},
    {"num_hidden_layers": 10**6, "hidden_size": 10**6, "vocab_size": 10**6},
    {"model_type": None},
    {"model_type": ["olmoe"]},
    {"architectures": "x"},
    {"tie_word_embeddings": "perhaps"},
]  # fmt: skip


@pytest.mark.timeout(120)
def test_absurd_configurations_are_refused(source: Path) -> None:
    settings = json.loads((source / "config.json").read_text())
    for change in ABSURD:
        (source / "config.json").write_text(json.dumps({**settings, **change}))
        done = d2moe_here("plan", source, "--ratio", "0.08")
        if change in ({"architectures": "x"}, {"tie_word_embeddings": "perhaps"}) and done.returncode == 0:
            continue  # nothing that a compression reads
        refused(done)
    for text in ("", "[]", "7", "null", "{", '{"model_type": "olmoe"}', "\x00"):
        (source / "config.json").write_text(text)
        refused(d2moe_here("plan", source, "--ratio", "0.08"))
