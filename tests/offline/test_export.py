"""`d2moe export`: a plain dense checkpoint that computes what the compressed one computes."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compression import ROOT, TINY, d2moe_here
from edits import accept, add_records, edit
from filelock import FileLock
from safetensors.torch import load_file
from synthetic import NAMES, PREFIX, Synthetic, dense_expert, every_variant, write_checkpoint, write_dense
from transformers import AutoModelForCausalLM, AutoTokenizer

from offline.io.shards import Reader


@pytest.fixture(scope="module")
def exported(compressed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "dense"
    done = d2moe_here("export", compressed, out, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["path"] == str(out)
    assert result["bytes"] == sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert result["parameters"] == Reader(TINY).parameters
    assert [path.name for path in out.parent.iterdir()] == ["dense"]
    return out


def test_it_is_the_original_but_for_the_experts(compressed: Path, exported: Path) -> None:
    source, result = Reader(TINY), Reader(exported)
    assert result.specs == source.specs
    stored: dict[str, torch.Tensor] = {}
    for file in compressed.glob("*.safetensors"):
        stored |= load_file(file)
    for name in source.specs:
        if ".experts." not in name:
            assert torch.equal(result.tensor(name).view(torch.uint8), source.tensor(name).view(torch.uint8))
    for layer in range(4):
        for expert in range(8):
            for role, projection in NAMES.items():
                weight = result.tensor(f"{PREFIX.format(layer=layer)}.{expert}.{projection}.weight").double()
                # bfloat16 keeps 8 bits: half a unit in the last place of each element.
                expected = dense_expert(stored, layer, expert, role)
                assert ((weight - expected).abs() <= expected.abs() * 2**-8 + 1e-7).all()
    assert json.loads((exported / "config.json").read_text()) == json.loads((TINY / "config.json").read_text())
    kept = {path.name for path in TINY.iterdir()} - {"model.safetensors"}
    ours = {"model.safetensors.index.json"} | {path.name for path in exported.glob("*.safetensors")}
    assert {path.name for path in exported.iterdir()} == kept | ours
    for name in kept - {"config.json", "README.md"}:
        assert (exported / name).read_bytes() == (TINY / name).read_bytes()
    card = (exported / "README.md").read_text()
    assert "**not** a compressed model" in card
    assert "license: apache-2.0" in card


@torch.no_grad()
def test_stock_transformers_computes_what_the_compressed_checkpoint_computes(compressed: Path, exported: Path) -> None:
    dense = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32).eval()
    ours = AutoModelForCausalLM.from_pretrained(compressed, dtype=torch.float32, trust_remote_code=True).eval()
    assert type(dense).__module__.startswith("transformers.models.mixtral")
    tokens = AutoTokenizer.from_pretrained(exported)("The with statement wraps a block.", return_tensors="pt")
    first, second = (model(tokens["input_ids"]).logits for model in (dense, ours))
    scale = float(second.std())
    assert float((first - second).abs().max()) < 0.1 * scale  # experts were rounded to bfloat16 once more
    original = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    assert float((original(tokens["input_ids"]).logits - second).abs().max()) > scale


@pytest.mark.slow
@torch.no_grad()
def test_stock_vllm_runs_it_without_the_plugin(exported: Path, tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    prompts = ["A class definition", "Lists are"]
    llm = {"model": str(exported), "trust_remote_code": False, "enforce_eager": True, "dtype": "float32"}
    output = tmp_path / "results.json"
    job = {"prompts": prompts, "max_tokens": 4, "one_by_one": False, "output": str(output), "llm": llm}
    (tmp_path / "job.json").write_text(json.dumps(job))
    # The engine in that process, whose workers are forked: of one that has begun threads none would come alive.
    env = {**os.environ, "VLLM_PLUGINS": "", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    command = [sys.executable, str(ROOT / "tests" / "plugin" / "llm_runner.py"), str(tmp_path / "job.json")]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=600, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32).eval()
    for result in json.loads(output.read_text()):
        tokens = torch.tensor([result["prompt_ids"] + result["ids"]])
        logprobs = model(tokens).logits[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]
        found = torch.tensor(result["prompt_logprobs"] + result["logprobs"])
        torch.testing.assert_close(found, logprobs, rtol=0, atol=2e-3)


def test_its_perplexity_is_the_compressed_checkpoints(
    compressed: Path, exported: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    text = tmp_path / "short.txt"
    text.write_text(texts[1].read_text()[:20_000])
    found = {}
    for folder in (compressed, exported, TINY):
        done = d2moe_here("eval", folder, "--text", text, "--seq-len", "128", "--json")
        found[folder] = json.loads(done.stdout)["perplexity"]
    assert found[exported] == pytest.approx(found[compressed], rel=2e-3)
    assert abs(found[TINY] / found[compressed] - 1) > 0.05


def test_float32_is_exact_and_dense_layers_pass_through(tmp_path: Path) -> None:
    tensors = write_checkpoint(tmp_path / "mixed", Synthetic(dtype=torch.float32, dense=(1,)))
    add_records(tmp_path / "mixed", (0, 2, 3))
    done = d2moe_here("export", tmp_path / "mixed", tmp_path / "dense")
    assert done.returncode == 0, done.stderr
    assert "vllm serve" in done.stdout
    result, source = Reader(tmp_path / "dense"), Reader(TINY)
    for expert in range(8):
        name = f"{PREFIX.format(layer=1)}.{expert}.w2.weight"
        assert torch.equal(result.tensor(name), source.tensor(name).float())
        for role, projection in NAMES.items():
            weight = result.tensor(f"{PREFIX.format(layer=2)}.{expert}.{projection}.weight").double()
            torch.testing.assert_close(weight, dense_expert(tensors, 2, expert, role), rtol=1e-5, atol=1e-6)


def test_every_variant_of_the_format(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "all", every_variant(dtype=torch.float32))
    add_records(tmp_path / "all")
    write_dense(tmp_path / "all", tmp_path / "expected", torch.float32)
    done = d2moe_here("export", tmp_path / "all", tmp_path / "dense")
    assert done.returncode == 0, done.stderr
    found, expected = Reader(tmp_path / "dense"), Reader(tmp_path / "expected")
    assert found.specs == expected.specs
    for name in expected.specs:
        torch.testing.assert_close(found.tensor(name), expected.tensor(name), rtol=1e-5, atol=1e-6)


def test_the_sources_own_auto_map_comes_back(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "ours")
    original = {"AutoConfig": "configuration_theirs.TheirConfig"}
    add_records(tmp_path / "ours", source_auto_map=original)
    (tmp_path / "ours" / "configuration_theirs.py").write_text("# theirs\n")
    assert d2moe_here("export", tmp_path / "ours", tmp_path / "dense").returncode == 0
    assert json.loads((tmp_path / "dense" / "config.json").read_text())["auto_map"] == original
    assert (tmp_path / "dense" / "configuration_theirs.py").read_text() == "# theirs\n"
    assert not (tmp_path / "dense" / "modeling_d2moe.py").exists()


def test_refusals_leave_nothing_behind(compressed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(compressed, damaged)
    (file,) = damaged.glob("*.safetensors")
    (tmp_path / "there").mkdir()
    before = sorted(tmp_path.iterdir())

    def refused(*arguments: object, fragment: str) -> None:
        done = d2moe_here("export", *arguments)
        assert done.returncode == 2, done.stderr
        assert fragment in done.stderr.splitlines()[-1]
        assert done.stdout == ""
        assert sorted(tmp_path.iterdir()) == before

    refused(compressed, tmp_path / "there", fragment="exists already")
    refused(compressed, tmp_path / "no" / "where", fragment="create it first")
    refused(TINY, tmp_path / "out", fragment="dense checkpoint")
    refused(tmp_path / "none", tmp_path / "out", fragment="missing")
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
        refused(compressed, tmp_path / "out", fragment="No space left")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("offline.source.folder.sync_file", full)
        refused(compressed, tmp_path / "out", fragment="No space left")
    name = "model.layers.3.block_sparse_moe.experts.7.w2.delta_v"
    edit(damaged, name, lambda t: t.index_fill(0, torch.tensor([0]), float("nan")))
    accept(damaged)
    refused(damaged, tmp_path / "out", fragment=name)
    file.write_bytes(file.read_bytes()[:-10])
    refused(damaged, tmp_path / "out", fragment="truncated")


def test_what_a_killed_run_left_is_replaced_and_a_running_one_is_not_disturbed(
    compressed: Path, tmp_path: Path
) -> None:
    left = tmp_path / ".out.partial"
    (left / "sub").mkdir(parents=True)
    (left / "model-00001-of-00009.safetensors").write_text("half")
    with FileLock(tmp_path / ".out.lock"):
        done = d2moe_here("export", compressed, tmp_path / "out")
    assert (done.returncode, "another run" in done.stderr) == (2, True)
    assert (left / "model-00001-of-00009.safetensors").exists()
    assert d2moe_here("export", compressed, tmp_path / "out").returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 1
