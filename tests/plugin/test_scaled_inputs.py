"""Router's weights on the experts' input (Llama 4): transformers' layer hands all tokens to its experts, once for each
expert, times these. Held against the layer's formula in float64, token by token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu
from transformers import Llama4TextConfig
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

from d2moe_vllm.format.kinds import ROLES
from d2moe_vllm.hf.experts import D2Experts
from d2moe_vllm.ops.reference import gated
from offline.source.families import MoEShape
from offline.work.activations import Rows
from offline.work.statistics import DenseExperts, Recorder

EXPERTS, HIDDEN, INNER, TOKENS = 4, 64, 48, 10
NAMES = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
LAYER = {role: {"rank": 5, "full_base": True} for role in ROLES}
SELECTING = {
    **{role: {"rank": 5, "kept_columns": 32, "used_columns": 8} for role in ("gate", "up")},
    "down": {"rank": 5},
}
Matrices = dict[tuple[int, str], Tensor]


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) / shape[-1] ** 0.5


def compressed(layer: dict[str, Any]) -> D2Experts:
    """With random weights in float64."""
    experts = D2Experts(EXPERTS, HIDDEN, INNER, layer, groups=8, projections=NAMES, dtype="float32").double()
    state = {}
    for seed, (name, tensor) in enumerate(experts.state_dict().items()):
        if name.endswith("base_columns"):
            state[name] = torch.arange(0, HIDDEN, 2, dtype=torch.int32)
        elif name.endswith("base_norms"):
            state[name] = torch.rand(tensor.shape, generator=torch.Generator().manual_seed(1))
        else:
            state[name] = drawn(*tensor.shape, seed=3 if "up_proj" in name and "column" in name else seed)
    experts.load_state_dict(state)
    return experts


def stands_for(experts: D2Experts) -> Matrices:
    base = {role: experts.projection(0, role)("base") for role in ROLES}
    return {
        (e, role): base[role] + experts.projection(e, role)("delta_u") @ experts.projection(e, role)("delta_v")
        for e in range(EXPERTS)
        for role in ROLES
    }


def block(chosen: int) -> Llama4TextMoe:
    """transformers' layer with random weights; its experts are to be replaced."""
    config = Llama4TextConfig(
        hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=EXPERTS, num_experts_per_tok=chosen
    )
    made = Llama4TextMoe(config).double().requires_grad_(False)
    for seed, parameter in enumerate([made.router.weight, *made.shared_expert.parameters()]):
        parameter.copy_(8 * drawn(*parameter.shape, seed=100 + seed))
    return made


def formula(layer: Llama4TextMoe, matrices: Matrices, x: Tensor, chosen: int) -> Tensor:
    expected = layer.shared_expert(x)
    for row, scores in enumerate(x @ layer.router.weight.T):
        for e in scores.argsort(descending=True)[:chosen].tolist():
            scaled = x[row] / (1 + (-scores[e]).exp())
            inner = silu(matrices[e, "gate"] @ scaled) * (matrices[e, "up"] @ scaled)
            expected[row] += matrices[e, "down"] @ inner
    return expected


def close(found: Tensor, expected: Tensor) -> None:
    """Scores go through float32 in transformers."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("chosen", [1, 2])
def test_transformers_layer_with_compressed_experts(chosen: int, static: bool) -> None:
    layer, experts = block(chosen), compressed(LAYER)
    experts.static_shapes, layer.experts = static, experts
    x = drawn(TOKENS, HIDDEN, seed=7) * 8
    expected = formula(layer, stands_for(experts), x, chosen)
    close(layer(x[None])[0], expected)
    assert float((expected - layer.shared_expert(x)).norm()) > 1


@pytest.mark.parametrize("static", [False, True])
def test_padding_has_no_say_in_a_selection(static: bool) -> None:
    """As where experts are called with a choice."""
    experts = compressed(SELECTING)
    experts.static_shapes, experts.scope = static, "batch"
    chosen = torch.arange(TOKENS) * 3 % EXPERTS
    scaled, padding = drawn(TOKENS, HIDDEN, seed=7) * 8, torch.arange(TOKENS) < 4
    scaled[padding] *= 100
    blocks = torch.zeros(EXPERTS, TOKENS, HIDDEN, dtype=torch.float64)
    blocks[chosen, torch.arange(TOKENS)] = scaled

    def both() -> tuple[Tensor, Tensor]:
        usual = experts(scaled, chosen[:, None], torch.ones(TOKENS, 1, dtype=torch.float64))
        return usual, experts(blocks.flatten(0, 1)).unflatten(0, (EXPERTS, -1))[chosen, torch.arange(TOKENS)]

    experts.padding_mask = padding
    usual, found = both()
    torch.testing.assert_close(found[~padding], usual[~padding])
    experts.padding_mask = None
    unmasked, found = both()
    torch.testing.assert_close(found, unmasked)
    assert not torch.allclose(unmasked[~padding], usual[~padding])


def test_calibration_sees_what_the_experts_see(tmp_path: Path) -> None:
    layer, matrices = block(1), stands_for(compressed(LAYER))
    shape = MoEShape(EXPERTS, 1, HIDDEN, INNER, (0,))
    sizes = {"inputs": (HIDDEN, torch.float32), "upstream": (HIDDEN, torch.float32), "choice": (1, torch.int32),
             "gates": (1, torch.float32)}  # fmt: skip
    arrays = {name: Rows(tmp_path / name, TOKENS, *size) for name, size in sizes.items()}
    for rows in arrays.values():
        rows.allocate()
    recorder = Recorder(arrays, {"input": HIDDEN, "middle": INNER})
    recorder.at = slice(0, TOKENS)
    layer.experts = DenseExperts(shape, lambda e, role: matrices[e, role].float(), gated(silu, ()), recorder)
    x = (drawn(TOKENS, HIDDEN, seed=7) * 8).requires_grad_()
    expected = formula(layer.double(), matrices, x, 1)
    (theirs,) = torch.autograd.grad(expected.square().sum(), x)
    narrow = x.detach().float().requires_grad_()
    found = layer.float()(narrow[None])[0]
    (ours,) = torch.autograd.grad(found.square().sum(), narrow)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    assert float((ours.double() - theirs).norm() / theirs.norm()) < 1e-4
    scores = x.detach() @ layer.router.weight.double().T
    scaled = x.detach() * scores.amax(dim=1, keepdim=True).sigmoid()
    every = torch.arange(TOKENS)
    torch.testing.assert_close(recorder.arrays["inputs"].read(every).double(), scaled, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(recorder.energy["input"], scaled.square().sum(dim=0), rtol=1e-5, atol=1e-5)
    assert recorder.arrays["choice"].read(every)[:, 0].tolist() == scores.argmax(dim=1).tolist()
    assert recorder.arrays["gates"].read(every).unique().tolist() == [1.0]
    torch.testing.assert_close(recorder.arrays["upstream"].read(every).double(), (2 * expected).detach(),
                               rtol=1e-4, atol=1e-4)  # fmt: skip


def test_calibration_refuses_several_experts_for_a_token() -> None:
    layer = block(2).float()
    shape = MoEShape(EXPERTS, 2, HIDDEN, INNER, (0,))
    layer.experts = DenseExperts(shape, lambda e, role: torch.zeros(shape.projection(role)), gated(silu, ()))
    with pytest.raises(ValueError, match="need one expert for each token"):
        layer(drawn(1, TOKENS, HIDDEN, seed=7).float())
