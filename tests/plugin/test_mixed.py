"""MoBE's part of the format: its rules, its damages, how ranks slice it, and what the reference backend computes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from one_layer import LAYER, compute, dense_layer, fill, layer_tensors, make_loader
from safetensors.torch import load_file
from synthetic import NAMES, PREFIX, dense_expert, mixed, write_checkpoint
from test_format import add, both, drop, edit, one
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from d2moe_vllm.format.config import CheckpointConfig, CheckpointError, parse_config
from d2moe_vllm.format.files import check_checkpoint, read_config
from d2moe_vllm.hf.checks import check_files
from d2moe_vllm.hf.experts import D2Experts
from d2moe_vllm.ops import reference
from d2moe_vllm.serving.loading import LayerLoader
from offline.checkpoint.reconstruction import Reconstruction
from offline.io.shards import Reader

P = PREFIX.format(layer=LAYER)


@pytest.fixture(scope="module", params=["silu", "tanh"])
def function(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, function: str) -> Path:
    """A float32 checkpoint. Not to be changed."""
    folder = tmp_path_factory.mktemp("mixed") / "checkpoint"
    write_checkpoint(folder, mixed(function, dtype=torch.float32))
    return folder


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CheckpointConfig]:
    folder = tmp_path_factory.mktemp("silu") / "checkpoint"
    write_checkpoint(folder, mixed(dtype=torch.float32))
    return folder, read_config(folder)


RULES: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (both(rank=0), "rank, kept_columns and base_rank are all 0"),
    (both(bases=0), "needs a rank, a number of bases and a function"),
    (both(function=None), "needs a rank, a number of bases and a function"),
    (both(function="relu"), "function"),
    (both(bases=9), "layer 1 gate: 9 bases exceed the 8 experts"),
    (both(bases=10**9), "bases"),
    (both(bases=-1), "bases"),
    (one("gate", rank=129), "layer 1 gate: rank 129 exceeds the matrix"),
    (one("up", bases=2), "gate and up have different bases"),
    (one("up", function="tanh"), "gate and up have different function"),
    (one("up", delta="factors", bases=0, function=None), "gate and up have different delta"),
    (both(shared_v=True), "shared_v and distinct_u need delta 'factors'"),
    (both(kept_columns=8), "delta 'bases' is a whole matrix and stands on no base"),
    (both(base_rank=8), "delta 'bases' is a whole matrix and stands on no base"),
    (one("down", kept_columns=8, full_base=True), "a base is a full_base, or has kept_columns or a base_rank"),
    (one("down", rank=8), "its rank must be 0, not 8"),
    (one("down", delta="bases", rank=8, bases=2, function="silu"), "delta 'bases' is for gate and up alone"),
    (both(delta="dense", bases=0, function=None), "its rank must be 0"),
    (one("down", delta="factors", rank=8, bases=2), "bases and function need delta 'bases', not 'factors'"),
    (lambda layer: layer.update(trimmed=[1]), "trimmed experts run on the base alone"),
]


@pytest.mark.parametrize(("change", "words"), RULES, ids=[str(number) for number in range(len(RULES))])
def test_rules_between_fields(
    settings: tuple[Path, CheckpointConfig], change: Callable[[dict[str, Any]], object], words: str
) -> None:
    content = json.loads((settings[0] / "config.json").read_text())["quantization_config"]
    change(content["layers"][str(LAYER)])
    with pytest.raises(CheckpointError) as error:
        parse_config(content)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


DAMAGES: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "bases missing": (drop(f"{P}.0.w1.bases"), "w1.bases"),
    "alpha missing": (drop(f"{P}.3.w3.alpha"), "3.w3.alpha"),
    "a missing": (drop(f"{P}.7.w1.a"), "7.w1.a"),
    "dense missing": (drop(f"{P}.5.w2.dense"), "5.w2.dense"),
    "bases of another expert": (add(f"{P}.1.w1.bases", f"{P}.0.w1.bases"), "do not belong"),
    "one basis less": (lambda t: t.update({f"{P}.0.w1.bases": t[f"{P}.0.w1.bases"][:2].clone()}), "w1.bases"),
    "alpha too long": (lambda t: t.update({f"{P}.2.w1.alpha": torch.ones(4)}), "2.w1.alpha"),
    "a transposed": (lambda t: t.update({f"{P}.2.w1.a": t[f"{P}.2.w1.a"].t().contiguous()}), "2.w1.a"),
    "dense in another dtype": (lambda t: t.update({f"{P}.2.w2.dense": t[f"{P}.2.w2.dense"].half()}), "2.w2.dense"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_refused_by_name(settings: tuple[Path, CheckpointConfig], tmp_path: Path, name: str) -> None:
    damage, words = DAMAGES[name]
    folder = shutil.copytree(settings[0], tmp_path / "damaged")
    edit(folder, damage)
    content = json.loads((folder / "config.json").read_text())["quantization_config"]
    for reader, error in ((lambda: check_checkpoint(folder), CheckpointError),
                          (lambda: check_files(str(folder), content), ValueError)):  # fmt: skip
        with pytest.raises(error) as caught:
            reader()
        assert words in str(caught.value)


def expected_layer(tensors: dict[str, Tensor], function: str, x: Tensor, ids: Tensor) -> Tensor:
    weights = torch.linspace(0.2, 0.8, ids.numel()).view(ids.shape)
    total = torch.zeros_like(x, dtype=torch.float64)
    for t in range(len(x)):
        for e, g in zip(ids[t].tolist(), weights[t].tolist(), strict=True):
            gate, up, down = (dense_expert(tensors, LAYER, e, role, function) for role in NAMES)
            h = torch.nn.functional.silu(gate @ x[t].double()) * (up @ x[t].double())
            total[t] += g * (down @ h)
    return total


def test_the_layer_is_what_its_tensors_mean(
    folder: Path, function: str, batch: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where no V is ever whole: tiles of seven rows divide no rank."""
    config, tensors = read_config(folder), layer_tensors(folder)
    loader = make_loader(config)
    parameters = fill(loader, tensors)
    assert loader.missing() == []
    expected = expected_layer(tensors, function, *batch)
    torch.testing.assert_close(compute(loader, parameters, *batch).double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        compute(loader, parameters, *batch, backend="cpu").double(), expected, rtol=1e-4, atol=1e-5
    )
    monkeypatch.setattr(reference, "MIXED_ROWS", 7)
    torch.testing.assert_close(compute(loader, parameters, *batch).double(), expected, rtol=1e-4, atol=1e-5)
    # The bases are the only thing of their kind that is kept.
    assert {name: tuple(tensor.shape) for name, tensor in parameters.items()} == {
        "w13_bases": (3, 64, 128),
        "w13_a": (8, 256, 64),
        "w13_alpha": (8, 6),
        "w2_dense": (8, 128, 256),
    }


class Largest(TorchDispatchMode):
    """The largest tensor, in elements, that comes into being; views of what was there before are none."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.known, self.elements = {tensor.untyped_storage().data_ptr() for tensor in known}, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


def test_neither_an_expert_nor_its_v_is_ever_whole(
    folder: Path, batch: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the parameters nothing is larger than one tile: rows of tokens are fewer here."""
    monkeypatch.setattr(reference, "MIXED_ROWS", 8)
    loader = make_loader(read_config(folder))
    parameters = fill(loader, layer_tensors(folder))
    with Largest([*parameters.values(), *batch]) as largest:
        compute(loader, parameters, *batch)
    assert largest.elements == 8 * 128


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("size", [2, 4])
def test_tensor_parallel_slices_add_up(
    folder: Path, function: str, batch: tuple[Tensor, Tensor], size: int, backend: str
) -> None:
    config, tensors = read_config(folder), layer_tensors(folder)
    total = torch.zeros_like(batch[0])
    for rank in range(size):
        loader = make_loader(config, tp=(rank, size))
        parameters = fill(loader, tensors)
        assert parameters["w13_a"].shape == (8, 256 // size, 64)
        assert parameters["w2_dense"].shape == (8, 128, 256 // size)
        total += compute(loader, parameters, *batch, backend=backend)
    torch.testing.assert_close(total.double(), expected_layer(tensors, function, *batch), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_expert_parallel_ranks_have_the_bases_and_their_own_experts(
    folder: Path, function: str, batch: tuple[Tensor, Tensor], backend: str
) -> None:
    config, tensors = read_config(folder), layer_tensors(folder)
    total = torch.zeros_like(batch[0])
    for rank in range(2):
        loader = make_loader(config, ep=(rank, 2))
        parameters = fill(loader, tensors)
        assert loader.missing() == []
        assert parameters["w13_a"].shape[0] == 4
        total += compute(loader, parameters, *batch, backend=backend)
    torch.testing.assert_close(total.double(), expected_layer(tensors, function, *batch), rtol=1e-4, atol=1e-5)


def test_what_did_not_arrive_is_missed(folder: Path) -> None:
    tensors = layer_tensors(folder)
    left = {f"{P}.0.w3.bases", f"{P}.6.w1.alpha", f"{P}.6.w3.a", f"{P}.1.w2.dense"}
    loader: LayerLoader = make_loader(read_config(folder))
    fill(loader, {name: tensor for name, tensor in tensors.items() if name not in left})
    assert set(loader.missing()) == left


@pytest.mark.parametrize("how", ["plain", "in place", "static shapes", "scope token"])
def test_plain_transformers_computes_the_same(
    folder: Path, function: str, batch: tuple[Tensor, Tensor], how: str
) -> None:
    config, tensors = read_config(folder), layer_tensors(folder)
    module = D2Experts(
        8, 128, 256, config.layers[LAYER].model_dump(), groups=8, projections=NAMES,
        dtype="float32", scope="token" if how == "scope token" else "off",
    )  # fmt: skip
    module.load_state_dict({name.removeprefix(f"{P}."): tensor for name, tensor in tensors.items()}, strict=True)
    module.in_place, module.static_shapes = how == "in place", how == "static shapes"
    x, ids = batch
    weights = torch.linspace(0.2, 0.8, ids.numel()).view(ids.shape)
    expected = expected_layer(tensors, function, x, ids)
    for _ in range(2):  # joined in place by the first call
        torch.testing.assert_close(module(x, ids, weights).double(), expected, rtol=1e-4, atol=1e-5)
    if how == "in place":
        gate, up = (module.projection(0, role)("bases") for role in ("gate", "up"))
        assert gate.untyped_storage().data_ptr() == up.untyped_storage().data_ptr()


def test_reconstruction_is_what_the_tensors_mean(folder: Path, function: str) -> None:
    tensors = load_file(folder / "model-00002-of-00002.safetensors")
    rebuilt = Reconstruction(Reader(folder), read_config(folder), torch.float64)
    for layer in (0, 1):
        for role in NAMES:
            expected = dense_expert(tensors, layer, 5, role, function)
            torch.testing.assert_close(rebuilt.weight(layer, 5, role), expected, rtol=1e-12, atol=1e-12)


def test_the_other_layers_are_untouched(folder: Path, batch: tuple[Tensor, Tensor]) -> None:
    """A base and deltas beside MoBE's layers, and a layer that stays dense."""
    config, tensors = read_config(folder), layer_tensors(folder, 2)
    loader = make_loader(config, layer=2)
    found = compute(loader, fill(loader, tensors), *batch)
    torch.testing.assert_close(found.double(), dense_layer(tensors, 2, *batch), rtol=1e-4, atol=1e-5)
    assert 3 not in config.layers
