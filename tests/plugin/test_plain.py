"""Layers that are plainly of 8 or 4 bits, handed to vLLM's own experts: which, and that no number changes on the way.

Marlin's operators need a GPU. What they are given is opened here by vLLM's own functions, and computed with in torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("vllm")

from test_quantization import create, routed_experts, vllm_config  # noqa: F401 - a fixture
from vllm import _custom_ops
from vllm.config import VllmConfig
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEParallelConfig, RoutingMethodType
from vllm.model_executor.layers.fused_moe.experts import marlin_moe
from vllm.model_executor.layers.fused_moe.oracle import int_wna16
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe_wna16 as theirs,
)
from vllm.model_executor.layers.quantization.utils.quant_utils import unpack_quantized_values_into_int32
from vllm.scalar_type import scalar_types

from d2moe_vllm import compat
from d2moe_vllm.format.config import CheckpointConfig
from d2moe_vllm.ops import halves, reference, selfcheck
from d2moe_vllm.ops.packing import opened
from d2moe_vllm.ops.selfcheck import SelfCheckError
from d2moe_vllm.serving.experts import D2MoEMethod, _parameters
from d2moe_vllm.serving.plain import NotPlainError, PlainMethod, experts_of, plain_storage
from d2moe_vllm.serving.quantization import D2MoEConfig

TYPES = {8: scalar_types.uint8b128, 4: scalar_types.uint4b8}
STORAGES = [(8, 32), (8, 128), (4, 32), (4, 64), (4, 128)]
Dense = tuple[Tensor, Tensor]


@pytest.fixture
def content(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "config.json").read_text())["quantization_config"]


def plain(content: dict[str, Any], bits: int, group_size: int) -> CheckpointConfig:
    """The checkpoint's configuration, all of whose layers are dense matrices of so many bits."""
    one = {"delta": "dense", "delta_storage": {"type": f"int{bits}", "group_size": group_size}}
    layers = {number: dict.fromkeys(("gate", "up", "down"), one) for number in content["layers"]}
    return CheckpointConfig.model_validate({**content, "dtype": "bfloat16", "layers": layers})


def moe(**changes: Any) -> FusedMoEConfig:
    parallel = {
        "tp_size": 1,
        "pcp_size": 1,
        "dp_size": 1,
        "ep_size": 1,
        "tp_rank": 0,
        "pcp_rank": 0,
        "dp_rank": 0,
        "ep_rank": 0,
        "sp_size": 1,
        "use_ep": False,
        "all2all_backend": "allgather_reducescatter",
        "enable_eplb": False,
    }
    own = {name: changes.pop(name) for name in list(changes) if name in parallel}
    settings: dict[str, Any] = {
        "num_experts": 8, "experts_per_token": 2, "hidden_dim": 128, "intermediate_size": 256, "num_local_experts": 8,
        "num_logical_experts": 8, "activation": MoEActivation.SILU, "device": "cpu", "in_dtype": torch.bfloat16,
        "routing_method": RoutingMethodType.Renormalize,
    }  # fmt: skip
    return FusedMoEConfig(**{**settings, **changes}, moe_parallel_config=FusedMoEParallelConfig(**{**parallel, **own}))


def dense(codes: Tensor, scales: Tensor, bits: int) -> Tensor:
    """bfloat16 [E, out, in], by vLLM's own reading of its canonical layout, [E, out, int32 along the inputs]."""
    if bits == 4:  # what its emulation computes with on any device
        return int_wna16._process_weights_emulation_gptq(codes, codes, scales, scales, None, None)[0]
    numbers = unpack_quantized_values_into_int32(codes, TYPES[bits], packed_dim=2) - TYPES[bits].bias
    return numbers.bfloat16() * scales.repeat_interleave(numbers.shape[2] // scales.shape[2], dim=2)


class Kernel:
    """In the place of vLLM's: what it is given, by vLLM's meaning of it, in torch. wrong: with the wrong sign."""

    wrong = False
    is_monolithic = False

    def __init__(self, layer: Any, bits: int) -> None:
        self.w13, self.w2 = (
            dense(getattr(layer, f"{half}_weight_packed"), getattr(layer, f"{half}_weight_scale"), bits).float()
            for half in ("w13", "w2")
        )

    def apply(self, x: Tensor, w1: Tensor, w2: Tensor, **given: Any) -> Tensor:
        assert given["activation"] is MoEActivation.SILU
        if given["apply_router_weight_on_input"]:
            x, given["topk_weights"] = x * given["topk_weights"].to(x.dtype), torch.ones_like(given["topk_weights"])
        output = torch.zeros(x.shape, dtype=torch.float32)
        for row, gates, ids in zip(range(len(x)), given["topk_weights"], given["topk_ids"].tolist(), strict=True):
            for gate, expert in zip(gates.tolist(), ids, strict=True):
                assert 0 <= expert < given["global_num_experts"], "a number that no expert has"
                own = expert if given["expert_map"] is None else int(given["expert_map"][expert])
                if own >= 0:
                    of_gate, of_up = (self.w13[own] @ x[row].float()).chunk(2)
                    h = torch.nn.functional.silu(of_gate) * of_up
                    output[row] += (-gate if self.wrong else gate) * (self.w2[own] @ h)
        return output.to(x.dtype)


@pytest.fixture
def marlin(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A device that Marlin takes; weights stay in vLLM's canonical layout. Returns what was handed over."""
    seen: dict[str, Any] = {}

    def convert(**given: Any) -> Any:
        seen.update(given)
        names = ("w13", "w2", "w13_scale", "w2_scale", "w13_qzeros", "w2_qzeros")
        return (*map(given.get, names), None, None, None, None)

    def make(**given: Any) -> Kernel:
        seen.update(given)
        return Kernel(seen["layer"], seen["quant_config"].num_bits)

    monkeypatch.setattr(marlin_moe.MarlinExpertsBase, "_supports_current_device", staticmethod(lambda: True))
    monkeypatch.setattr(theirs, "convert_to_wna16_moe_kernel_format", convert)
    monkeypatch.setattr(theirs, "make_wna16_moe_kernel", make)
    monkeypatch.setattr(selfcheck, "_DONE", set())
    return seen


def loaded(config: CheckpointConfig, moe_config: FusedMoEConfig, **changes: Any) -> tuple[PlainMethod, Any, list[Any]]:
    """A layer of random codes and scales; and its parameters as they were loaded."""
    method = PlainMethod(moe_config, config, 1, "off", experts_of(moe_config, config, 1, "off"))
    size = 256 // moe_config.tp_size
    own = {
        "moe_config": moe_config, "activation": MoEActivation.SILU, "global_num_experts": 8,
        "intermediate_size_per_partition": size, **changes,
    }  # fmt: skip
    layer = routed_experts(**own)
    method.create_weights(layer, moe_config.num_local_experts, 128, size, torch.bfloat16, weight_loader=None)
    torch.manual_seed(0)
    for name, parameter in layer.named_parameters():
        if name.endswith("scales"):
            parameter.data.copy_(torch.rand(parameter.shape) * 2.0**-6)
        else:
            parameter.data.random_(256)
    return method, layer, [None if t is None else t.detach().clone() for t in _parameters(layer)]


@pytest.fixture(autouse=True)
def _dummy(vllm_config: VllmConfig) -> None:  # noqa: F811 - the fixture
    vllm_config.load_config.load_format = "dummy"


@pytest.mark.parametrize(("bits", "group"), STORAGES)
def test_no_number_changes_on_the_way(content: dict[str, Any], marlin: dict[str, Any], bits: int, group: int) -> None:
    """Bit by bit, codes that no compressor writes (-128, -8) and scales of every size among them."""
    method, layer, before = loaded(plain(content, bits, group), moe())
    kinds = {half: (w.dense, w.dense_scales) for half, w in zip(("w13", "w2"), halves(before), strict=True)}
    method.process_weights_after_loading(layer)
    how = method.spec.w13.delta
    assert (how.bits, how.group_size) == (bits, group)
    for half, (codes, scales) in kinds.items():
        inputs = 128 if half == "w13" else 256
        found = dense(marlin[half], marlin[f"{half}_scale"], bits)
        assert torch.equal(found, opened(codes, scales, how, (inputs,)).bfloat16())
    given = marlin["quant_config"]
    assert (given.num_bits, given.group_size, given.symmetric) == (bits, group, True)
    # Nothing is there twice.
    assert all(t is None for t in _parameters(layer))
    assert method.moe_kernel is method.theirs.moe_kernel is not None


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        ({}, {}),
        ({"experts_per_token": 1}, {"apply_router_weight_on_input": True}),
        ({"tp_size": 2, "tp_rank": 1}, {}),
        (
            {"ep_size": 2, "ep_rank": 1, "use_ep": True, "num_local_experts": 4},
            {
                "expert_map": torch.tensor([-1, -1, -1, -1, 0, 1, 2, 3], dtype=torch.int32),
                "_map_global_expert_id_to_local_expert_id": lambda expert: max(expert - 4, -1),
            },
        ),
    ],
    ids=["alone", "weights on inputs", "tensor parallel", "expert parallel"],
)
@pytest.mark.usefixtures("marlin")
def test_it_computes_what_the_reference_does(
    content: dict[str, Any], monkeypatch: pytest.MonkeyPatch, ranks: dict[str, Any], changes: dict[str, Any]
) -> None:
    """On each kind of rank, checked against the reference when it is loaded, and refused if it were another thing."""
    method, layer, before = loaded(plain(content, 4, 64), moe(**ranks), **changes)
    method.process_weights_after_loading(layer)
    assert len(selfcheck._DONE) == 1
    count = method.moe.experts_per_token
    x, gates = torch.randn(9, 128).bfloat16(), torch.rand(9, count)
    ids = torch.rand(9, 8).argsort(dim=1)[:, :count].int()
    found = method.apply(layer, x, gates, ids)
    local = ids if "expert_map" not in changes else changes["expert_map"][ids.long()]
    if layer.apply_router_weight_on_input:
        x, gates = x * gates.to(x.dtype), torch.ones_like(gates)
    expected = reference.fused_experts(x, gates, local, *halves(before), None, method.spec)
    torch.testing.assert_close(found, expected, rtol=0.05, atol=float(expected.float().std()) * 0.05)
    method, layer, _ = loaded(plain(content, 4, 64), moe(**ranks), **changes)
    monkeypatch.setattr(Kernel, "wrong", True)
    monkeypatch.setattr(selfcheck, "_DONE", set())
    with pytest.raises(SelfCheckError, match=r"backend 'vllm' does not compute .*triton"):
        method.process_weights_after_loading(layer)


@pytest.mark.parametrize("bits", [8, 4])
def test_marlin_gets_inputs_first(content: dict[str, Any], monkeypatch: pytest.MonkeyPatch, bits: int) -> None:
    """Through vLLM's own preparation for Marlin, up to its operator, which orders codes for a GPU's cores."""
    seen: list[tuple[Any, ...]] = []

    def repack(codes: Tensor, inputs: int, outputs: int, num_bits: int, is_a_8bit: bool) -> Tensor:
        seen.append((codes, inputs, outputs, num_bits, is_a_8bit))
        return codes

    monkeypatch.setattr(marlin_moe.MarlinExpertsBase, "_supports_current_device", staticmethod(lambda: True))
    monkeypatch.setattr(_custom_ops, "gptq_marlin_moe_repack", repack)
    monkeypatch.setattr(theirs, "make_wna16_moe_kernel", lambda **given: given)
    method, layer, before = loaded(plain(content, bits, 64), moe())
    method._pack(layer)
    for (codes, inputs, outputs, *rest), weights, size in zip(
        seen, halves(before), ((128, 512), (256, 128)), strict=True
    ):
        assert (inputs, outputs) == size
        assert rest == [bits, False]
        numbers = unpack_quantized_values_into_int32(codes, TYPES[bits], packed_dim=1)
        exact = opened(weights.dense, torch.ones_like(weights.dense_scales), method.spec.w13.delta, (inputs,))
        assert torch.equal(numbers.transpose(1, 2) - TYPES[bits].bias, exact.int())


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "float16": ({"in_dtype": torch.float16}, "scales are bfloat16, and activations float16"),
    "data parallel": ({"dp_size": 2}, "ranks exchange tokens"),
    "uneven": ({"ep_size": 3, "use_ep": True}, "8 experts are not the same number on each of 3 ranks"),
    "cut groups": ({"tp_size": 8}, "groups of 64 inputs are not whole on every rank"),
    "device": ({}, "WNA16 MoE backend 'MARLIN' does not support the deployment configuration since kernel does not"),
    "another's kernels": ({"moe_backend": "cutlass"}, "moe_backend='cutlass' is not supported for WNA16 MoE"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_why_a_plain_layer_is_not_vllms(content: dict[str, Any], name: str) -> None:
    """By us or, of what its kernels need, by vLLM's own choice of them."""
    changes, words = REFUSED[name]
    with pytest.raises(NotPlainError, match=words) as error:
        experts_of(moe(**changes), plain(content, 4, 64), 1, "off")
    assert "\n" not in str(error.value)


def test_which_layers_are_plain(content: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    own = plain(content, 4, 64)
    assert plain_storage(own.layers[1]) == own.layers[1].down.delta_storage
    for role, changes in (
        ("down", {"delta_storage": {"type": "int8", "group_size": 64}}),
        ("down", {"delta_storage": {"type": "int4", "group_size": 32}}),
        ("down", {"delta_storage": None}),
        ("down", {"full_base": True}),
    ):
        layer = own.layers[1].model_dump()
        layer[role] |= changes
        assert plain_storage(type(own.layers[1]).model_validate(layer)) is None, changes
    assert plain_storage(plain(content, 3, 64).layers[1]) is None
    assert plain_storage(CheckpointConfig.model_validate(content).layers[1]) is None
    with pytest.raises(NotPlainError, match="layer 1 is not plainly 8 or 4 bits of one group size"):
        experts_of(moe(), CheckpointConfig.model_validate(content), 1, "off")
    with pytest.raises(NotPlainError, match="bits must not"):
        experts_of(moe(), own, 1, "token")
    monkeypatch.setattr("d2moe_vllm.serving.plain.batch_invariant", lambda: True)
    with pytest.raises(NotPlainError, match="bits must not"):
        experts_of(moe(), own, 1, "off")


PREFIX = "model.layers.1.block_sparse_moe.experts"


@pytest.mark.usefixtures("marlin")
@pytest.mark.parametrize(
    ("asked", "bits", "kind"),
    [
        (None, 4, PlainMethod),
        ("vllm", 8, PlainMethod),
        ("triton", 4, D2MoEMethod),
        ("reference", 4, D2MoEMethod),
        (None, 2, D2MoEMethod),
    ],
)
def test_who_serves_a_layer_on_a_gpu(
    content: dict[str, Any],
    vllm_config: VllmConfig,  # noqa: F811 - the fixture
    monkeypatch: pytest.MonkeyPatch,
    asked: str | None,
    bits: int,
    kind: type,
) -> None:
    monkeypatch.setattr(compat, "device_type", lambda: "cuda")
    vllm_config.additional_config = {} if asked is None else {"d2moe": {"backend": asked}}
    config = D2MoEConfig(plain(content, bits, 64))
    config._checked = True
    method = config.get_quant_method(routed_experts(moe_config=moe()), PREFIX)
    assert type(method) is kind


def test_vllms_experts_that_are_asked_for_are_refused_by_name(
    content: dict[str, Any],
    vllm_config: VllmConfig,  # noqa: F811 - the fixture
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vllm_config.additional_config = {"d2moe": {"backend": "vllm"}}
    config = D2MoEConfig(plain(content, 2, 64))
    config._checked = True
    with pytest.raises(
        ValueError, match="d2moe backend 'vllm' is none of those for this device: cpu, cpu-int8, reference"
    ):
        config.get_quant_method(routed_experts(moe_config=moe()), PREFIX)
    monkeypatch.setattr(compat, "device_type", lambda: "cuda")
    with pytest.raises(ValueError, match="d2moe backend 'vllm' does not serve this: layer 1 is not plainly 8 or 4"):
        config.get_quant_method(routed_experts(moe_config=moe()), PREFIX)
