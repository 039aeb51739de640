"""What `vllm serve` says of damaged checkpoints, and that nothing of a server or the demo is left behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from compression import ROOT, TINY
from processes import processes
from safetensors.torch import load_file, save_file

from offline.compare.server import Server, ServerError


def test_a_missing_attention_tensor_stops_vllm_serve_with_its_name(compressed: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(compressed, damaged)
    name = "model.layers.1.self_attn.k_proj.weight"
    (file,) = damaged.glob("*.safetensors")
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    marker = f"d2moe-test-{tmp_path}"
    with pytest.raises(ServerError) as caught, Server(damaged, log=tmp_path / "log", env={"MARKER": marker}):
        pass
    assert "exited with 1" in str(caught.value)
    log = (tmp_path / "log").read_text()
    assert f"1 tensors missing: {name}" in log
    assert processes(marker) == []


@pytest.mark.slow
@pytest.mark.parametrize("when", ["starting", "Available routes"])
def test_the_demo_leaves_nothing_behind_when_interrupted(when: str, tmp_path: Path) -> None:
    """Ctrl-C (to the whole foreground group, as a terminal does it) while the server starts."""
    copy = tmp_path / "project"
    copy.mkdir()
    for name in ("examples", "offline", "d2moe_vllm"):
        shutil.copytree(ROOT / name, copy / name)
    marker = f"d2moe-test-{tmp_path}"
    process = subprocess.Popen(
        [sys.executable, "examples/demo.py"],
        cwd=copy,
        env={**os.environ, "MARKER": marker, "PYTHONPATH": str(copy)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    log = copy / "build" / "demo" / "server.log"
    deadline = time.monotonic() + 300
    wanted = "Initializing a V1 LLM engine" if when == "starting" else when
    while not (log.exists() and wanted in log.read_text(errors="replace")):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert processes(marker)
    if when == "starting":
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.terminate()
    output = process.communicate(timeout=60)[0]
    assert process.returncode not in (0, None)
    assert "Traceback" not in output
    assert processes(marker) == []


def test_a_killed_parent_takes_its_server_along(tmp_path: Path) -> None:
    marker = f"d2moe-test-{tmp_path}"
    code = (
        "import sys, pathlib; from offline.compare.server import Server\n"
        f"Server(pathlib.Path({str(TINY)!r}), log=pathlib.Path({str(tmp_path / 'log')!r})).__enter__()\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "MARKER": marker}, cwd=ROOT)
    while len(processes(marker)) < 2:
        assert parent.poll() is None
        time.sleep(0.1)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 60
    while processes(marker):
        assert time.monotonic() < deadline, processes(marker)
        time.sleep(0.2)
