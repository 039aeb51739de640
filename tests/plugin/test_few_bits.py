"""Packed matrices and experts of unequal widths: loaded by every kind of rank, computed with, served, refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from few_bits import LAYERS, SETS, write_few
from moe_oracle import Case, forward
from one_layer import compute, dense_layer, fill, layer_tensors, make_loader
from synthetic import NAMES, PREFIX, dense_expert, write_dense
from test_format import edit
from torch import Tensor
from transformers import AutoModelForCausalLM

from d2moe_vllm.format.config import CheckpointConfig, CheckpointError
from d2moe_vllm.format.files import check_checkpoint, read_config
from d2moe_vllm.format.kinds import DTYPE_BYTES
from d2moe_vllm.hf.checks import check_files
from offline.checkpoint.reconstruction import Reconstruction
from offline.io.shards import Reader

PLACES = {name: (number, layer) for number, names in enumerate(SETS) for layer, name in enumerate(names)}
"""Where each of LAYERS is: the checkpoint and the layer."""
RANKS = [{}, {"tp": 2}, {"tp": 8}, {"ep": 2}, {"ep": 8}]
BACKENDS = ("reference", "cpu")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, dict[str, Tensor]]]:
    """Checkpoints of SETS, read-only, and what they stand for."""
    root = tmp_path_factory.mktemp("few")
    return [(root / str(number), write_few(root / str(number), names)) for number, names in enumerate(SETS)]


Made = list[tuple[Path, dict[str, Tensor]]]


def over_ranks(
    config: CheckpointConfig,
    layer: int,
    tensors: dict[str, Tensor],
    batch: tuple[Tensor, Tensor],
    backend: str,
    ranks: dict[str, int],
) -> Tensor:
    """What all ranks give together, in float64; each has all that it needs."""
    kind, size = next(iter(ranks.items()), ("tp", 1))
    total = torch.zeros_like(batch[0])
    for rank in range(size):
        loader = make_loader(config, layer=layer, **{kind: (rank, size)})
        total += compute(loader, fill(loader, tensors), *batch, backend=backend)
        assert loader.missing() == []
    return total.double()


@pytest.mark.parametrize("ranks", RANKS, ids=str)
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_ranks_together_are_what_the_layer_means(
    made: Made, batch: tuple[Tensor, Tensor], backend: str, name: str, ranks: dict[str, int]
) -> None:
    number, layer = PLACES[name]
    folder, meaning = made[number]
    found = over_ranks(read_config(folder), layer, layer_tensors(folder, layer), batch, backend, ranks)
    torch.testing.assert_close(found, dense_layer(meaning, layer, *batch), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ranks", RANKS, ids=str)
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_ranks_together_add_a_bias_once(
    made: Made, batch: tuple[Tensor, Tensor], backend: str, name: str, ranks: dict[str, int]
) -> None:
    """Those of experts without deltas and without channels too; of gate and up those of an expert's own channels."""
    number, layer = PLACES[name]
    folder, meaning = made[number]
    content, swiglu = read_config(folder).model_dump(), (0.8, 1.702, 1.0)
    content["swiglu"] = dict(zip(("limit", "alpha", "beta"), swiglu, strict=True))
    for role in NAMES:
        content["layers"][layer][role]["bias"] = True
    config, tensors = CheckpointConfig.model_validate(content), layer_tensors(folder, layer)
    generator = torch.Generator()
    biases: list[list[Tensor]] = []
    for expert in range(8):
        prefix = f"{PREFIX.format(layer=layer)}.{expert}"
        kept = meaning.get(f"{prefix}.kept", torch.ones(256, dtype=torch.bool))
        biases.append([])
        for role, projection in NAMES.items():
            whole = torch.randn(config.shape(role)[0], generator=generator)  # type: ignore[arg-type]
            if role != "down":
                whole[~kept] = 0
            biases[-1].append(whole)
            tensors[f"{prefix}.{projection}.bias"] = whole if role == "down" else whole[kept]
    found = over_ranks(config, layer, tensors, batch, backend, ranks)
    expected = dense_layer(meaning, layer, *batch, biases=biases, swiglu=swiglu)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scope", ["token", "batch"])
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_selection_with_a_rounded_base_is_the_oracles(
    made: Made, batch: tuple[Tensor, Tensor], backend: str, scope: str, tp: int
) -> None:
    """int8 base, of which some columns are used; int4 factors: token by token in float64 numpy."""
    number, layer = PLACES["columns"]
    folder, meaning = made[number]
    config, tensors, (x, ids) = read_config(folder), layer_tensors(folder, layer), batch
    prefix = PREFIX.format(layer=layer)

    def get(expert: int, role: str, kind: str) -> Any:
        found = meaning.get(f"{prefix}.{expert}.{NAMES[role]}.{kind}")
        return None if found is None else found.double().numpy()

    entry = config.layers[layer]
    case = Case(
        x=x.double().numpy(),
        topk_ids=ids.numpy(),
        topk_weights=torch.linspace(0.2, 0.8, ids.numel()).view(ids.shape).double().numpy(),
        delta_u={role: [get(e, role, "delta_u") for e in range(8)] for role in NAMES},
        delta_v={role: [get(e, role, "delta_v") for e in range(8)] for role in NAMES},
        base={role: get(0, role, "base") for role in NAMES},
        columns={role: get(0, role, "base_columns").astype(int) for role in NAMES},
        used={role: entry[role].used_columns for role in NAMES},  # type: ignore[index]
        groups=8,
        num_experts=8,
        intermediate_size=256,
        scope=scope,
        norms={role: np.linalg.norm(get(0, role, "base"), axis=0) for role in NAMES},
        trimmed=entry.trimmed,
    )
    total = torch.zeros_like(x)
    for rank in range(tp):
        loader = make_loader(config, layer=layer, tp=(rank, tp))
        total += compute(loader, fill(loader, tensors), x, ids, scope, backend)
    torch.testing.assert_close(total.double(), torch.from_numpy(forward(case)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", LAYERS)
def test_static_shapes_change_nothing(made: Made, batch: tuple[Tensor, Tensor], name: str) -> None:
    """As wherever a graph may be captured: no expert's rows are asked for."""
    number, layer = PLACES[name]
    folder, meaning = made[number]
    loader = make_loader(read_config(folder), layer=layer)
    spec = loader.spec
    loader.spec = lambda *args, **constants: spec(*args, **constants, static_shapes=True)  # type: ignore[method-assign]
    found = compute(loader, fill(loader, layer_tensors(folder, layer)), *batch)
    torch.testing.assert_close(found.double(), dense_layer(meaning, layer, *batch), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", LAYERS)
def test_a_rank_holds_what_is_stored(made: Made, name: str) -> None:
    """To the byte but for what says where things belong: channels, columns, norms, indices; float32 as loaded here."""
    number, layer = PLACES[name]
    folder, _ = made[number]
    tensors = layer_tensors(folder, layer)
    held = make_loader(read_config(folder), layer=layer).empty_parameters(torch.float32)
    small = ("channels", "columns", "norms", "index")
    stored = sum(tensor.nbytes for full, tensor in tensors.items() if not full.endswith(small))
    assert sum(tensor.nbytes for kind, tensor in held.items() if not kind.endswith(small)) == stored


@pytest.mark.parametrize("name", LAYERS)
def test_every_missing_tensor_is_named(made: Made, name: str) -> None:
    number, layer = PLACES[name]
    folder, _ = made[number]
    config, tensors = read_config(folder), layer_tensors(folder, layer)
    for full in list(tensors)[:: 1 + len(tensors) // 30]:
        loader = make_loader(config, layer=layer)
        fill(loader, {other: tensor for other, tensor in tensors.items() if other != full})
        assert loader.missing() == [full]
    ranks = [make_loader(config, ep=(rank, 2), layer=layer) for rank in range(2)]
    missed = [set(rank.missing()) for rank in ranks]
    assert missed[0] | missed[1] == set(tensors)


@pytest.mark.parametrize("ep", [1, 2])
@pytest.mark.parametrize("name", LAYERS)
def test_dummy_weights_can_be_computed_with(made: Made, batch: tuple[Tensor, Tensor], name: str, ep: int) -> None:
    number, layer = PLACES[name]
    loader = make_loader(read_config(made[number][0]), ep=(ep - 1, ep), layer=layer)
    parameters = loader.empty_parameters(torch.float32)
    for tensor in parameters.values():
        if tensor.is_floating_point():
            tensor.uniform_(-1e-3, 1e-3)
    assert compute(loader, parameters, *batch).isfinite().all()


@pytest.mark.parametrize("name", LAYERS)
def test_the_reconstruction_is_the_meaning(made: Made, name: str) -> None:
    number, layer = PLACES[name]
    folder, meaning = made[number]
    rebuilt = Reconstruction(Reader(folder), check_checkpoint(folder), torch.float64)
    for expert in range(8):
        for role in NAMES:
            expected = dense_expert(meaning, layer, expert, role)
            found = rebuilt.weight(layer, expert, role)  # type: ignore[arg-type]
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("number", range(len(SETS)))
@torch.no_grad()
def test_plain_transformers_computes_the_same(made: Made, number: int, tmp_path: Path) -> None:
    """With its own code and with ours; in bfloat16 and float16 too, whose scales stay what they are."""
    folder, meaning = made[number]
    write_dense(folder, tmp_path / "dense", torch.float32, meaning)
    tokens = torch.arange(3, 40).view(1, -1)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")(tokens).logits
    for remote in (True, False):
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=remote)
        for _ in range(2):
            torch.testing.assert_close(model(tokens).logits, expected, rtol=0, atol=1e-4)
    half = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16)
    scales = [buffer for name, buffer in half.named_buffers() if name.endswith("_scales")]
    assert all(scale.dtype in (torch.bfloat16, torch.float32) for scale in scales)
    # A token that is routed elsewhere for a rounding is another matter.
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float16)
    assert (half(tokens).logits - dense(tokens).logits).abs().median() < 0.03


def first(tensors: dict[str, Tensor], ending: str) -> str:
    return next(name for name in tensors if name.endswith(ending))


def cut(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name] = tensors[name][:, :-1].contiguous()


def flipped(ending: str) -> Callable[[dict[str, Tensor]], object]:
    """One channel moved to the next slice of them."""

    def damage(tensors: dict[str, Tensor]) -> None:
        bits = tensors[first(tensors, ending)]
        place = int((bits != 0).nonzero()[0])
        bits[place] &= bits[place] - 1

    return damage


def exchanged(tensors: dict[str, Tensor]) -> None:
    """The base has another channel of the same slice: an expert's would be computed from another's row."""
    bits = tensors[first(tensors, "base_channels")]
    place = int(((bits != 0) & (bits != 255)).nonzero()[0])
    byte = int(bits[place])
    least, lacking = byte & -byte, ~byte & byte + 1 & 255
    bits[place] = byte ^ least ^ (lacking or 1 << (~byte & 255).bit_length() - 1)


DAMAGES: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "scales missing": (lambda t: t.pop(first(t, "w1.dense_scales")), "dense_scales"),
    "codes missing": (lambda t: t.pop(first(t, "w2.dense")), "w2.dense"),
    "codes of another width": (lambda t: cut(t, first(t, "3.w1.dense")), "3.w1.dense"),
    "codes as signed bytes": (lambda t: t.update({n: t[n].view(torch.int8) for n in [first(t, "w1.dense")]}), "dense"),
    "scales in another dtype": (lambda t: t.update({n: t[n].float() for n in [first(t, "w1.dense_scales")]}), "scales"),
    "channels missing": (lambda t: t.pop(first(t, "3.w2.channels")), "3.w2.channels"),
    "a channel less": (flipped("3.w2.channels"), "3.w2.channels: not as many channels"),
    "a channel less in the base": (flipped("base_channels"), "base_channels: not as many channels"),
    "another channel in the base": (exchanged, "base_channels: its channels are not those that any expert keeps"),
    "more channels than counted": (lambda t: t[first(t, "2.w2.channels")].fill_(255), "2.w2.channels"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_refused_by_name(made: Made, tmp_path: Path, name: str) -> None:
    damage, words = DAMAGES[name]
    folder = shutil.copytree(made[0][0], tmp_path / "damaged")
    edit(folder, damage)
    content = json.loads((folder / "config.json").read_text())["quantization_config"]
    for reader, error in ((lambda: check_checkpoint(folder), CheckpointError),
                          (lambda: check_files(str(folder), content), ValueError)):  # fmt: skip
        with pytest.raises(error) as caught:
            reader()
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_scales_that_are_none_are_refused_while_loading(made: Made, value: float) -> None:
    number, layer = PLACES["based"]
    tensors = layer_tensors(made[number][0], layer)
    full = first(tensors, "w1.dense_scales")
    loader = make_loader(read_config(made[number][0]), layer=layer)
    with pytest.raises(CheckpointError, match=r"gate.dense_scales has values that are no scales"):
        fill(loader, {full: tensors[full].clone().fill_(value)})


def test_bytes_are_those_of_the_table(made: Made) -> None:
    for folder, _ in made:
        config = read_config(folder)
        for name, spec in config.expert_tensors().items():
            assert spec.nbytes == spec.numel * DTYPE_BYTES[spec.dtype], name
        stored = Reader(folder).specs
        assert {name: stored[name] for name in config.expert_tensors()} == config.expert_tensors()
