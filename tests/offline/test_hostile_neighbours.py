"""Others at the same folders at the same time: one of two runs does it, the other says why not."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
from compression import script
from families import change_config
from hostile import WINDOWS, Disk, compress, digests, refused


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
