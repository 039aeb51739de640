"""`make bench-peers` at tiny shapes: that every way computes the layer, and that a wrong one is not timed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bench_peers
import pytest
import torch
from bench_layer import Shape

pytest.importorskip("vllm")
SHAPE = Shape(hidden=256, intermediate=512, experts=4, top_k=2)


def batch(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids = torch.stack([torch.randperm(SHAPE.experts)[: SHAPE.top_k] for _ in range(tokens)]).int()
    return torch.randn(tokens, SHAPE.hidden, dtype=torch.bfloat16), torch.rand(tokens, SHAPE.top_k), ids


@pytest.mark.parametrize("tokens", [1, 17])
def test_every_way_computes_the_same_layer(tokens: int) -> None:
    """Against float32, within bfloat16 rounding."""
    torch.manual_seed(0)
    layer = bench_peers.Layer(SHAPE, 0.4)
    calls = {name: way(layer) for name, way in bench_peers.WAYS.items()}
    found = bench_peers.errors(layer, calls, *batch(tokens))
    assert set(found) == {"dense", "ours", "authors", "torch", "decompress"}
    assert all(0 < error < 0.01 for error in found.values()), found


def test_a_wrong_way_is_not_timed() -> None:
    """A layer whose base is left out, or whose experts are mixed up, is far beyond the tolerance."""
    torch.manual_seed(0)
    layer = bench_peers.Layer(SHAPE, 0.4)
    right = bench_peers.ours(layer)

    def mixed_up(x: torch.Tensor, gates: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return right(x, gates, (ids + 1) % SHAPE.experts)

    with pytest.raises(SystemExit, match=r"not timed: 3 tokens, relative errors .*mixed"):
        bench_peers.measure(layer, {"ours": right, "mixed": mixed_up}, tokens=3, seconds=0.01)
    x, gates, ids = batch(3)
    layer.w13 = layer.w13._replace(base=torch.zeros_like(layer.w13.base))
    assert bench_peers.errors(layer, {"with base": right}, x, gates, ids)["with base"] > 0.2


def run(monkeypatch: pytest.MonkeyPatch, out: Path, *arguments: str) -> list[dict[str, Any]]:
    command = ["bench_peers", "--shape", ",".join(map(str, SHAPE)), "--seconds", "0.01", "--out", str(out), *arguments]
    monkeypatch.setattr("sys.argv", command)
    bench_peers.main()
    return json.loads(out.read_text())


def test_runs_are_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows of another ratio stay, those of the same are replaced; all of the figures are there."""
    out = tmp_path / "bench" / "peers.json"
    run(monkeypatch, out, "--ratios", "0.4", "--tokens", "1", "2")
    rows = run(monkeypatch, out, "--ratios", "0.2", "0.4", "--tokens", "2")
    assert [(row["ratio"], row["tokens"]) for row in rows] == [(0.2, 2), (0.4, 1), (0.4, 2)]
    for row in rows:
        assert row["runs"] >= 3
        for name in bench_peers.WAYS:
            low, high = row["ms_min_max"][name]
            assert 0 < low <= row["ms"][name] <= high
            assert row["relative_errors"][name] < bench_peers.TOLERANCE
    assert "decompress ms" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--ratios", "0.9"], "ratio 0.9 cannot be reached"), (["--shape", "1,2"], "--shape 1,2: none of Mixtral")],
)
def test_bad_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    arguments: list[str], message: str,
) -> None:  # fmt: skip
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, tmp_path / "peers.json", *arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
