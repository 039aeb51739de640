"""`make bench-mobe` at tiny shapes: the budget's ranks, and that a wrong layer is not timed."""

from __future__ import annotations

import bench_mobe
import pytest
import torch
from bench_layer import Dense, Shape

pytest.importorskip("vllm")
SHAPE = Shape(hidden=256, intermediate=512, experts=8, top_k=2)


@pytest.mark.parametrize("ratio", [0.3, 0.45, 0.6])
def test_ranks_keep_what_the_ratio_leaves(ratio: float) -> None:
    """Counted from the layer's own tensors: never more than that, and less by one step of ranks at most."""
    torch.manual_seed(0)
    layer = bench_mobe.Layer(SHAPE, ratio, "silu")
    stored = sum(t.nbytes for half in layer.halves for t in half if t is not None and t is not half.alpha)
    assert stored == layer.base_bytes + SHAPE.experts * layer.expert_bytes
    dense = SHAPE.experts * 3 * SHAPE.hidden * SHAPE.intermediate * bench_mobe.BYTES
    step = 16 * 2 * (SHAPE.experts * SHAPE.intermediate + 2 * SHAPE.hidden) * bench_mobe.BYTES
    assert 0 <= (1 - ratio) * dense - stored < step


def test_a_ratio_out_of_reach() -> None:
    """down alone is a third; and above some size a rank is no rank any more."""
    for shape, ratio in ((SHAPE, 0.7), (bench_mobe.SHAPES["Qwen3-30B-A3B"], 0.2)):
        with pytest.raises(ValueError, match="is out of MoBE's reach"):
            bench_mobe.rank_of(shape, ratio)


def test_what_is_measured_agrees_or_is_not_timed() -> None:
    torch.manual_seed(0)
    layer, dense = bench_mobe.Layer(SHAPE, 0.5, "tanh"), Dense(SHAPE)
    row = bench_mobe.measure(SHAPE, layer, dense, tokens=3, seconds=0.01)
    assert set(row["ms"]) == {"dense", "ours", "reference"}
    assert all(ms > 0 for ms in row["ms"].values())
    assert 0 < row["difference"] < 0.02
    layer.halves = (layer.halves[0]._replace(bases=layer.halves[0].bases.flip(0)), layer.halves[1])
    with pytest.raises(SystemExit, match="not timed: 3 tokens, the backends differ by"):
        bench_mobe.measure(SHAPE, layer, dense, tokens=3, seconds=0.01)
