"""Loading of layers that share, trim, or have low-rank bases and column deltas: by rank, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from one_layer import compute, dense_layer, fill, layer_tensors, make_loader
from synthetic import NAMES, Synthetic, write_checkpoint
from torch import Tensor

from d2moe_vllm.format.config import CheckpointError
from d2moe_vllm.format.files import read_config


@pytest.mark.parametrize("layer", range(4))
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_variants_by_tensor_parallel_ranks(variants: Path, batch: tuple[Tensor, Tensor], layer: int, tp: int) -> None:
    tensors, config = layer_tensors(variants, layer), read_config(variants)
    ranks = [make_loader(config, tp=(rank, tp), layer=layer) for rank in range(tp)]
    total = sum(compute(rank, fill(rank, tensors), *batch) for rank in ranks)
    assert all(rank.missing() == [] for rank in ranks)
    torch.testing.assert_close(total.double(), dense_layer(tensors, layer, *batch), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layer", range(4))
@pytest.mark.parametrize("ep", [2, 4, 8])
def test_variants_by_expert_parallel_ranks(variants: Path, batch: tuple[Tensor, Tensor], layer: int, ep: int) -> None:
    tensors, config = layer_tensors(variants, layer), read_config(variants)
    ranks = [make_loader(config, ep=(rank, ep), layer=layer) for rank in range(ep)]
    total = sum(compute(rank, fill(rank, tensors), *batch) for rank in ranks)
    assert all(rank.missing() == [] for rank in ranks)
    torch.testing.assert_close(total.double(), dense_layer(tensors, layer, *batch), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scope", ["token", "batch"])
@pytest.mark.parametrize("layer", [1, 2])
def test_variants_select_alike_on_every_rank(
    variants: Path, batch: tuple[Tensor, Tensor], layer: int, scope: str
) -> None:
    tensors, config = layer_tensors(variants, layer), read_config(variants)
    whole = make_loader(config, layer=layer)
    expected = compute(whole, fill(whole, tensors), *batch, scope)
    ranks = [make_loader(config, tp=(rank, 2), layer=layer) for rank in range(2)]
    total = sum(compute(rank, fill(rank, tensors), *batch, scope) for rank in ranks)
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, compute(whole, fill(whole, tensors), *batch))


@pytest.mark.parametrize("scope", ["token", "batch"])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("tp", [1, 2])
def test_a_base_with_all_columns_has_none_to_select(
    tmp_path: Path, batch: tuple[Tensor, Tensor], tp: int, backend: str, scope: str
) -> None:
    """Whatever the scope: all are used."""
    none = dict.fromkeys(NAMES, 0)
    folder = tmp_path / "model"
    write_checkpoint(folder, Synthetic(special={1: {"kept": none, "used": none, "full_base": tuple(NAMES)}}))
    tensors, config = layer_tensors(folder), read_config(folder)
    ranks = [make_loader(config, tp=(rank, tp)) for rank in range(tp)]
    total = sum(compute(rank, fill(rank, tensors), *batch, scope, backend) for rank in ranks)
    torch.testing.assert_close(total.double(), dense_layer(tensors, 1, *batch), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layer", range(4))
def test_what_is_stored_once_is_held_once(variants: Path, layer: int) -> None:
    """Parameters are as large as the tensors on disk, but for norms, columns and indices of some hundred bytes."""
    tensors, config = layer_tensors(variants, layer), read_config(variants)
    held = make_loader(config, layer=layer).empty_parameters(torch.float32)
    stored = sum(t.numel() for name, t in tensors.items() if t.is_floating_point() and "norms" not in name)
    assert sum(t.numel() for name, t in held.items() if t.is_floating_point() and "norms" not in name) == stored


@pytest.mark.parametrize("layer", range(4))
def test_every_missing_tensor_of_a_variant_is_named(variants: Path, layer: int) -> None:
    tensors, config = layer_tensors(variants, layer), read_config(variants)
    for name in tensors:
        loader = make_loader(config, layer=layer)
        fill(loader, {other: tensor for other, tensor in tensors.items() if other != name})
        assert loader.missing() == [name]
    # Expert-parallel ranks do not miss what is another's alone, and between them they miss everything.
    ranks = [make_loader(config, ep=(rank, 2), layer=layer) for rank in range(2)]
    missed = [set(rank.missing()) for rank in ranks]
    assert missed[0] | missed[1] == set(tensors)
    of_expert = {name for name in missed[0] & missed[1] if ".experts.0." not in name}
    assert all(name.endswith("delta_u") and layer in (2, 3) for name in of_expert)


def test_a_trimmed_expert_must_have_no_tensors(variants: Path) -> None:
    tensors, config = layer_tensors(variants, 1), read_config(variants)
    name = "model.layers.1.block_sparse_moe.experts.{}.w1.delta_u"
    with pytest.raises(CheckpointError, match=f"{name.format(1)} does not belong"):
        fill(make_loader(config), {name.format(1): tensors[name.format(0)]})


def u_index(layer: int, projection: str) -> str:
    return f"model.layers.{layer}.block_sparse_moe.experts.0.{projection}.u_index"


@pytest.mark.parametrize(("expert", "value"), [(1, 3), (1, -1), (0, 0), (6, -2)])
def test_a_bad_u_index_is_refused(variants: Path, expert: int, value: int) -> None:
    """Layer 2 stores three U's for gate and up, and trims experts 0 and 6."""
    index = layer_tensors(variants, 2)[u_index(2, "w3")].clone()
    index[expert] = value
    with pytest.raises(CheckpointError, match=f"{u_index(2, 'w3')}: expert {expert} ") as error:
        fill(make_loader(read_config(variants), layer=2), {u_index(2, "w3"): index})
    assert "\n" not in str(error.value)


def test_gate_and_up_must_share_their_u_index(variants: Path) -> None:
    names = [u_index(2, "w1"), u_index(2, "w3")]
    tensors = {name: layer_tensors(variants, 2)[name].clone() for name in names}
    tensors[names[1]][1] = 0
    with pytest.raises(CheckpointError, match=f"{names[0]} and {names[1]} differ"):
        fill(make_loader(read_config(variants), layer=2), tensors)


def test_bad_delta_columns_are_refused(variants: Path) -> None:
    name = "model.layers.1.block_sparse_moe.experts.3.w2.delta_columns"
    columns = layer_tensors(variants, 1)[name].flip(0)
    with pytest.raises(CheckpointError, match=f"{name}: columns must ascend"):
        fill(make_loader(read_config(variants)), {name: columns})


@pytest.mark.parametrize("ep", [1, 2])
def test_dummy_weights_of_variants_can_be_computed_with(variants: Path, batch: tuple[Tensor, Tensor], ep: int) -> None:
    """`--load-format dummy` fills the floats and leaves integers as they are."""
    for layer in range(4):
        loader = make_loader(read_config(variants), ep=(ep - 1, ep), layer=layer)
        parameters = loader.empty_parameters(torch.float32)
        for tensor in parameters.values():
            if tensor.is_floating_point():
                tensor.uniform_(-1e-3, 1e-3)
        assert compute(loader, parameters, *batch).isfinite().all()
