"""The roofline's arithmetic, counted once more by other means; and that the table says what it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import roofline
import torch
from bench_layer import Ours
from layer_shapes import BYTES, SCOPES, SHAPES, Shape, dense_expert_bytes, experts_in_use, sizes
from torch.utils.flop_counter import FlopCounterMode

from d2moe_vllm.ops.reference import fused_experts
from d2moe_vllm.ops.weights import HalfSpec, LayerSpec, Weights

SMALL = Shape(256, 384, 8, 2)
RATIOS = (0.2, 0.4, 0.6, 0.8)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("scope", SCOPES)
def test_weights_are_those_of_the_real_tensors(ratio: float, scope: str) -> None:
    """Every expert in use: the bytes of all deltas, and of the base's columns that are used."""
    layer = Ours(SMALL, ratio, scope)
    works = {work.kernel: work for work in roofline.ours(sizes(SMALL, ratio, scope), 5, active=8)}
    share = [
        own.used / half.base_columns.numel()
        for own, half in zip((layer.spec.w13, layer.spec.w2), layer.halves, strict=True)
    ]
    for half, name, part in zip(layer.halves, ("13", "2"), share, strict=True):
        assert works[f"base {name}"].weights == pytest.approx(half.base.nbytes * (1 if scope == "off" else part))
        assert works[f"shrink {name}"].weights == half.delta_v.nbytes
    assert works["expand 13, activate"].weights == layer.halves[0].delta_u.nbytes
    assert works["expand 2"].weights == layer.halves[1].delta_u.nbytes
    products = sum(work.weights for name, work in works.items() if name.startswith(("base", "shrink", "expand")))
    assert products == pytest.approx(layer.base_bytes + 8 * layer.expert_bytes)


def test_operations_are_those_that_torch_counts() -> None:
    """Of the reference's own products on real tensors."""
    layer, shape = sizes(SMALL, 0.4, "off"), SMALL
    rank, (kept, mixed) = layer.rank, layer.kept
    w13 = Weights(
        delta_u=torch.randn(8, shape.intermediate, 2 * rank),
        delta_v=torch.randn(8, 2 * rank, shape.hidden),
        base=torch.randn(kept, 2 * shape.intermediate),
        base_columns=torch.arange(kept, dtype=torch.int32),
        base_norms=torch.ones(kept),
    )
    w2 = Weights(
        delta_u=torch.randn(8, shape.hidden, rank),
        delta_v=torch.randn(8, rank, shape.intermediate),
        base=torch.randn(mixed, shape.hidden),
        base_columns=torch.arange(mixed, dtype=torch.int32),
        base_norms=torch.ones(mixed),
    )
    ids = torch.stack([torch.randperm(8)[:2] for _ in range(16)])
    halves = (HalfSpec((rank, rank), used=kept), HalfSpec((rank,), used=mixed))
    spec = LayerSpec(8, shape.intermediate, *halves, activation="silu", scope="off")
    with FlopCounterMode(display=False) as counter:
        fused_experts(
            torch.randn(16, shape.hidden), torch.rand(16, 2), ids, w13, w2, None,
            spec,
        )  # fmt: skip
    products = [work for work in roofline.ours(layer, 16, 8) if work.kernel.startswith(("base", "shrink", "expand"))]
    assert sum(work.flops for work in products) == counter.get_total_flops()


def test_mixed_layers_are_counted_likewise() -> None:
    """MoBE: bytes of the real tensors, and operations as torch counts them in the reference, every expert in use."""
    found = roofline.mixed_sizes(SMALL, 0.4)
    assert found is not None
    _, bases, rank = found
    w13 = Weights(
        bases=torch.randn(bases, 2 * rank, SMALL.hidden),
        alpha=torch.randn(8, 2 * bases),
        a=torch.randn(8, SMALL.intermediate, 2 * rank),
    )
    w2 = Weights(dense=torch.randn(8, SMALL.hidden, SMALL.intermediate))
    works = roofline.ours_mixed(found, 16, active=8)
    stored = [tensor for half in (w13, w2) for tensor in half if tensor is not None]
    assert sum(work.weights for work in works) == BYTES * sum(tensor.numel() for tensor in stored)
    dense = 8 * dense_expert_bytes(SMALL)
    # Ranks are rounded down to a multiple of 16.
    step = 16 * 2 * (8 * SMALL.intermediate + bases * SMALL.hidden) * BYTES / dense
    assert 0 <= 1 - BYTES * sum(tensor.numel() for tensor in stored) / dense - 0.4 < step
    ids = torch.stack([torch.randperm(8)[:2] for _ in range(16)])
    with FlopCounterMode(display=False) as counter:
        fused_experts(
            torch.randn(16, SMALL.hidden), torch.rand(16, 2), ids, w13, w2, None,
            LayerSpec(8, SMALL.intermediate, HalfSpec((rank, rank)), HalfSpec((0,)), "silu", "off", "silu"),
        )  # fmt: skip
    products = sum(work.flops for work in works if work.kernel != "combine")
    in_use = len(ids.unique())
    assert products - 2 * (8 - in_use) * bases * 2 * rank * SMALL.hidden == counter.get_total_flops()
    assert roofline.mixed_sizes(SMALL, 0.7) is None


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("tokens", [1, 16, 64])
def test_experts_in_use_are_those_of_random_routing(name: str, tokens: int) -> None:
    shape = SHAPES[name]
    chosen = (
        torch.rand(400, tokens, shape.experts, generator=torch.Generator().manual_seed(0)).topk(shape.top_k).indices
    )
    counted = torch.zeros(400, shape.experts).scatter_(1, chosen.flatten(1), 1.0).sum(dim=1).mean()
    assert experts_in_use(shape, tokens) == pytest.approx(float(counted), rel=0.02)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("scope", SCOPES)
def test_what_is_stored_is_the_ratio(name: str, ratio: float, scope: str) -> None:
    """Ranks are rounded down to a multiple of 16: the sizes are those of a checkpoint at that ratio."""
    shape = SHAPES[name]
    layer = sizes(shape, ratio, scope)
    stored = (2 * layer.kept[0] * shape.intermediate + layer.kept[1] * shape.hidden) * BYTES
    stored += shape.experts * layer.expert_bytes
    gone = 1 - stored / (shape.experts * dense_expert_bytes(shape))
    assert 0 <= gone - ratio < 16 * (shape.hidden + shape.intermediate) / (shape.hidden * shape.intermediate)


def test_the_slower_of_reading_and_arithmetic_is_what_it_takes() -> None:
    device = roofline.Device(bandwidth=1e9, peak=1e12)
    assert roofline.Work("reads", 0, 2e9, 1e12).seconds(device) == 2
    assert roofline.Work("computes", 0, 1e9, 3e12).seconds(device) == 3


def test_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every shape, ratio, scope and number of tokens; it says first that it is no measurement."""
    out = tmp_path / "bench" / "roofline.md"
    monkeypatch.setattr(roofline, "OUT", out)
    roofline.main()
    lines = out.read_text().splitlines()
    assert lines[0] == "# Prediction, not a measurement"
    rows = [line for line in lines if line.startswith(tuple(f"| {name} |" for name in SHAPES))]
    assert len(rows) == len(SHAPES) * 4 * 2 * 6
    mixed = [line for line in lines if line.startswith(tuple(f"| MoBE: {name} |" for name in SHAPES))]
    assert len(mixed) == len(SHAPES) * 3 * 6, "80 % is not reachable"
    # One token at 40 %, scope off, H100: the dense layer reads two experts' 704.6 MB, at 3350 GB/s.
    cells = [cell.strip() for cell in rows[12].strip("|").split("|")]
    assert cells[:4] == ["Mixtral-8x7B", "40%", "off", "1"]
    assert float(cells[9]) == pytest.approx(704.6e6 / 3350e9 * 1e6, rel=0.002)
