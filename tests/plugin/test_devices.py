"""D2Experts off the CPU: device maps, static shapes, and that nothing stays behind where it was made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from synthetic import NAMES, PREFIX
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

import d2moe_vllm.hf  # noqa: F401 - registers
from d2moe_vllm.hf.experts import D2Experts

LAYERS = range(4)
"""Of the `variants` checkpoint: each has another variant of the format."""
TOKENS = torch.arange(24).view(2, 12)
SPLIT = {
    "model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu",
    "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk", "model.layers.3": "cpu",
}  # fmt: skip


def experts_of(checkpoint: Path, layer: int, scope: str = "off") -> D2Experts:
    settings = json.loads((checkpoint / "config.json").read_text())["quantization_config"]
    return D2Experts(
        8, 128, 256, settings["layers"][str(layer)], groups=8, projections=NAMES, dtype="float32", scope=scope
    )


def loaded(checkpoint: Path, layer: int, scope: str = "off") -> D2Experts:
    experts, prefix = experts_of(checkpoint, layer, scope), PREFIX.format(layer=layer) + "."
    stored = load_file(checkpoint / "model-00002-of-00002.safetensors")
    experts.load_state_dict({n.removeprefix(prefix): t for n, t in stored.items() if n.startswith(prefix)})
    return experts


def routed(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    return *batch, torch.rand(batch[1].shape)


@pytest.mark.parametrize("scope", ["off", "token", "batch"])
@pytest.mark.parametrize("layer", LAYERS)
def test_static_shapes_change_nothing_but_the_order_of_sums(
    variants: Path, batch: tuple[Tensor, Tensor], layer: int, scope: str
) -> None:
    experts, inputs = loaded(variants, layer, scope), routed(batch)
    expected = experts(*inputs)
    experts.static_shapes = True
    torch.testing.assert_close(experts(*inputs), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layer", LAYERS)
def test_joining_in_place_changes_no_bit_and_no_memory(
    variants: Path, batch: tuple[Tensor, Tensor], layer: int
) -> None:
    """The weights keep their names and values, are views of the joined ones, and are joined once."""
    experts, inputs = loaded(variants, layer), routed(batch)
    expected, before = experts(*inputs), {name: tensor.clone() for name, tensor in experts.state_dict().items()}
    experts.in_place = True
    with torch.inference_mode():
        assert torch.equal(experts(*inputs), expected)
    places = {name: tensor.data_ptr() for name, tensor in experts.named_parameters()}
    assert torch.equal(experts(*inputs), expected)
    assert {name: tensor.data_ptr() for name, tensor in experts.named_parameters()} == places
    assert all(torch.equal(tensor, before[name]) for name, tensor in experts.state_dict().items())
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in experts.parameters()}
    assert sum(storages.values()) == sum(t.nbytes for t in experts.parameters())
    # Moving the module takes the views apart, and the next call joins them again.
    experts.to(torch.float64).to(torch.float32)
    assert torch.equal(experts(*inputs), expected)


class AllOnMeta(TorchDispatchMode):
    """Refuses operations on tensors that are not on the meta device, but for numbers and moves to it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        moves = func in (torch.ops.aten._to_copy.default, torch.ops.aten.lift_fresh.default)
        left = [tensor for tensor in tensors if tensor.device.type != "meta" and tensor.dim() and not moves]
        assert not left, f"{func} got {left}"
        return func(*args, **kwargs)


@pytest.mark.parametrize("layer", LAYERS)
def test_nothing_is_left_on_the_cpu(variants: Path, batch: tuple[Tensor, Tensor], layer: int) -> None:
    """Moved to another device, every tensor of a call is there: the meta device stands in for a GPU."""
    experts = loaded(variants, layer, "batch").to("meta")
    experts.static_shapes = True
    experts.padding_mask = torch.zeros(batch[0].shape[0], dtype=torch.bool, device="meta")
    with AllOnMeta():
        assert experts(*(tensor.to("meta") for tensor in routed(batch))).device.type == "meta"


def test_the_check_above_finds_a_tensor_that_was_left(variants: Path, batch: tuple[Tensor, Tensor]) -> None:
    experts = loaded(variants, 0, "batch").to("meta")
    experts.static_shapes = True
    experts.padding_mask = torch.zeros(batch[0].shape[0], dtype=torch.bool)
    with AllOnMeta(), pytest.raises(AssertionError, match="got"):
        torch.where(experts.padding_mask.unsqueeze(1), 0, batch[0].to("meta"))


@pytest.mark.parametrize("layer", LAYERS)
def test_static_shapes_depend_on_no_data(variants: Path, layer: int) -> None:
    """Tensors without values would make any branch or shape that depends on them an error: CUDA graphs need that."""
    with FakeTensorMode():
        experts = experts_of(variants, layer, "batch")
        experts.static_shapes = True
        inputs = torch.empty(6, 128), torch.zeros(6, 2, dtype=torch.long), torch.empty(6, 2)
        assert experts(*inputs).shape == (6, 128)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}, SPLIT], ids=["cpu", "auto", "one", "disk"])
@pytest.mark.parametrize("trust_remote_code", [False, True])
@torch.no_grad()
def test_device_maps(variants: Path, tmp_path: Path, device_map: Any, trust_remote_code: bool) -> None:
    """Offloaded to disk too, where weights come to the device only while their module runs."""
    expected = AutoModelForCausalLM.from_pretrained(variants)(TOKENS).logits
    model = AutoModelForCausalLM.from_pretrained(
        variants, device_map=device_map, offload_folder=tmp_path, trust_remote_code=trust_remote_code
    )
    on_disk = any(tensor.device.type == "meta" for tensor in model.parameters())
    assert on_disk == (device_map is SPLIT)
    for _ in range(2):
        assert torch.equal(model(TOKENS).logits, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("static_shapes", [False, True])
@torch.no_grad()
def test_a_gpu_gives_the_cpus_logits(variants: Path, static_shapes: bool) -> None:
    expected = AutoModelForCausalLM.from_pretrained(variants)(TOKENS).logits
    for options in ({"device_map": "cuda"}, {"device_map": "auto"}, {}):
        model = AutoModelForCausalLM.from_pretrained(variants, **options).to("cuda")
        for module in model.modules():
            if isinstance(module, D2Experts):
                module.static_shapes = static_shapes
        torch.testing.assert_close(model(TOKENS.cuda()).logits.cpu(), expected, rtol=0, atol=1e-3)
