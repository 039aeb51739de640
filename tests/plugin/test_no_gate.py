"""Experts without a gate: what config.json may say of them, and one layer of every way to store them, loaded as ranks
do and as transformers' module does, against down(relu(up x)²) of whole matrices in float64."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from few_bits import HIGHEST, ZERO, _bytes
from torch import Tensor

from d2moe_vllm.format.config import CheckpointConfig, CheckpointError, parse_config
from d2moe_vllm.hf.experts import D2Experts
from d2moe_vllm.ops import BACKENDS
from d2moe_vllm.ops.weights import Weights
from d2moe_vllm.serving.loading import LayerLoader

EXPERTS, HIDDEN, INNER, GROUPS = 4, 24, 40, 4
NAMES = {"up": "up_proj", "down": "down_proj"}
SHARDS = {"up": "w1", "down": "w2"}
"""vLLM's names of the places where it looks for experts without a gate."""


def packed(bits: int) -> dict[str, Any]:
    return {"type": f"int{bits}", "group_size": 32}


LAYERS: dict[str, dict[str, Any]] = {
    "factors": {"up": {"rank": 5}, "down": {"rank": 7}},
    "on a pruned base": {
        "up": {"rank": 3, "kept_columns": 16, "used_columns": 16},
        "down": {"rank": 4, "kept_columns": 24, "used_columns": 24},
    },
    "on a low-rank base": {"up": {"rank": 3, "base_rank": 6}, "down": {"rank": 4, "base_rank": 5}},
    "one V, fewer U's": {
        "up": {"rank": 9, "shared_v": True, "distinct_u": 3},
        "down": {"rank": 9, "shared_v": True, "distinct_u": 2},
    },
    "columns": {"up": {"rank": 8, "delta": "columns"}, "down": {"rank": 12, "delta": "columns"}},
    "trimmed": {
        "up": {"rank": 3, "full_base": True},
        "down": {"rank": 4, "full_base": True},
        "trimmed": [1, 3],
    },
    **{
        f"{bits} bits": {role: {"delta": "dense", "delta_storage": packed(bits)} for role in NAMES}
        for bits in (8, 4, 3, 2)
    },
    "16 bits": {role: {"delta": "dense"} for role in NAMES},
    "few bits on a base": {
        role: {
            "delta": "dense", "delta_storage": packed(2), "full_base": True, "base_storage": packed(4), "bias": True,
        }
        for role in NAMES
    },
    "unequal widths": {
        **{role: {"delta": "dense", "delta_storage": packed(3)} for role in NAMES},
        "channels": {"experts": [[10, 3, 0, 7], [0, 0, 0, 0], [1, 2, 3, 4], [10, 10, 10, 10]]},
    },
    "unequal widths on a base": {
        **{
            role: {"delta": "dense", "delta_storage": packed(4), "full_base": True, "base_storage": packed(8)}
            for role in NAMES
        },
        "channels": {"experts": [[4, 3, 0, 2], [1, 1, 1, 1], [1, 2, 3, 4], [0, 2, 0, 5]], "base": [5, 4, 3, 6]},
    },
}  # fmt: skip


def content(layer: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "quant_method": "d2moe", "format_version": 2, "family": "nemotron_h",
        "experts": "backbone.layers.{layer}.mixer.experts", "projections": NAMES, "num_experts": EXPERTS,
        "hidden_size": HIDDEN, "intermediate_size": INNER, "dtype": "float32", "pruning": {"groups": GROUPS},
        "layers": {"1": layer}, "source": {"name": "nobody/random", "parameters": 1, "bytes": 1}, **changes,
    }  # fmt: skip


def masks(layer: dict[str, Any], generator: torch.Generator) -> dict[int | None, Tensor]:
    """Which channels each expert keeps, and the base (None), bool [I]."""
    size, channels = INNER // GROUPS, layer["channels"]

    def some(counts: list[int], among: Tensor) -> Tensor:
        found = torch.zeros(INNER, dtype=torch.bool)
        for group, count in enumerate(counts):
            places = among.view(GROUPS, size)[group].nonzero()[:, 0]
            found[group * size + places[torch.randperm(len(places), generator=generator)[:count]]] = True
        return found

    everywhere = torch.ones(INNER, dtype=torch.bool)
    if "base" not in channels:
        return {e: some(counts, everywhere) for e, counts in enumerate(channels["experts"])}
    base = some(channels["base"], everywhere)
    while True:  # the base has exactly the channels that any expert has
        own = {e: some(counts, base) for e, counts in enumerate(channels["experts"])}
        if torch.equal(torch.stack(list(own.values())).any(dim=0), base):
            return {None: base, **own}


class Made:
    """Tensors of the checkpoint by full name, and per expert and role the matrix [out, in] and bias that they mean."""

    def __init__(self, config: CheckpointConfig, layer: dict[str, Any]) -> None:
        self.config, self.generator = config, torch.Generator().manual_seed(5)
        self.kept = masks(layer, self.generator) if "channels" in layer else {}
        self.tensors: dict[str, Tensor] = {}
        meaning: dict[tuple[str, int, str], Tensor] = {}
        for name, one in config.stored(1).items():
            if one.is_scales:
                continue
            numbers = self._numbers(name, one)
            meaning[one.role, one.expert, one.name] = numbers.double() if numbers.is_floating_point() else numbers
        for role in NAMES:
            columns = meaning.get((role, 0, "base_columns"))
            if columns is not None:
                norms = meaning[role, 0, "base"].norm(dim=0).float()
                self.tensors[config.tensor_name(1, 0, role, "base_norms")] = norms
        self.weights = [{role: self._whole(meaning, e, role) for role in NAMES} for e in range(EXPERTS)]
        self.biases = [
            {role: meaning.get((role, e, "bias"), torch.zeros(1).double()) for role in NAMES} for e in range(EXPERTS)
        ]

    def _numbers(self, name: str, one: Any) -> Tensor:
        config, shape = self.config, one.spec.shape
        content = one.kind.content
        if content == "mask":
            mask = self.kept[None if one.kind.owner == "layer" else one.expert]
            found = _bytes(mask.int()[None], 1)[0]
        elif content == "inputs":
            size = config.shape(one.role)[1] // GROUPS
            each = [torch.randperm(size, generator=self.generator)[: shape[0] // GROUPS].sort().values + size * g
                    for g in range(GROUPS)]  # fmt: skip
            found = torch.cat(each).int()
        elif content == "slots":
            slots = config.layers[1][one.role].distinct_u
            found = torch.arange(shape[0]).remainder(slots).int()
        else:
            storage = one.kind.packed(config.layers[1][one.role])
            if storage is not None:
                return self._packed(name, one, int(storage.type.removeprefix("int")), storage.group_size)
            found = torch.randn(shape, generator=self.generator) * max(shape[-1], 1) ** -0.5
        self.tensors[name] = found
        return found

    def _packed(self, name: str, one: Any, bits: int, group: int) -> Tensor:
        owner = None if one.kind.owner == "layer" else one.expert
        sizes = [self.config.sizes.size_of(s, one.role, self.config.layers[1], owner) for s in one.kind.sizes]
        codes = torch.randint(0, HIGHEST[bits] + 1, sizes, generator=self.generator)
        scales = torch.rand(*sizes[:-1], -(-sizes[-1] // group), generator=self.generator)
        scales = (scales * max(sizes[-1], 1) ** -0.5 / HIGHEST[bits] * 4).bfloat16()
        stored = _bytes(codes.int(), bits) if codes.numel() else torch.zeros(one.spec.shape, dtype=torch.uint8)
        self.tensors |= {name: stored, name + "_scales": scales}
        return (codes - ZERO[bits]) * scales.double().repeat_interleave(group, dim=-1)[..., : sizes[-1]]

    def _whole(self, meaning: dict[tuple[str, int, str], Tensor], expert: int, role: str) -> Tensor:
        out, inputs = self.config.shape(role)

        def get(kind: str, at: int = expert) -> Tensor | None:
            return meaning.get((role, at, kind))

        def spread(values: Tensor, kept: Tensor | None) -> Tensor:
            if kept is None:
                return values
            full = torch.zeros(out, inputs, dtype=torch.float64)
            full[(slice(None), kept) if role == "down" else kept] = values
            return full

        whole = torch.zeros(out, inputs, dtype=torch.float64)
        if (base := get("base", 0)) is not None:
            columns = get("base_columns", 0)
            whole[:, torch.arange(inputs) if columns is None else columns.long()] += spread(base, self.kept.get(None))
        if (base_u := get("base_u", 0)) is not None:
            whole += base_u @ get("base_v", 0)  # type: ignore[operator]
        if (dense := get("dense")) is not None:
            whole += spread(dense, self.kept.get(expert))
        index = get("u_index", 0)
        u = get("delta_u", expert if index is None else int(index[expert]))
        if expert not in self.config.layers[1].trimmed and u is not None:
            if (columns := get("delta_columns")) is not None:
                whole[:, columns.long()] += u
            else:
                v = get("shared_v", 0) if get("shared_v", 0) is not None else get("delta_v")
                whole += u @ v  # type: ignore[operator]
        if (kept := self.kept.get(expert)) is not None:
            whole *= kept.double() if role == "down" else kept.double()[:, None]
        return whole

    def oracle(self, x: np.ndarray, ids: np.ndarray, gates: np.ndarray) -> np.ndarray:
        found = np.zeros_like(x)
        for t, row in enumerate(x):
            for expert, gate in zip(ids[t], gates[t], strict=True):
                up, down = (self.weights[expert][role].numpy() for role in NAMES)
                bias, out = (self.biases[expert][role].numpy() for role in NAMES)
                inner = up @ row + bias
                found[t] += gate * (down @ np.where(inner > 0, inner, 0.0) ** 2 + out)
        return found


def made(name: str) -> Made:
    return Made(parse_config(content(LAYERS[name])), LAYERS[name])


def batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:2] for _ in range(9)])
    return torch.randn(9, HIDDEN, generator=generator), ids, torch.rand(9, 2, generator=generator)


def on_rank(one: Made, backend: str, tp: tuple[int, int] = (0, 1), experts: range = range(EXPERTS)) -> Tensor:
    """What a rank gives, fed through the loaders that vLLM asks."""
    x, ids, gates = batch()
    loader = LayerLoader(
        one.config, 1, num_local_experts=len(experts),
        local_expert=lambda e: experts.index(e) if e in experts else -1, tp_rank=tp[0], tp_size=tp[1],
    )  # fmt: skip
    parameters = loader.empty_parameters(torch.float32)
    for name, tensor in one.tensors.items():
        *_, expert, projection, kind = name.split(".")
        role = next(role for role, known in NAMES.items() if known == projection)
        target = f"{'w2' if role == 'down' else 'w13'}_{kind}"
        parameter = torch.nn.Parameter(parameters[target], requires_grad=False)
        loader.weight_loader(kind)(parameter, tensor, name, SHARDS[role], int(expert), True)
    assert loader.missing() == []
    halves = [Weights(**{k: parameters.get(f"{half}_{k}") for k in Weights._fields}) for half in ("w13", "w2")]
    spec = loader.spec("off", activation="relu2", prune_down=True)
    if (pack := BACKENDS[backend].pack) is not None:
        halves = list(pack(*halves, spec))
    local = torch.tensor([[experts.index(e) if e in experts else -1 for e in row] for row in ids.tolist()])
    return BACKENDS[backend].fused_experts(x, gates, local, *halves, None, spec).double()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_what_it_stands_for_on_one_rank_and_on_two(name: str, backend: str) -> None:
    one = made(name)
    x, ids, gates = batch()
    expected = torch.from_numpy(one.oracle(*(t.double().numpy() if t.is_floating_point() else t.numpy()
                                             for t in (x, ids, gates))))  # fmt: skip
    assert float(expected.norm()) > 1

    def close(found: Tensor) -> None:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

    close(on_rank(one, backend))
    close(sum(on_rank(one, backend, tp=(rank, 2)) for rank in range(2)))
    close(sum(on_rank(one, backend, experts=experts) for experts in (range(1), range(1, EXPERTS))))


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_transformers_module_computes_the_same(name: str, static: bool) -> None:
    one = made(name)
    experts = D2Experts(
        EXPERTS, HIDDEN, INNER, json.loads(json.dumps(LAYERS[name])), groups=GROUPS, projections=NAMES, dtype="float32",
        activation="relu2",
    )  # fmt: skip
    experts.static_shapes = static
    prefix = one.config.experts_prefix(1) + "."
    experts.load_state_dict({key.removeprefix(prefix): tensor for key, tensor in one.tensors.items()})
    x, ids, gates = batch()
    expected = one.oracle(x.double().numpy(), ids.numpy(), gates.double().numpy())
    np.testing.assert_allclose(experts(x, ids, gates).double().numpy(), expected, rtol=1e-4, atol=1e-4)


GATE = {"rank": 5}
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "a gate that projections do not name": ({"gate": GATE}, {}, "layer 1 has gate and up and down, projections up and"),
    "a gate that layers lack": (
        {},
        {"projections": {"gate": "gate_proj", **NAMES}},
        "layer 1 has up and down, projections gate and up and down",
    ),
    "no up": ({}, {"projections": {"gate": "gate_proj", "down": "down_proj"}}, "projections must name gate, up and"),
    "one name for both": ({}, {"projections": dict.fromkeys(NAMES, "proj")}, "projections must name gate, up and"),
    "a SwiGLU": ({}, {"swiglu": {"limit": 7.0, "alpha": 1.0, "beta": 1.0}}, "swiglu needs a gate"),
    "bases": (
        {"up": {"rank": 5, "delta": "bases", "bases": 2, "function": "silu"}},
        {},
        "delta 'bases' is for gate and up, and these experts have no gate",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_needs_a_gate_or_lacks_one_is_refused(what: str) -> None:
    layer, changes, words = REFUSED[what]
    with pytest.raises(CheckpointError) as error:
        parse_config(content({**LAYERS["factors"], **layer}, **changes))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_nothing_is_counted_of_a_gate() -> None:
    config = parse_config(content(LAYERS["factors"]))
    assert config.layer_numbers == EXPERTS * 2 * HIDDEN * INNER
    assert not any(".gate" in name for name in config.expert_tensors())
    assert config.expert_numbers == EXPERTS * (HIDDEN + INNER) * (5 + 7)
    assert CheckpointConfig.model_validate_json(config.model_dump_json()) == config
