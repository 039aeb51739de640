"""`torchrun --nproc-per-node 2 d2moe compress`: the same result, each with its share of the memory, one voice."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from compression import ROOT, TINY, d2moe_here, script
from safetensors.torch import load_file, save_file

from d2moe_vllm.format.files import read_config
from d2moe_vllm.format.kinds import ROLES
from offline.checkpoint.reconstruction import Reconstruction
from offline.io.shards import Reader
from offline.work.workdir import WorkDir

FEW = ("--ratio", "0.4", "--windows", "8", "--seq-len", "64")
MEMORY = 1_700_000_000
MEASURED = """
import json, os, sys
from offline.cli import main
from offline.io.memory import peak_memory
try:
    main(sys.argv[2:])
finally:
    with open(f"{sys.argv[1]}/{os.environ['RANK']}.json", "w") as file:
        json.dump(peak_memory(), file)
"""
"""Runs the command and writes down what this process held at its worst moment."""


def torchrun(*arguments: object) -> list[str]:
    return [script("torchrun"), "--nproc-per-node", "2", *map(str, arguments)]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = torchrun(*arguments)
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=300, cwd=ROOT, env=environment)


def d2moe_twice(*arguments: object) -> subprocess.CompletedProcess[str]:
    return run(script("d2moe"), *arguments)


def same(first: Path, second: Path, tolerance: float = 1e-4) -> None:
    """Equal structure, kept columns, and reconstructions to `tolerance` (of float32 checkpoints: in bfloat16 the
    last bit of a factor is 4e-3, and sums made in another order tip some of them)."""
    config = read_config(first)
    assert read_config(second) == config
    readers = [Reader(folder) for folder in (first, second)]
    for name, spec in readers[0].specs.items():
        if spec.dtype == "I32":
            assert torch.equal(*(reader.tensor(name) for reader in readers)), name
    one, two = (Reconstruction(reader, config, torch.float64) for reader in readers)
    for layer in config.layers:
        for role in ROLES:
            for expert in range(config.num_experts):
                expected, found = (rebuilt.weight(layer, expert, role) for rebuilt in (one, two))
                assert (found - expected).norm() <= tolerance * expected.norm(), (layer, expert, role)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model in float32."""
    folder = tmp_path_factory.mktemp("wide") / "tiny"
    shutil.copytree(TINY, folder)
    tensors = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_two_processes_give_what_one_gives_each_with_its_share_of_memory(
    wide: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "measured.py").write_text(MEASURED)
    text = ("--calibration", texts[0], *FEW)
    arguments = ("compress", wide, tmp_path / "tiny", *text, "--memory", MEMORY)
    done = run(tmp_path / "measured.py", tmp_path, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)  # printed once
    done = d2moe_here("compress", wide, tmp_path / "one", *text)
    assert done.returncode == 0, done.stderr
    same(tmp_path / "one", tmp_path / "tiny")
    peaks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert result["predicted"]["peak_memory_bytes"] <= MEMORY / 2
    assert all(200e6 < peak <= MEMORY / 2 for peak in peaks), peaks
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.json", "1.json", "measured.py", "one", "tiny"]


RECIPES: dict[str, dict[str, Any]] = {
    "share-v": {"delta": {"share_v": True}},
    "ties": {"base": {"merge": "ties"}},
    "regmean-shared-u-trim": {"base": {"merge": "regmean"}, "delta": {"distinct_u": 3, "trim": 1}},
    "adaptive-follows": {"allocation": "adaptive", "calibration": {"inputs": "compressed"}},
    "moe-svd": {"method": "moe-svd", "delta": {"distinct_u": 5}},
    "mobe": {"method": "mobe", "mobe": {"max_steps": 3}},
    "mobe-pooled": {"method": "mobe", "mobe": {"max_steps": 3, "weighting": "pooled", "bases": 4, "groups": 2}},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_two_processes_give_what_one_gives(name: str, wide: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPES[name]))
    arguments = ("--recipe", recipe, "--calibration", texts[0], *FEW)
    done = d2moe_here("compress", wide, tmp_path / "one", *arguments)
    assert done.returncode == 0, done.stderr
    done = d2moe_twice("compress", wide, tmp_path / "two", *arguments)
    assert done.returncode == 0, done.stderr
    # Adam divides a gradient by its own size, and so amplifies what the order of sums leaves.
    same(tmp_path / "one", tmp_path / "two", 1e-3 if name.startswith("mobe") else 1e-4)


def said(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What the command itself had to say; torchrun adds its own account of which process ended how."""
    assert done.stdout == ""
    assert done.returncode != 0
    assert done.stderr.count("Traceback") <= 1, done.stderr  # torchrun's own
    return [line for line in done.stderr.splitlines() if line.startswith("d2moe: ")]


def test_bad_input_is_one_line_once(texts: tuple[Path, Path], tmp_path: Path) -> None:
    calibration = ("--calibration", texts[0], *FEW)
    (line,) = said(d2moe_twice("compress", tmp_path / "nothing", tmp_path / "out", *calibration))
    assert "nothing is neither a folder nor a Hub id" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("expert", [4, 5])
def test_a_nan_that_one_process_meets_is_one_line_once(expert: int, texts: tuple[Path, Path], tmp_path: Path) -> None:
    """Both may be the first to meet it, and the other one must not add what it suffers from that."""
    source = tmp_path / "source"
    shutil.copytree(TINY, source)
    tensors = load_file(source / "model.safetensors")
    name = f"model.layers.2.block_sparse_moe.experts.{expert}.w3.weight"
    tensors[name][3, 5] = torch.nan
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    (line,) = said(d2moe_twice("compress", source, tmp_path / "out", "--calibration", texts[0], *FEW))
    assert name in line
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("victims", ["all", "one"])
def test_a_killed_run_of_two_ends_in_the_same_bytes(victims: str, texts: tuple[Path, Path], tmp_path: Path) -> None:
    """one: the process that is left ends too, with a line at most."""
    arguments = ["compress", TINY, tmp_path / "tiny", "--calibration", texts[0], *FEW]
    assert d2moe_twice("compress", TINY, tmp_path / "whole", *arguments[3:]).returncode == 0
    point = tmp_path / "tiny.d2moe-work" / "layers" / "00002" / "00004-w13.safetensors"
    with (tmp_path / "log").open("w") as log:
        command, environment = torchrun(script("d2moe"), *arguments), {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        deadline = time.monotonic() + 120
        while not point.exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.0005)
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(workers) == 2
        for worker in (int(workers[1]),) if victims == "one" else (*map(int, workers), process.pid):
            os.kill(worker, signal.SIGKILL)
        assert process.wait(timeout=60) != 0
    if victims == "one":
        text = (tmp_path / "log").read_text()
        assert text.count("Traceback") <= 1  # torchrun's own
        said = [line for line in text.splitlines() if line.startswith("d2moe: ")]
        assert not said or "another process of this run has ended" in said[0]
        assert len(said) <= 1
    assert not (tmp_path / "tiny").exists()
    alone = d2moe_here(*arguments)  # one process would make its sums in another order
    assert alone.returncode == 2
    assert "processes 2 -> 1" in alone.stderr
    done = d2moe_twice(*arguments)
    assert done.returncode == 0, done.stderr
    assert "resuming" in done.stderr
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "tiny" / path.name).read_bytes(), path.name


def test_the_working_folder_is_locked_for_others(tmp_path: Path) -> None:
    """A second run, of however many processes, is refused while one is at work."""
    work = WorkDir(tmp_path / "work", {})
    arguments = (TINY, tmp_path / "out", "--workdir", tmp_path / "work", "--calibration", TINY / "README.md")
    done = d2moe_here("compress", *arguments, "--ratio", "0.4", "--windows", "1", "--seq-len", "16")
    assert done.returncode == 2
    assert "another run is using" in done.stderr
    work.close()
