"""The benchmarks' models: what the project itself would accept and write, but for the numbers in them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from compression import d2moe_here
from synthetic_mixtral import Size, write_compressed, write_dense

from offline.io.shards import Reader
from offline.source.dense import open_dense

SIZE = Size(hidden=512, intermediate=1024, experts=4, layers=2)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dense(tmp_path_factory.mktemp("models"), SIZE)


def test_a_ratio_is_the_share_of_bytes_that_is_gone(dense: Path) -> None:
    """`d2moe inspect` reads what was written and finds the ratio, just reached; scope batch stores a smaller base."""
    kept = {}
    for scope in ("off", "batch"):
        out = write_compressed(dense, 0.4, scope)
        done = d2moe_here("inspect", out, "--json")
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)
        assert report["source"]["bytes"] == sum(file.stat().st_size for file in dense.glob("*.safetensors"))
        assert 0.4 <= report["stored_ratio"] < 0.42
        assert report["scope"] == scope
        kept[scope] = report["layers"]["0"]["gate"]["kept_columns"]
    assert kept["batch"] < kept["off"]


def test_models_differ_in_their_experts_only(dense: Path) -> None:
    model, reader = open_dense(str(dense)), Reader(write_compressed(dense, 0.4))
    for name in model.other_tensors:
        assert torch.equal(model.other_tensor(name), reader.tensor(name)), name


def test_bases_are_whole(dense: Path) -> None:
    """Norms are the base's own, and gate and up have the same columns, as the format wants."""
    reader = Reader(write_compressed(dense, 0.4))
    prefix = "model.layers.1.block_sparse_moe.experts.0"
    for projection in ("w1", "w3", "w2"):
        base = reader.tensor(f"{prefix}.{projection}.base").float()
        torch.testing.assert_close(reader.tensor(f"{prefix}.{projection}.base_norms"), base.norm(dim=0))
    assert torch.equal(*(reader.tensor(f"{prefix}.{projection}.base_columns") for projection in ("w1", "w3")))


def test_what_is_there_is_not_written_again(dense: Path) -> None:
    files = [write_compressed(dense, 0.4) / "config.json", dense / "config.json"]
    before = [file.stat().st_ino for file in files]
    assert write_dense(dense.parent.parent, SIZE) == dense
    assert [write_compressed(dense, 0.4) / "config.json", dense / "config.json"] == files
    assert [file.stat().st_ino for file in files] == before
