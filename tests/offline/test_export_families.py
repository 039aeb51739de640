"""export and verify in every family: a compressed form that loses nothing must come back as the original.

Each expert is stored as a product that is exactly its weight (W I, or I W), so no compression is involved, and
every byte of the export can be compared.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from compression import d2moe_here
from edits import add_records
from families import CONFIGS, STACKABLE, quantize_fp8, write_exact, write_family
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from offline.io.shards import Reader
from offline.plan.recipes import SHIPPED
from offline.source.dense import open_dense


def lossless(folder: Path, source: Path, dense: tuple[int, ...] = ()) -> Path:
    """A compressed checkpoint that loses nothing, with the records that `compress` writes."""
    write_exact(folder, source, dense)
    shape = open_dense(str(source)).shape
    add_records(folder, tuple(layer for layer in shape.layers if layer not in dense), num_experts=shape.num_experts)
    return folder


def same_bytes(first: Tensor, second: Tensor) -> bool:
    return torch.equal(first.reshape(-1).view(torch.uint8), second.reshape(-1).view(torch.uint8))


CASES = [(family, False) for family in CONFIGS] + [(family, True) for family in STACKABLE]


@pytest.mark.parametrize(("family", "stacked"), CASES)
def test_nothing_is_lost_on_the_way_back(tmp_path: Path, family: str, stacked: bool) -> None:
    """stacked: the original was written by transformers' own modules; the export has the released layout."""
    source = write_family(tmp_path / "source", family, stacked=stacked)
    model = open_dense(str(source))
    last = model.shape.layers[-1]
    lossless(tmp_path / "ours", source, dense=(last,))
    done = d2moe_here("verify", tmp_path / "ours", "--source", source, "--json")
    found = json.loads(done.stdout)
    assert (done.returncode, found["problems"]) == (0, [])
    assert all(layer[role]["worst"] == 0 for layer in found["layers"].values() for role in model.shape.roles)
    assert set(found["layers"]) == {str(layer) for layer in model.shape.layers[:-1]}
    done = d2moe_here("export", tmp_path / "ours", tmp_path / "dense")
    assert done.returncode == 0, done.stderr
    released = write_family(tmp_path / "released", family) if stacked else source
    original, result = Reader(released), Reader(tmp_path / "dense")
    assert result.specs == original.specs
    assert all(same_bytes(result.tensor(name), original.tensor(name)) for name in original.specs)
    assert json.loads((tmp_path / "dense" / "config.json").read_text()) == model.config


@pytest.mark.parametrize("family", ["granitemoe", "qwen2_moe", "phimoe"])
@torch.no_grad()
def test_the_stock_class_computes_the_same(tmp_path: Path, family: str) -> None:
    source = write_family(tmp_path / "source", family)
    lossless(tmp_path / "ours", source)
    assert d2moe_here("export", tmp_path / "ours", tmp_path / "dense").returncode == 0
    tokens = torch.arange(40).view(1, -1)
    models = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in (source, tmp_path / "dense"))
    first, second = (model.eval()(tokens).logits for model in models)
    assert torch.equal(first, second)


def test_an_fp8_original_is_compared_and_exported_dequantised(tmp_path: Path) -> None:
    source = write_family(tmp_path / "source", "deepseek_v3")
    quantize_fp8(source, block=32)
    lossless(tmp_path / "ours", source)
    done = d2moe_here("verify", tmp_path / "ours", "--source", source)
    assert done.returncode == 0, done.stderr
    assert d2moe_here("export", tmp_path / "ours", tmp_path / "dense").returncode == 0
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert "quantization_config" not in config
    name = "model.layers.2.mlp.experts.7.up_proj.weight"
    stored = load_file(source / "model.safetensors")
    scale = stored[f"{name}_scale_inv"].repeat_interleave(32, 0).repeat_interleave(32, 1)[:48, :64]
    expected = (stored[name].float() * scale).bfloat16()
    result = Reader(tmp_path / "dense")
    assert same_bytes(result.tensor(name), expected)
    assert not [tensor for tensor in result.specs if "scale" in tensor]


@pytest.mark.parametrize("family", CONFIGS)
def test_the_shipped_recipe_plans_the_small_model(tmp_path: Path, family: str) -> None:
    """At a ratio that such small experts allow: most of these checkpoints is vocabulary."""
    source = write_family(tmp_path / "source", family)
    assert family in SHIPPED
    done = d2moe_here("plan", source, "--recipe", family, "--ratio", "0.08", "--json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["result"]["stored_ratio"] >= 0.08
    assert plan["recipe"]["calibration"]["windows"] in (256, 512)
