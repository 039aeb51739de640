"""Few bits, unequal widths and a base under one price (METHODS 4): the default of `compress`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from compression import TINY, d2moe_here
from families import write_family
from hostile import digests
from processes import Compression
from safetensors.torch import load_file, save_file

from d2moe_vllm.format.config import STATS_FILE
from d2moe_vllm.format.files import check_checkpoint
from d2moe_vllm.format.kinds import ROLES, STORAGES, width
from offline.io.shards import Reader
from offline.plan.make import make_plan
from offline.plan.plan import Plan
from offline.plan.recipe import Recipe
from offline.source.dense import open_dense
from offline.work.workdir import WorkDir

FEW = ("--windows", "16", "--seq-len", "128")


def command(*arguments: object) -> dict[str, Any]:
    done = d2moe_here(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, texts: tuple[Path, Path]) -> Path:
    """The bundled model at 61 %, where its experts keep a seventh of their bytes. Not to be changed."""
    out = tmp_path_factory.mktemp("priced") / "tiny"
    command("compress", TINY, out, "--ratio", "0.61", *FEW, "--calibration", texts[0])
    return out


def test_the_files_are_as_large_as_asked(small: Path) -> None:
    content = command("inspect", small)
    size = sum(path.stat().st_size for path in small.glob("*.safetensors"))
    assert content["bytes"] == size
    assert 0.61 <= content["stored_ratio"] < 0.615
    config = check_checkpoint(small)
    assert content["experts"]["bytes"] == sum(spec.nbytes for spec in config.expert_tensors().values())
    done = d2moe_here("verify", small, "--source", TINY)
    assert done.returncode == 0, done.stderr + done.stdout


def test_what_was_chosen_is_said_in_words(small: Path) -> None:
    said = command("inspect", small)["stores"]
    config = check_checkpoint(small)
    bits = {STORAGES[layer[role].delta_storage.type].bits for layer in config.layers.values() for role in ROLES}
    assert all(f"{one}-bit" in said for one in bits)
    kept = sum(width(layer, e, 256) for layer in config.layers.values() for e in range(8)) / (4 * 8 * 256)
    assert kept < 1
    assert said.endswith(f"; {100 * kept:.0f} % of the channels")
    assert said in (small / "README.md").read_text()
    assert said in d2moe_here("inspect", small).stdout.replace("\n", " ")


def test_the_checkpoint_computes_what_its_export_does(small: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
    command("export", small, tmp_path / "dense")
    given = ("--text", texts[1], "--seq-len", "128", "--windows", "16")
    ours, dense = (command("eval", folder, *given)["perplexity"] for folder in (small, tmp_path / "dense"))
    # The export rounds base and delta together, once more, to bfloat16.
    assert ours == pytest.approx(dense, rel=5e-3)


@pytest.mark.parametrize("family", ["mixtral", "nemotron_h"])
def test_errors_of_a_float32_model_are_those_of_its_files(family: str, few_words: Path, tmp_path: Path) -> None:
    """Whose weights need no copy to be computed with: in 8 bits nobody is a hundredth off."""
    source = write_family(tmp_path / "source", family, dtype=torch.float32)
    given = ("--ratio", "0.03", "--bits", "8", "--windows", "4", "--seq-len", "32", "--calibration", few_words)
    command("compress", source, tmp_path / "ours", *given)
    told = json.loads((tmp_path / "ours" / STATS_FILE).read_text())["layers"].values()
    errors = [error for layer in told for of_role in layer["relative_error"].values() for error in of_role]
    assert 1e-4 < min(errors) <= max(errors) < 0.02
    assert all(set(layer["relative_error"]) == set(check_checkpoint(tmp_path / "ours").roles) for layer in told)


@pytest.mark.parametrize("ratio", ["0.2", "0.5"])
def test_never_worse_than_low_rank_at_no_more_bytes(ratio: str, texts: tuple[Path, Path], tmp_path: Path) -> None:
    found = {}
    for bits in ("auto", "16"):
        given = ("--ratio", ratio, "--bits", bits, *FEW, "--calibration", texts[0])
        result = command("compress", TINY, tmp_path / bits, *given)["result"]
        assert result["stored_ratio"] >= float(ratio)
        evaluated = command("eval", tmp_path / bits, "--text", texts[1], "--seq-len", "128", "--windows", "32")
        found[bits] = evaluated["perplexity"]
    assert found["auto"] < found["16"]


def test_more_bytes_than_8_bits_take_are_not_spent(texts: tuple[Path, Path], tmp_path: Path) -> None:
    planned = command("plan", TINY, "--ratio", "0.2", *FEW)["result"]
    done = d2moe_here("compress", TINY, tmp_path / "out", "--ratio", "0.2", *FEW, "--calibration", texts[0])
    assert done.returncode == 0, done.stderr
    assert "smaller than asked for: more bytes would save nothing that can be measured" in done.stdout
    assert "plain 8-bit experts" in done.stdout
    content = command("inspect", tmp_path / "out")
    assert content["stores"] == planned["stores"] == "no base, 8-bit experts"
    assert content["bytes"] == planned["bytes"]


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("bits", "ratio", "types"),
    [
        pytest.param(8, 0.2, {"int8"}, marks=SLOW),
        pytest.param(4, 0.55, {"int4"}, marks=SLOW),
        pytest.param(3, 0.55, {"int3"}, marks=SLOW),
        pytest.param(2, 0.62, {"int2"}, marks=SLOW),
        (16, 0.3, {None}),
    ],
)
def test_bits_that_are_asked_for_are_those_of_every_delta(
    bits: int, ratio: float, types: set[str | None], texts: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"bits": bits, "delta": {"method": "dense"}}))
    given = ("--ratio", ratio, "--recipe", tmp_path / "recipe.yaml", "--windows", "8", "--seq-len", "64")
    command("compress", TINY, tmp_path / "out", *given, "--calibration", texts[0])
    config = check_checkpoint(tmp_path / "out")
    storages = [layer[role].delta_storage for layer in config.layers.values() for role in ROLES]
    assert {None if one is None else one.type for one in storages} == types
    assert 1 - Reader(tmp_path / "out").nbytes / config.source.bytes >= ratio


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--bits", "4", "--accounting", "paper"), "accounting paper does not go with bits 4"),
        (("--bits", "auto", "--scope", "token"), "scope token does not go with bits auto"),
        (("--bits", "auto", "--method", "mobe"), "bits auto chooses among whole deltas of method d2"),
        (("--bits", "5"), "bits: Input should be"),
        (("--bits", "four"), "bits: Input should be"),
    ],
)
def test_conflicts_are_one_line(arguments: tuple[str, ...], words: str, tmp_path: Path) -> None:
    done = d2moe_here("compress", TINY, tmp_path / "out", "--ratio", "0.4", *arguments, "--calibration", TINY)
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_sizes_that_no_group_divides(family: str, few_words: Path, tmp_path: Path) -> None:
    """64 inputs and fewer channels than that: a row of down is one short group."""
    source = write_family(tmp_path / "source", family)
    given = ("--ratio", "0.08", "--bits", "3", "--windows", "4", "--seq-len", "32", "--calibration", few_words)
    command("compress", source, tmp_path / "out", *given)
    done = d2moe_here("verify", tmp_path / "out", "--source", source)
    assert done.returncode == 0, done.stdout


def test_experts_that_see_nothing_and_weights_that_are_zero(texts: tuple[Path, Path], tmp_path: Path) -> None:
    """One expert is never routed to, another's gate is zero, so that its Gram is, a third's weights are all zero, and a
    fourth's so small that float16 would not hold their scales."""
    source = tmp_path / "source"
    source.mkdir()
    for path in TINY.iterdir():
        if path.name != "model.safetensors" and path.is_file():
            (source / path.name).write_bytes(path.read_bytes())
    tensors = load_file(TINY / "model.safetensors")
    prefix = "model.layers.1.block_sparse_moe"
    router = tensors[f"{prefix}.gate.weight"]
    for first in (1, 3, 5):  # pairs that come first together: the mean of the pairs is never among the first two
        router[first + 1] = router[first]
    router[0] = router[7] = router[1:7].float().mean(dim=0).to(router.dtype)
    tensors[f"{prefix}.experts.1.w1.weight"].zero_()
    for name in ("w1", "w2", "w3"):
        tensors[f"{prefix}.experts.2.{name}.weight"].zero_()
    tensors[f"{prefix}.experts.3.w2.weight"] *= 1e-9
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    given = ("--ratio", "0.58", "--windows", "8", "--seq-len", "64", "--calibration", texts[0])
    command("compress", source, tmp_path / "out", *given)
    done = d2moe_here("verify", tmp_path / "out", "--source", source)
    assert done.returncode == 0, done.stdout
    layer = json.loads((tmp_path / "out" / STATS_FILE).read_text())["layers"]["1"]
    assert layer["tokens"][0] == layer["tokens"][7] == 0
    assert min(layer["tokens"][1:7]) > 0
    command("export", tmp_path / "out", tmp_path / "dense")
    dense, kept = Reader(tmp_path / "dense"), Reader(source)
    expert = prefix + ".experts.{}.{}.weight"
    # What is zero stays zero. Without a gate an expert gives nothing, whatever the others of its matrices become.
    for name in ("w1", "w2", "w3"):
        assert not dense.tensor(expert.format(2, name)).any()
    assert not (dense.tensor(expert.format(1, "w1")).any() and dense.tensor(expert.format(1, "w2")).any())
    # What gives next to nothing costs next to nothing to drop; what is kept of it is no larger than it was.
    before, after = (reader.tensor(expert.format(3, "w2")).float().norm() for reader in (kept, dense))
    assert after <= 2 * before
    found = command("eval", tmp_path / "out", "--text", texts[1], "--seq-len", "64", "--windows", "8")["perplexity"]
    whole = command("eval", source, "--text", texts[1], "--seq-len", "64", "--windows", "8")["perplexity"]
    assert found < 1.3 * whole


def test_what_waits_on_disk_changes_no_byte(
    small: Path, texts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Moments that an expert is asked for twice are kept where that is cheaper; made twice they are the same."""
    kept = []
    save = WorkDir.save_part
    monkeypatch.setattr(WorkDir, "save_part", lambda self, *args: kept.append(args[1]) or save(self, *args))
    monkeypatch.setattr(Plan, "keeps", lambda plan, site: False)
    command("compress", TINY, tmp_path / "tiny", "--ratio", "0.61", *FEW, "--calibration", texts[0])
    assert not [part for part in kept if part.startswith(("gram-", "outputs-"))]
    assert digests(tmp_path / "tiny") == digests(small)


def test_what_waits_on_disk_is_less_than_what_it_is_made_of(texts: tuple[Path, Path]) -> None:
    """2,048 tokens of which every expert sees a quarter: 512 rows, twice as many as down has inputs."""
    plans = {
        windows: make_plan(open_dense(str(TINY)), Recipe(ratio=0.6, calibration={"windows": windows, "seq_len": 128}))
        for windows in (16, 15, 8, 7)
    }
    assert [plan.keeps("middle") for plan in plans.values()] == [True, False, False, False]
    assert [plan.keeps("input") for plan in plans.values()] == [True, True, True, False]


KILL_POINTS = [
    pytest.param("tiny.d2moe-work/layers/00002/measured-00004.safetensors", marks=pytest.mark.slow),
    pytest.param("tiny.d2moe-work/layers/00000/measured-done.safetensors", marks=pytest.mark.slow),
    pytest.param("tiny.d2moe-work/layers/00002/gram-middle-00004.safetensors", marks=pytest.mark.slow),
    pytest.param("tiny.d2moe-work/layers/00002/outputs-00004.safetensors", marks=pytest.mark.slow),
    pytest.param("tiny.d2moe-work/layers/00003/base-w13.safetensors", marks=pytest.mark.slow),
    "tiny.d2moe-work/layers/00002/00004-w13.safetensors",
    pytest.param("tiny.d2moe-work/layers/00002/base-w2.safetensors", marks=pytest.mark.slow),
    pytest.param("tiny.d2moe-work/layers/00002/00004-w2.safetensors", marks=pytest.mark.slow),
    pytest.param("tiny.d2moe-work/layers/00000/written-done.safetensors", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("point", KILL_POINTS)
def test_a_killed_run_ends_in_the_same_bytes(point: str, small: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
    """SIGKILL as soon as a file appears; then the same command again."""
    arguments = (TINY, tmp_path / "tiny", "--ratio", "0.61", *FEW, "--calibration", texts[0])
    killed = Compression(*arguments)
    assert killed.wait_for(lambda: list(tmp_path.glob(point))), f"the run ended before {point} appeared"
    assert killed.kill()
    assert not (tmp_path / "tiny").exists()
    done = Compression(*arguments).end()
    assert done.returncode == 0, done.stderr
    assert digests(tmp_path / "tiny") == digests(small)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny"]
