"""Others at the same folders at the same time: one of two runs does it, the other says why not."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from compression import script
from families import change_config
from hostile import WINDOWS, Disk, compress, digests, refused
from processes import Compression


def test_two_runs_at_once_on_one_result(olmoe: Path, few_words: Path, tmp_path: Path) -> None:
    """With a working folder each, so that nothing but the result's name keeps them apart."""
    assert compress(olmoe, tmp_path / "alone", few_words).returncode == 0
    arguments = [
        "compress",
        olmoe,
        tmp_path / "out",
        "--ratio",
        "0.08",
        "--bits",
        "16",
        "--calibration",
        few_words,
        *WINDOWS,
    ]
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
    source: Path, few_words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch)
    disk.fill(at=30)
    refused(compress(source, tmp_path / "out", few_words))
    disk.fill(at=0)
    change_config(source, num_experts_per_tok=1)
    done = compress(source, tmp_path / "out", few_words)
    assert done.returncode == 0, done.stderr
    assert "source changed since the interrupted run: starting over" in " ".join(done.stderr.split())
    assert compress(source, tmp_path / "fresh", few_words).returncode == 0
    assert digests(tmp_path / "out") == digests(tmp_path / "fresh")


GIVEN = ("--ratio", "0.08", *WINDOWS)


def test_two_runs_at_once_on_one_working_folder(olmoe: Path, few_words: Path, tmp_path: Path) -> None:
    """The second while the first is in the middle of its work, held there: the second says that the first has the lock
    and changes nothing, the first ends well."""
    given = (*GIVEN, "--calibration", few_words)
    first = Compression(olmoe, tmp_path / "out", *given)
    assert first.wait_for_work()
    first.send(signal.SIGSTOP)
    try:
        before = sorted(tmp_path.rglob("*"))
        refused(Compression(olmoe, tmp_path / "out", *given).end(), f"another run is using {first.work}")
        assert sorted(tmp_path.rglob("*")) == before
    finally:
        first.send(signal.SIGCONT)
    done = first.end()
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def change(source: Path) -> None:
    """One bit of the last tensor in the file, where it lies."""
    with (source / "model.safetensors").open("r+b") as file:
        file.seek(-2, os.SEEK_END)
        (byte,) = file.read(1)
        file.seek(-2, os.SEEK_END)
        file.write(bytes([byte ^ 1]))


def test_a_weight_that_changes_between_two_runs_starts_over(
    source: Path, few_words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch)
    disk.fill(at=30)
    refused(compress(source, tmp_path / "out", few_words))
    disk.fill(at=0)
    change(source)
    done = compress(source, tmp_path / "out", few_words)
    assert done.returncode == 0, done.stderr
    assert "source changed since the interrupted run: starting over" in " ".join(done.stderr.split())
    assert compress(source, tmp_path / "fresh", few_words).returncode == 0
    assert digests(tmp_path / "out") == digests(tmp_path / "fresh")


@pytest.mark.parametrize("moment", ["layers/*/facts.safetensors", "layers/00000/00000*.safetensors"])
def test_a_weight_that_changes_while_it_is_compressed_is_refused(
    moment: str, source: Path, few_words: Path, tmp_path: Path
) -> None:
    """In the first layer's work, and in the last one's. The same command then starts over."""
    given = (*GIVEN, "--calibration", few_words)
    run = Compression(source, tmp_path / "out", *given)
    assert run.wait_for(lambda: list(run.work.glob(moment)))
    run.send(signal.SIGSTOP)
    change(source)
    run.send(signal.SIGCONT)
    refused(run.end(), str(source / "model.safetensors"), "was changed while it was being compressed", "start over")
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out.d2moe-work"}
    done = Compression(source, tmp_path / "out", *given).end()
    assert done.returncode == 0, done.stderr
    assert "source changed since the interrupted run: starting over" in " ".join(done.stderr.split())
    fresh = Compression(source, tmp_path / "fresh", *given)
    assert fresh.end().returncode == 0
    assert digests(tmp_path / "out") == digests(tmp_path / "fresh")
