"""A worker keeps what the checkpoint stores, packed copies included, and nothing beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from compression import d2moe_here
from engine import TWO_RANKS, run_engine
from synthetic_mixtral import Size, write_compressed, write_dense

from d2moe_vllm.format.files import read_config, read_manifest
from d2moe_vllm.format.kinds import TensorSpec

CLOSE = 0.03
SIZE = Size(hidden=1024, intermediate=2048, experts=8, layers=1)
"""122 MB dense, 50 MB of it left: so much that neither rounding to the kernels' blocks nor a rotary table (0.5 MB, not
stored in any checkpoint) is of weight."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_compressed(write_dense(tmp_path_factory.mktemp("storage"), SIZE), 0.6)


def stored(checkpoint: Path) -> dict[str, Any]:
    """What `d2moe inspect --json` says."""
    done = d2moe_here("inspect", checkpoint, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def live(folder: Path, checkpoint: Path, env: dict[str, str], **llm: Any) -> list[dict[str, int]]:
    """`live_storage` of every worker, after a token has been computed."""
    folder.mkdir()
    llm = {"dtype": "bfloat16", "enforce_eager": True, **llm}
    code, log, output = run_engine(folder, checkpoint, env, storage=True, max_tokens=1, llm=llm)
    assert code == 0, log[-5000:]
    return json.loads(output.read_text())


def replicated(checkpoint: Path) -> tuple[int, int]:
    """Bytes that every tensor-parallel rank has as a whole, by design: of experts, and of all else.

    V of gate and up, whose inputs are not divided, and U of down, whose outputs are not; which input columns gate and
    up use; norms and routers.
    """
    config, manifest = read_config(checkpoint), read_manifest(checkpoint)
    experts = 0
    for name, spec in config.expert_tensors().items():
        projection, kind = name.split(".")[-2:]
        down = projection == config.projections["down"]
        if kind in (("delta_u",) if down else ("delta_v", "base_columns", "base_norms")):
            experts += spec.nbytes
    others = {name: TensorSpec(dtype, shape) for name, (dtype, shape) in manifest.other_tensors.items()}
    return experts, sum(spec.nbytes for name, spec in others.items() if "norm" in name or ".gate." in name)


@pytest.mark.parametrize("method", ["d2", "mobe"])
def test_a_worker_keeps_what_is_stored(tmp_path: Path, checkpoint: Path, method: str) -> None:
    """Within 3 % of the checkpoint, of its experts and of all; on the CPU backend, after packing."""
    if method == "mobe":
        checkpoint = write_compressed(checkpoint.with_name("dense"), 0.4, method=method)
    (found,) = live(tmp_path / "one", checkpoint, {})
    report = stored(checkpoint)
    assert found["experts"] == pytest.approx(report["experts"]["bytes"], rel=CLOSE)
    assert sum(found.values()) == pytest.approx(report["bytes"], rel=CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("options", [("--ratio", "0.75"), ("--ratio", "0.55", "--bits", "4")])
def test_a_worker_keeps_few_bits_as_they_are_stored(tmp_path: Path, checkpoint: Path, options: tuple[str, ...]) -> None:
    """Codes, scales and channels of unequal widths: nothing is widened in memory, or lies there twice."""
    text = tmp_path / "text"
    text.write_text("The assignment statement evaluates the expression list. " * 400, encoding="utf-8")
    calibration = ("--calibration", text, "--windows", 8, "--seq-len", 64)
    done = d2moe_here("compress", checkpoint.with_name("dense"), tmp_path / "few", *calibration, *options)
    assert done.returncode == 0, done.stderr
    (found,) = live(tmp_path / "one", tmp_path / "few", {})
    report = stored(tmp_path / "few")
    assert found["experts"] == pytest.approx(report["experts"]["bytes"], rel=CLOSE)
    assert sum(found.values()) == pytest.approx(report["bytes"], rel=CLOSE)


@pytest.mark.slow
def test_two_ranks_keep_it_once_but_for_what_is_replicated(tmp_path: Path, checkpoint: Path) -> None:
    """Tensor parallelism: the sum over ranks, less the second copy of what every rank needs."""
    ranks = live(tmp_path / "two", checkpoint, TWO_RANKS, tensor_parallel_size=2)
    assert len(ranks) == 2
    experts, others = replicated(checkpoint)
    report = stored(checkpoint)
    assert sum(rank["experts"] for rank in ranks) - experts == pytest.approx(report["experts"]["bytes"], rel=CLOSE)
    total = sum(sum(rank.values()) for rank in ranks)
    assert total - experts - others == pytest.approx(report["bytes"], rel=CLOSE)
    assert experts > CLOSE * report["bytes"]  # or the subtraction would prove nothing
