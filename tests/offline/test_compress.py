"""`d2moe compress` end to end on the bundled model: what is written, reproducibly, through kills, or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from compression import COMPRESS, TINY, d2moe, d2moe_here
from filelock import FileLock
from processes import Compression
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from d2moe_vllm.format.files import read_config
from d2moe_vllm.format.kinds import DTYPE_BYTES
from offline.io.shards import Reader


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_inspect_prints_what_is_on_disk_to_the_byte(compressed: Path) -> None:
    content = json.loads(d2moe("inspect", compressed, "--json").stdout)
    on_disk = sum(path.stat().st_size for path in compressed.glob("*.safetensors"))
    source = sum(path.stat().st_size for path in TINY.glob("*.safetensors"))
    assert content["bytes"] == on_disk
    assert content["source"]["bytes"] == source
    assert content["stored_ratio"] == 1 - on_disk / source
    assert 0.4 <= content["stored_ratio"] < 0.402
    parameters = 0
    for path in compressed.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            parameters += sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    assert content["parameters"] == parameters
    assert "0.40" in d2moe_here("inspect", compressed).stdout


def test_plan_predicts_the_bytes(compressed: Path) -> None:
    """Adaptive ranks are decided by the calibration; a plan says so and gives what is used up at most."""
    done = d2moe_here("plan", TINY, *COMPRESS, "--json")
    plan = json.loads(done.stdout)
    on_disk = sum(path.stat().st_size for path in compressed.glob("*.safetensors"))
    assert not plan["result"]["final"]
    assert max(plan["result"]["bytes"], on_disk) <= 0.6 * plan["source"]["bytes"]
    assert plan["result"]["bytes"] == pytest.approx(on_disk, rel=2e-3)
    assert plan["peak_memory_bytes"] > 0
    assert plan["disk_bytes"]["work"] > 0


def test_all_but_the_experts_is_kept_to_the_byte(compressed: Path) -> None:
    source, result = Reader(TINY), Reader(compressed)
    others = [name for name in source.specs if ".experts." not in name]
    assert len(others) == 31
    for name in others:
        assert result.specs[name] == source.specs[name]
        assert torch.equal(result.tensor(name).view(torch.uint8), source.tensor(name).view(torch.uint8))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        assert (compressed / name).read_bytes() == (TINY / name).read_bytes()
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (TINY, compressed))
    assert {key: after[key] for key in before} == before
    assert set(after) - set(before) == {"quantization_config", "auto_map"}


def test_recipe_and_statistics_travel_along(compressed: Path) -> None:
    recipe = yaml.safe_load((compressed / "d2moe_recipe.yaml").read_text())
    assert recipe["ratio"] == 0.4
    assert recipe["calibration"] == {"windows": 32, "seq_len": 128, "seed": 0, "inputs": "dense", "products": "float32"}
    assert recipe["delta"]["rank_multiple"] == 1
    stats = json.loads((compressed / "d2moe_stats.json").read_text())
    assert len(stats["calibration"]["tokens_sha256"]) == 64
    for layer in stats["layers"].values():
        assert sum(layer["tokens"]) == 32 * 128 * 2
        assert all(0 < error < 1 for errors in layer["relative_error"].values() for error in errors)
    card = (compressed / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert card.index("randomly initialised") < card.index("vllm serve")
    text = "".join(p.read_text(errors="ignore") for p in compressed.iterdir() if p.suffix in (".json", ".md", ".yaml"))
    assert str(TINY.parent) not in text
    assert str(compressed.parent) not in text


@pytest.mark.parametrize("name", ["compressed", "pruned"])
def test_deltas_are_far_from_zero_and_close_to_the_source(name: str, request: pytest.FixtureRequest) -> None:
    """The reconstruction, computed from the files alone, against the original experts."""
    folder: Path = request.getfixturevalue(name)
    config, source, result = read_config(folder), Reader(TINY), Reader(folder)
    for layer in config.layers:
        prefix = f"model.layers.{layer}.block_sparse_moe.experts"
        for projection in ("w1", "w2", "w3"):
            shared = f"{prefix}.0.{projection}"
            base = result.tensor(f"{shared}.base").double()
            columns = torch.arange(base.shape[1])
            if name == "pruned":
                columns = result.tensor(f"{shared}.base_columns").long()
                assert columns.diff().min() > 0
                assert torch.allclose(result.tensor(f"{shared}.base_norms").double(), base.norm(dim=0), rtol=1e-5)
            for expert in range(config.num_experts):
                weight = source.tensor(f"{prefix}.{expert}.{projection}.weight").double()
                u = result.tensor(f"{prefix}.{expert}.{projection}.delta_u").double()
                v = result.tensor(f"{prefix}.{expert}.{projection}.delta_v").double()
                full = u @ v
                full[:, columns] += base
                assert (weight - full).norm() < 0.65 * weight.norm()
                assert (weight - (full - u @ v)).norm() > (weight - full).norm()


def test_two_runs_give_the_same_bytes(compressed: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
    done = d2moe_here("compress", TINY, tmp_path / "again", "--calibration", texts[0], *COMPRESS)
    assert done.returncode == 0, done.stderr
    assert digests(tmp_path / "again") == digests(compressed)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again"]
    assert "vllm serve" in done.stdout
    for shown in ("layer 1/4", "elapsed", "left"):
        assert shown in done.stderr


KILL_POINTS = [
    pytest.param("tiny.d2moe-work/fingerprint.json", marks=pytest.mark.slow),
    pytest.param("tiny.d2moe-work/hidden-00000.rows", marks=pytest.mark.slow),
    pytest.param("tiny.d2moe-work/hidden-00002.rows", marks=pytest.mark.slow),
    pytest.param("tiny.d2moe-work/gradient-00004.rows", marks=pytest.mark.slow),
    pytest.param("tiny.d2moe-work/layers/00003/facts.safetensors", marks=pytest.mark.slow),
    pytest.param("tiny.d2moe-work/layers/00003/sensitivity.safetensors", marks=pytest.mark.slow),
    "tiny.d2moe-work/layers/00002/measured-00004.safetensors",
    pytest.param("tiny.d2moe-work/layers/00002/measured-done.safetensors", marks=pytest.mark.slow),
    pytest.param("tiny.d2moe-work/gradient-00001.rows", marks=pytest.mark.slow),
    pytest.param("tiny.d2moe-work/layers/00000/measured-done.safetensors", marks=pytest.mark.slow),
    pytest.param("tiny.d2moe-work/layers/00003/base.safetensors", marks=pytest.mark.slow),
    "tiny.d2moe-work/layers/00002/00004.safetensors",
    pytest.param("tiny.d2moe-work/layers/00002/written-done.safetensors", marks=pytest.mark.slow),
    pytest.param("tiny.d2moe-work/layers/00000/written-done.safetensors", marks=pytest.mark.slow),
    pytest.param(".tiny.partial", marks=pytest.mark.slow),
]
RESUMING = ("layers/00002", "layers/00000", "00003/base", "gradient-00001", "partial")
"""Points where at least one layer is done."""


@pytest.mark.parametrize("point", KILL_POINTS)
def test_a_killed_run_ends_in_the_same_bytes(
    point: str, compressed: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    """SIGKILL as soon as a file appears; then the same command again."""
    arguments = (TINY, tmp_path / "tiny", "--calibration", texts[0], *COMPRESS)
    killed = Compression(*arguments)
    assert killed.wait_for(lambda: list(tmp_path.glob(point))), f"the run ended before {point} appeared"
    assert killed.kill()
    assert not (tmp_path / "tiny").exists()
    done = Compression(*arguments).end()
    assert done.returncode == 0, done.stderr
    assert ("resuming" in done.stderr) == any(part in point for part in RESUMING)
    assert digests(tmp_path / "tiny") == digests(compressed)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny"]


def test_changed_calibration_starts_over_and_says_so(
    texts: tuple[Path, Path], tmp_path: Path, compressed: Path
) -> None:
    out, work = tmp_path / "tiny", tmp_path / "work"
    arguments = (TINY, out, "--calibration", texts[0], "--workdir", work, *COMPRESS)
    killed = Compression(*arguments, "--seed", "7")
    assert killed.wait_for((work / "hidden-00002.rows").exists)
    assert killed.kill()
    done = d2moe_here("compress", *arguments)
    assert done.returncode == 0, done.stderr
    assert "recipe and calibration changed since the interrupted run: starting over" in " ".join(done.stderr.split())
    assert digests(out) == digests(compressed)


def refused(done: subprocess.CompletedProcess[str], *fragments: str) -> None:
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    for fragment in fragments:
        assert fragment in done.stderr


def test_refusals_before_any_work(texts: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("too short " * 20)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("mine")
    other = tmp_path / "llama"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"model_type": "llama"}))
    gone = tmp_path / "gone"
    before = sorted(tmp_path.rglob("*"))

    def compress(*arguments: object) -> subprocess.CompletedProcess[str]:
        return d2moe_here("compress", *arguments, "--windows", "32", "--seq-len", "128")

    text = ("--calibration", texts[0])
    refused(compress(TINY, gone, "--ratio", "0.4", "--calibration", tmp_path / "short.txt"), "too short", "--windows")
    refused(compress(TINY, gone, "--ratio", "0.9", *text), "cannot be reached", "0.7")
    refused(compress(TINY, gone, *text), "--ratio")
    refused(compress(TINY, gone, "--ratio", "0.4"), "--calibration")
    refused(compress(TINY, gone, "--ratio", "1.5", *text), "ratio")
    refused(compress(TINY, tmp_path / "full", "--ratio", "0.4", *text), "exists")
    refused(compress(TINY, tmp_path / "no" / "where", "--ratio", "0.4", *text), "create it first")
    refused(compress(other, gone, "--ratio", "0.4", *text), "llama", "mixtral")
    refused(compress(tmp_path / "nothing", gone, "--ratio", "0.4", *text), "neither a folder nor a Hub id")
    refused(compress(TINY, gone, "--ratio", "0.4", *text, "--workdir", tmp_path / "full"), "not ours")
    refused(compress(TINY, gone, "--ratio", "0.4", "--calibration", tmp_path / "none.txt"), "cannot be read")
    refused(d2moe_here("compress", TINY, gone, "--ratio", "0.4", *text, "--seq-len", "4096"), "1024 positions")
    refused(d2moe_here("frobnicate"), "frobnicate")
    refused(d2moe_here("plan", TINY, "--ratio", "many"), "--ratio")
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "full" / "precious").read_text() == "mine"


def test_a_second_run_on_the_same_folder_is_refused(texts: tuple[Path, Path], tmp_path: Path) -> None:
    work = tmp_path / "tiny.d2moe-work"
    work.mkdir()
    with FileLock(work / ".d2moe-work"):
        done = Compression(TINY, tmp_path / "tiny", "--calibration", texts[0], *COMPRESS).end()
    refused(done, "another run")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    shutil.copytree(TINY, tmp_path / "source")
    return tmp_path / "source"


def test_damaged_sources_are_refused_by_name(source: Path) -> None:
    def plan() -> subprocess.CompletedProcess[str]:
        return d2moe_here("plan", source, "--ratio", "0.4")

    weights, config = source / "model.safetensors", source / "config.json"
    data, settings = weights.read_bytes(), json.loads(config.read_text())
    weights.write_bytes(data[:-100])
    refused(plan(), "truncated", "model.safetensors")
    weights.write_bytes(b"\xff" * 64)
    refused(plan(), "damaged", "model.safetensors")
    weights.unlink()
    refused(plan(), "no safetensors weights")
    weights.write_bytes(data)
    for change, fragment in [
        ({"num_key_value_heads": 4}, "k_proj"),
        ({"vocab_size": 5000}, "[4096, 128]"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok"),
        ({"hidden_act": "relu"}, "hidden_act"),
        ({"quantization_config": "x"}, "already"),
        ({"num_local_experts": 9}, "experts.8.w1.weight"),
        ({"num_local_experts": 7}, "experts.7.w1.weight"),
        ({"num_hidden_layers": 5}, "layers.4"),
        ({"intermediate_size": 512}, "[256, 128]"),
        ({"num_local_experts": None}, "num_local_experts"),
        ({"hidden_size": 10**9}, "hidden_size"),
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8"),
    ]:
        config.write_text(json.dumps(settings | change))
        refused(plan(), fragment)
    config.write_text("{")
    refused(plan(), "config.json")


def test_a_nan_in_one_weight_is_refused_by_name(source: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
    weights = source / "model.safetensors"
    data = bytearray(weights.read_bytes())
    name = "model.layers.2.block_sparse_moe.experts.5.w3.weight"
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    start = 8 + int.from_bytes(data[:8], "little") + header[name]["data_offsets"][0]
    assert DTYPE_BYTES[header[name]["dtype"]] == 2
    data[start : start + 2] = (0x7FC0).to_bytes(2, "little")
    weights.write_bytes(data)
    done = d2moe_here("compress", source, tmp_path / "out", "--calibration", texts[0], *COMPRESS)
    assert done.returncode == 2, done.stderr
    assert name in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_source_that_lacks_a_tensor_is_refused_before_any_work(source: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    for name in ("lm_head.weight", "model.norm.weight", "model.layers.3.self_attn.q_proj.weight"):
        save_file({n: t for n, t in tensors.items() if n != name}, source / "model.safetensors")
        refused(d2moe_here("plan", source, "--ratio", "0.4"), name, "download")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small filesystem needs root")
def test_a_disk_that_is_too_small_is_refused_before_any_work(texts: tuple[Path, Path], tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("this machine does not let us mount a tmpfs")
    try:
        refused(d2moe_here("compress", TINY, disk / "tiny", "--calibration", texts[0], *COMPRESS), "No space left")
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_fills_up_meanwhile_is_one_line_and_the_run_goes_on_later(
    texts: tuple[Path, Path], tmp_path: Path, compressed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    arguments = ["compress", TINY, tmp_path / "tiny", "--calibration", texts[0], *COMPRESS]
    with monkeypatch.context() as patch:
        patch.setattr("offline.work.workdir.write_tensors", full)
        done = d2moe_here(*arguments)
    assert done.returncode == 2
    assert "No space left" in done.stderr.splitlines()[-1]
    assert "continue" in done.stderr.splitlines()[-1]
    again = d2moe_here(*arguments)
    assert again.returncode == 0, again.stderr
    assert digests(tmp_path / "tiny") == digests(compressed)


def test_working_folder_and_result_keep_apart_and_nothing_foreign_is_deleted(
    texts: tuple[Path, Path], tmp_path: Path
) -> None:
    text = ("--ratio", "0.4", "--calibration", texts[0], "--windows", "8", "--seq-len", "64")
    work = tmp_path / "work"
    work.mkdir()
    refused(d2moe_here("compress", TINY, work / "out", *text, "--workdir", work), "inside one another")
    refused(d2moe_here("compress", TINY, tmp_path / "o", *text, "--workdir", tmp_path / "o"), "inside one another")
    (work / "lock").write_text("")
    (work / "thesis.tex").write_text("mine")
    refused(d2moe_here("compress", TINY, tmp_path / "o", *text, "--workdir", work), "not ours")
    assert (work / "thesis.tex").read_text() == "mine"
    (work / "lock").unlink()
    (work / "thesis.tex").unlink()
    done = d2moe_here("compress", TINY, tmp_path / "o", *text, "--workdir", work)
    assert done.returncode == 0, done.stderr
    assert list(work.iterdir()) == []  # the user's own folder stays


def test_a_run_begun_with_other_threads_is_not_thrown_away(texts: tuple[Path, Path], tmp_path: Path) -> None:
    work = tmp_path / "tiny.d2moe-work"
    text = ("--ratio", "0.4", "--calibration", texts[0], "--windows", "8", "--seq-len", "64")
    arguments = ["compress", TINY, tmp_path / "tiny", *text]
    killed = Compression(*arguments[1:])
    assert killed.wait_for((work / "hidden-00002.rows").exists)
    assert killed.kill()
    kept = json.loads((work / "fingerprint.json").read_text())
    kept["machine"]["threads"] = 77
    (work / "fingerprint.json").write_text(json.dumps(kept))
    refused(d2moe_here(*arguments), "threads 77", "--restart")
    assert (work / "hidden-00002.rows").exists()
    assert d2moe_here(*arguments, "--restart").returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


@pytest.mark.parametrize(
    "ratio", [pytest.param("0.2", marks=pytest.mark.slow), "0.4", pytest.param("0.6", marks=pytest.mark.slow)]
)
def test_the_default_beats_mean_base_and_plain_svd(texts: tuple[Path, Path], tmp_path: Path, ratio: str) -> None:
    recipe = tmp_path / "plain.yaml"
    recipe.write_text("base: {merge: mean}\ndelta: {method: svd}\n")
    perplexity = {}
    for name, extra in (("default", ()), ("plain", ("--recipe", recipe))):
        text = ("--ratio", ratio, "--calibration", texts[0], "--windows", "64", "--seq-len", "128", *extra)
        assert d2moe_here("compress", TINY, tmp_path / name, *text).returncode == 0
        done = d2moe_here("eval", tmp_path / name, "--text", texts[1], "--seq-len", "128", "--json")
        perplexity[name] = json.loads(done.stdout)["perplexity"]
    assert perplexity["default"] < perplexity["plain"]
