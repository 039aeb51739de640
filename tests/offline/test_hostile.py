"""Originals, machines and neighbours as they should not be: a finite result, or one line and exit code 2; and never
half of something in place of something good."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from compression import d2moe_here, script
from families import change_config, write_family
from safetensors.torch import load_file, save_file
from torch import Tensor

WINDOWS = ("--windows", "4", "--seq-len", "32")
EXPERT = "model.layers.1.mlp.experts.3"
LAYERS, EXPERTS = 2, 8
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="session")
def olmoe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family(tmp_path_factory.mktemp("olmoe") / "olmoe", "olmoe")


@pytest.fixture
def source(olmoe: Path, tmp_path: Path) -> Path:
    """A copy to be spoilt."""
    return shutil.copytree(olmoe, tmp_path / "source")


def edit(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def compress(source: Path, out: Path, text: Path, *more: object) -> subprocess.CompletedProcess[str]:
    return d2moe_here("compress", source, out, "--ratio", "0.08", "--calibration", text, *WINDOWS, *more)


def refused(done: subprocess.CompletedProcess[str], *fragments: str) -> None:
    """Exit 2, and the last line says why; before it there may be progress."""
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    said = [line for line in done.stderr.splitlines() if line.startswith("d2moe: ")]
    assert said == done.stderr.splitlines()[-1:], done.stderr
    for fragment in fragments:
        assert fragment in said[0]


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


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
RECIPES: dict[str, dict[str, Any]] = {
    "default": {},
    "regmean": {"base": {"merge": "regmean", "sparsity": 0}},
    "svd base, asvd": {"base": {"kind": "svd", "merge": "frequency"}, "delta": {"method": "asvd"}},
    "ties, prune": {"base": {"merge": "ties"}, "delta": {"method": "prune"}},
    "shared": {"delta": {"share_v": True, "distinct_u": 2, "trim": 2}, "calibration": {"inputs": "compressed"}},
    "merged": {"delta": {"distinct_u": 3, "shrinkage": 0}},
    "adaptive": {"allocation": "adaptive", "base": {"kind": "auto"}, "delta": {"shrinkage": 0}},
    "moe-svd": {"method": "moe-svd", "delta": {"distinct_u": 5}, "moe_svd": {"share_v": "refit"}},
    "mobe": {"method": "mobe", "mobe": {"max_steps": 30}},
    "mobe, plain": {"method": "mobe", "mobe": {"max_steps": 30, "weighting": "none", "function": "tanh"}},
}
CASES = [
    pytest.param(oddity, recipe, id=f"{oddity}-{recipe}", marks=[] if recipe == "default" else pytest.mark.slow)
    for oddity in ODDITIES
    for recipe in RECIPES
]


def finite_result(source: Path, out: Path) -> dict[str, Any]:
    """The checkpoint is sound, and so are its errors; its statistics."""
    done = d2moe_here("verify", out, "--source", source, "--json")
    found = json.loads(done.stdout)
    assert (done.returncode, found["problems"]) == (0, [])
    stats = json.loads((out / "d2moe_stats.json").read_text(), parse_constant=pytest.fail)
    for layer in stats["layers"].values():
        assert all(0 <= error < 2 for errors in layer["relative_error"].values() for error in errors)
    return stats


@pytest.mark.parametrize(("oddity", "recipe"), CASES)
def test_odd_weights_give_a_finite_result(
    oddity: str, recipe: str, source: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    edit(source, ODDITIES[oddity])
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPES[recipe]))
    done = compress(source, tmp_path / "out", texts[0], "--recipe", tmp_path / "recipe.yaml")
    assert done.returncode == 0, done.stderr
    stats = finite_result(source, tmp_path / "out")
    if oddity == "never routed":
        assert all(layer["tokens"][5] == 0 for layer in stats["layers"].values())


@pytest.mark.parametrize("recipe", [name if name == "default" else pytest.param(name, marks=pytest.mark.slow)
                                    for name in RECIPES])  # fmt: skip
@pytest.mark.parametrize("text", ["few tokens", "one token", "one token again and again"])
def test_odd_texts_give_a_finite_result(text: str, recipe: str, source: Path, tmp_path: Path) -> None:
    """Fewer tokens than dimensions; and constant activations, but for positions."""
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPES[recipe]))
    content, windows, length = {
        "few tokens": ("The reference manual describes the syntax and core semantics of the language.", 1, 8),
        "one token": ("the the the the", 1, 2),
        "one token again and again": ("the " * 400, 4, 32),
    }[text]
    (tmp_path / "text.txt").write_text(content)
    more = ("--recipe", tmp_path / "recipe.yaml", "--windows", windows, "--seq-len", length)
    done = compress(source, tmp_path / "out", tmp_path / "text.txt", *more)
    assert done.returncode == 0, done.stderr
    stats = finite_result(source, tmp_path / "out")
    assert sum(stats["layers"]["0"]["tokens"]) == windows * length * 2


def test_weights_at_the_end_of_float16(source: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
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
    done = compress(source, tmp_path / "out", texts[0])
    assert done.returncode == 0, done.stderr
    finite_result(source, tmp_path / "out")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPES["ties, prune"]))
    done = compress(source, tmp_path / "other", texts[0], "--recipe", tmp_path / "recipe.yaml")
    refused(done, "layer 1", "NaN or infinite")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    "name",
    [f"{EXPERT}.up_proj.weight", "model.layers.0.mlp.gate.weight", "model.layers.1.self_attn.k_proj.weight",
     "model.embed_tokens.weight", "lm_head.weight"],
)  # fmt: skip
def test_a_weight_that_is_no_number_is_named(
    name: str, value: float, source: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    edit(source, lambda tensors: tensors[name].view(-1)[7:8].fill_(value))
    refused(compress(source, tmp_path / "out", texts[0]), name, "NaN or infinite")
    assert not (tmp_path / "out").exists()


def test_activations_that_overflow_are_said_so(source: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
    edit(source, lambda tensors: [tensors[name].mul_(1e15) for name in tensors if name.startswith(EXPERT[:14])])
    refused(compress(source, tmp_path / "out", texts[0]), "layer", "text")
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


def cut(path: Path, keep: int) -> None:
    path.write_bytes(path.read_bytes()[:keep])


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
        "is not where",
    ),
    "the index points outside": (outside, "outside"),
    "the index points at an absolute path": (lambda f: point(f, "lm_head.weight", "/etc/passwd"), "/etc/passwd"),
    "the index points at no text": (lambda f: point(f, "lm_head.weight", 7), "lm_head.weight points at 7"),
    "the index lists a tensor that is not there": (lambda f: point(f, "model.ghost", SECOND), "model.ghost"),
    "the index is a list": (lambda f: (f / "model.safetensors.index.json").write_text("[]"), "weight_map"),
    "the index is not text": (lambda f: (f / "model.safetensors.index.json").write_bytes(b"\xff\xfe{"), "index.json"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_original_is_refused(name: str, shards: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
    assert d2moe_here("plan", shards, "--ratio", "0.08").returncode == 0
    damage, fragment = DAMAGES[name]
    damage(shards)
    before = sorted(tmp_path.iterdir())
    refused(d2moe_here("plan", shards, "--ratio", "0.08"), fragment)
    refused(compress(shards, tmp_path / "out", texts[0]), fragment)
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


# Disks


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    folder.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("only root, where mounts are allowed, can make a disk that is read-only for root too")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_read_only_disk_is_refused_before_any_work(olmoe: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "ro") as disk:
        refused(compress(olmoe, disk / "out", texts[0]), str(disk), "not writable")
        refused(compress(olmoe, tmp_path / "out", texts[0], "--workdir", disk / "work"), str(disk), "Read-only")
        assert [path.name for path in tmp_path.iterdir()] == ["disk"]


class Disk:
    """Counts what reserves or syncs bytes on disk, and is full at one such call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls, self.full_at = 0, 0
        for name in ("posix_fallocate", "fsync"):
            monkeypatch.setattr(os, name, self._wrap(getattr(os, name)))

    def _wrap(self, call: Callable[..., None]) -> Callable[..., None]:
        def counted(*arguments: Any) -> None:
            self.calls += 1
            if self.calls == self.full_at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            call(*arguments)

        return counted

    def fill(self, at: int) -> None:
        """Full at the `at`-th call from now; 0: never."""
        self.calls, self.full_at = 0, at


POINTS = 24


@pytest.mark.parametrize(
    "part", [part if part in (1, 9, 17, POINTS) else pytest.param(part, marks=pytest.mark.slow)
             for part in range(1, POINTS + 1)]
)  # fmt: skip
def test_a_disk_that_is_full_at_any_write_costs_nothing(
    part: int, olmoe: Path, texts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch)
    assert compress(olmoe, tmp_path / "whole", texts[0]).returncode == 0
    total, out = disk.calls, tmp_path / "out"
    assert total > POINTS
    disk.fill(at=total * part // POINTS)
    done = compress(olmoe, out, texts[0])
    if out.exists():  # full when all was there, and only the name was not safe yet
        assert digests(out) == digests(tmp_path / "whole")
        return
    refused(done, "No space left", "again")
    assert not (tmp_path / ".out.partial").exists()
    disk.fill(at=0)
    done = compress(olmoe, out, texts[0])
    assert done.returncode == 0, done.stderr
    assert digests(out) == digests(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


BROKEN_OFF = {**RECIPES, "no base": {"base": {"kind": "none"}, "delta": {"share_v": True}}}


@pytest.mark.parametrize(
    "recipe", [name if name == "shared" else pytest.param(name, marks=pytest.mark.slow) for name in BROKEN_OFF]
)
def test_a_run_that_is_broken_off_again_and_again_ends_in_the_same_bytes(
    recipe: str, olmoe: Path, texts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each time a little later, so that every kind of step is resumed after another one."""
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(BROKEN_OFF[recipe]))
    given, disk = (texts[0], "--recipe", tmp_path / "recipe.yaml"), Disk(monkeypatch)
    assert compress(olmoe, tmp_path / "whole", *given).returncode == 0
    out, breaks = tmp_path / "out", 0
    for at in range(11, 200, 3):
        disk.fill(at)
        done = compress(olmoe, out, *given)
        if not done.returncode:
            break
        refused(done, "No space left")
        breaks += 1
    assert breaks >= 4
    assert digests(out) == digests(tmp_path / "whole")


@pytest.mark.parametrize("pattern", ["layers/*/facts.safetensors", "layers/*/0000*.safetensors", "hidden-00000.rows"])
def test_a_damaged_working_folder_is_recognised(
    pattern: str, olmoe: Path, texts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No crash of ours leaves such files: each gets its name when it is whole and on disk. Others may."""
    disk, work = Disk(monkeypatch), tmp_path / "out.d2moe-work"
    assert compress(olmoe, tmp_path / "whole", texts[0]).returncode == 0
    disk.fill(at=disk.calls // 2)
    refused(compress(olmoe, tmp_path / "out", texts[0]))
    disk.fill(at=0)
    (victim, *_) = work.glob(pattern)
    cut(victim, victim.stat().st_size // 2)
    refused(compress(olmoe, tmp_path / "out", texts[0]), str(victim), "fingerprint.json")
    (work / "fingerprint.json").unlink()
    done = compress(olmoe, tmp_path / "out", texts[0])
    assert done.returncode == 0, done.stderr
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


# Neighbours


def test_two_runs_at_once_on_one_result(olmoe: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
    """With a working folder each, so that nothing but the result's name keeps them apart."""
    assert compress(olmoe, tmp_path / "alone", texts[0]).returncode == 0
    arguments = ["compress", olmoe, tmp_path / "out", "--ratio", "0.08", "--calibration", texts[0], *WINDOWS]
    runs = [
        subprocess.Popen(
            [script("d2moe"), *map(str, arguments), "--workdir", str(tmp_path / f"work-{number}")],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        )
        for number in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=240)[1] for process in runs]
    codes = [process.returncode for process in runs]
    assert sorted(codes) == [0, 2], said
    loser = said[codes.index(2)].strip().splitlines()
    assert [line for line in loser if line.startswith("d2moe: ")] == loser[-1:]
    assert any(words in loser[-1] for words in ("exists already", "appeared meanwhile", "is writing"))
    assert digests(tmp_path / "out") == digests(tmp_path / "alone")
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name]


def test_a_configuration_that_changes_meanwhile_starts_over(
    source: Path, texts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch)
    disk.fill(at=30)
    refused(compress(source, tmp_path / "out", texts[0]))
    disk.fill(at=0)
    change_config(source, rms_norm_eps=1e-3)
    done = compress(source, tmp_path / "out", texts[0])
    assert done.returncode == 0, done.stderr
    assert "source changed since the interrupted run: starting over" in " ".join(done.stderr.split())
    assert compress(source, tmp_path / "fresh", texts[0]).returncode == 0
    assert digests(tmp_path / "out") == digests(tmp_path / "fresh")
