"""Slices, refusals and completeness of one layer's loading, without vLLM."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from one_layer import LAYER, compute, dense_layer, fill, layer_tensors, make_loader
from torch import Tensor

from d2moe_vllm.format.config import CheckpointConfig, CheckpointError, parse_config


def test_the_whole_layer_is_the_dense_reconstruction(
    checkpoint: Path, config: CheckpointConfig, batch: tuple[Tensor, Tensor]
) -> None:
    tensors = layer_tensors(checkpoint)
    loader = make_loader(config)
    output = compute(loader, fill(loader, tensors), *batch)
    assert loader.missing() == []
    torch.testing.assert_close(output.double(), dense_layer(tensors, LAYER, *batch), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scope", ["off", "token", "batch"])
@pytest.mark.parametrize("size", [2, 4, 8])
def test_tensor_parallel_ranks_add_up(
    checkpoint: Path, config: CheckpointConfig, batch: tuple[Tensor, Tensor], scope: str, size: int
) -> None:
    tensors = layer_tensors(checkpoint)
    whole = make_loader(config)
    expected = compute(whole, fill(whole, tensors), *batch, scope)
    ranks = [make_loader(config, tp=(rank, size)) for rank in range(size)]
    total = sum(compute(rank, fill(rank, tensors), *batch, scope) for rank in ranks)
    assert all(rank.missing() == [] for rank in ranks)
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scope", ["off", "token"])
def test_expert_parallel_ranks_add_up(
    checkpoint: Path, config: CheckpointConfig, batch: tuple[Tensor, Tensor], scope: str
) -> None:
    tensors = layer_tensors(checkpoint)
    ranks = [make_loader(config, ep=(rank, 2)) for rank in range(2)]
    filled = [fill(rank, tensors) for rank in ranks]
    assert all(rank.missing() == [] for rank in ranks)
    # What rides with expert 0 is on the rank that does not have expert 0, too.
    assert torch.equal(filled[0]["w13_base"], filled[1]["w13_base"])
    assert not torch.equal(filled[0]["w13_delta_u"], filled[1]["w13_delta_u"])
    if scope == "off":
        whole = make_loader(config)
        expected = compute(whole, fill(whole, tensors), *batch)
        total = sum(compute(rank, own, *batch) for rank, own in zip(ranks, filled, strict=True))
        torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-5)
    spec = make_loader(config).spec(scope, activation="silu", prune_down=False)
    assert spec.w2.used == 192


def test_missing_tensors_are_named(checkpoint: Path, config: CheckpointConfig) -> None:
    tensors = layer_tensors(checkpoint)
    prefix = f"model.layers.{LAYER}.block_sparse_moe.experts"
    dropped = [f"{prefix}.0.w2.base_norms", f"{prefix}.3.w1.delta_v", f"{prefix}.5.w3.delta_u"]
    loader = make_loader(config)
    fill(loader, {name: tensor for name, tensor in tensors.items() if name not in dropped})
    assert sorted(loader.missing()) == dropped
    # The rank that does not own expert 5 does not miss it.
    first = make_loader(config, ep=(0, 2))
    fill(first, {name: tensor for name, tensor in tensors.items() if name not in dropped})
    assert sorted(first.missing()) == dropped[:2]


def test_wrong_shapes_are_refused_before_copying(checkpoint: Path, config: CheckpointConfig) -> None:
    tensors = layer_tensors(checkpoint)
    for name, tensor in tensors.items():
        loader = make_loader(config, tp=(1, 2))
        with pytest.raises(CheckpointError, match=name) as error:
            fill(loader, {name: tensor.narrow(-1, 0, tensor.shape[-1] - 1)})
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("role", ["w1", "w2"])
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_norms_that_are_none_are_refused(checkpoint: Path, config: CheckpointConfig, role: str, value: float) -> None:
    """Columns are chosen by them."""
    tensors = layer_tensors(checkpoint)
    name = f"model.layers.{LAYER}.block_sparse_moe.experts.0.{role}.base_norms"
    tensors[name] = tensors[name].clone()
    tensors[name][3] = value
    with pytest.raises(CheckpointError, match="base_norms has values that are no norms; copy the checkpoint again"):
        fill(make_loader(config), tensors)


def test_a_tensor_the_config_does_not_list(checkpoint: Path, config: CheckpointConfig) -> None:
    tensors = layer_tensors(checkpoint)
    loader = make_loader(config)
    base = f"model.layers.{LAYER}.block_sparse_moe.experts.0.w1.base"
    with pytest.raises(CheckpointError, match="does not belong"):
        loader.load(torch.empty(0), tensors[base], "scales", "gate", 0)


@pytest.mark.parametrize("damage", ["unsorted", "twice", "out of range", "uneven"])
@pytest.mark.parametrize("projection", ["w1", "w2"])
def test_bad_columns_are_refused(checkpoint: Path, config: CheckpointConfig, damage: str, projection: str) -> None:
    tensors = layer_tensors(checkpoint)
    name = f"model.layers.{LAYER}.block_sparse_moe.experts.0.{projection}.base_columns"
    columns = tensors[name].clone()
    group = config.shape("down" if projection == "w2" else "gate")[1] // config.pruning.groups
    if damage == "unsorted":
        columns[[0, 1]] = columns[[1, 0]]
    elif damage == "twice":
        columns[1] = columns[0]
    elif damage == "out of range":
        columns[-1] = group * config.pruning.groups
    else:
        per_group = columns.numel() // config.pruning.groups
        free = next(c for c in range(group, 2 * group) if c not in columns.tolist())
        columns[per_group - 1] = free
        columns = columns.sort().values
    with pytest.raises(CheckpointError, match=f"{name}: columns must ascend"):
        fill(make_loader(config), {name: columns.int()})


def test_gate_and_up_must_keep_the_same_columns(checkpoint: Path, config: CheckpointConfig) -> None:
    tensors = layer_tensors(checkpoint)
    names = [f"model.layers.{LAYER}.block_sparse_moe.experts.0.{p}.base_columns" for p in ("w1", "w3")]
    columns = tensors[names[1]].clone()
    columns[0] = next(c for c in range(16) if c not in columns.tolist())
    columns[:12] = columns[:12].sort().values
    for order in (1, -1):
        both = {names[0]: tensors[names[0]], names[1]: columns}
        with pytest.raises(CheckpointError, match=f"{names[0]} and {names[1]} differ"):
            fill(make_loader(config), dict(list(both.items())[::order]))


@pytest.mark.parametrize("size", [3, 16])
def test_a_tensor_parallel_size_that_does_not_divide(config: CheckpointConfig, size: int) -> None:
    with pytest.raises(CheckpointError, match=f"size {size} does not divide this checkpoint's 8 column groups"):
        make_loader(config, tp=(0, size))


def test_dummy_weights_find_valid_columns(checkpoint: Path) -> None:
    content = json.loads((checkpoint / "config.json").read_text())["quantization_config"]
    for size in (1, 4):
        loader = make_loader(parse_config(content), tp=(0, size))
        parameters = loader.empty_parameters(torch.float32)
        for name, inputs, groups in (("w13", 128, 8), ("w2", 256 // size, 8 // size)):
            columns = parameters[f"{name}_base_columns"].long()
            assert columns.diff().gt(0).all()
            per_group = columns.numel() // groups
            assert torch.equal(columns // (inputs // groups), torch.arange(groups).repeat_interleave(per_group))
            assert parameters[f"{name}_base_norms"].dtype == torch.float32
