"""A dense model made a Mixtral, and its experts trained apart: what `make quality-real` measures is what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import train_experts
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from upcycled import distance_to_mean, distances, save, upcycle

EXPERTS = 4


class NoTokenizer:
    """Leaves nothing in the folder."""

    def save_pretrained(self, folder: Path) -> None:
        pass


@pytest.fixture(scope="module")
def llama() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, rope_parameters={"rope_theta": 1e5, "rope_type": "default"},
        tie_word_embeddings=True, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(64, (8, 24), generator=torch.Generator().manual_seed(1))


def logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens).logits


def test_copies_give_what_the_dense_model_gives_whatever_the_router_says(llama: Any, tokens: Tensor) -> None:
    expected = logits(llama, tokens)
    for seed in (0, 1):
        torch.testing.assert_close(logits(upcycle(llama, EXPERTS, seed=seed), tokens), expected)
    # Not because experts do not matter.
    assert (logits(upcycle(llama, EXPERTS, fresh=0.25), tokens) - expected).abs().max() > 0.1


def test_fresh_channels_are_the_share_asked_for_and_the_same_in_all_three_matrices(llama: Any) -> None:
    model = upcycle(llama, EXPERTS, fresh=0.25)
    drawn = []
    for layer, dense in zip(model.model.layers, llama.model.layers, strict=True):
        for expert in range(EXPERTS):
            gate, up = layer.mlp.experts.gate_up_proj[expert].chunk(2)
            down = layer.mlp.experts.down_proj[expert]
            pairs = ((gate, dense.mlp.gate_proj.weight), (up, dense.mlp.up_proj.weight),
                     (down.T, dense.mlp.down_proj.weight.T))  # fmt: skip
            new = [(one != other).any(1) for one, other in pairs]
            assert int(new[0].sum()) == 12
            assert torch.equal(new[0], new[1])
            assert torch.equal(new[0], new[2])
            drawn.append(tuple(new[0].tolist()))
    assert len(set(drawn)) == len(drawn)


def test_distance_is_nothing_for_copies_and_all_but_one_share_for_experts_with_nothing_in_common() -> None:
    weight = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    assert distance_to_mean(weight.expand(4, 5, 7)) == pytest.approx(0, abs=1e-7)
    apart = torch.zeros(4, 1, 4)
    apart[:, 0] = 3 * torch.eye(4)
    assert distance_to_mean(apart) == pytest.approx(0.75**0.5)
    # Half of two experts' energy is what they share.
    assert distance_to_mean(torch.tensor([[[1.0, 1.0]], [[1.0, -1.0]]])) == pytest.approx(0.5**0.5)


def test_what_is_written_is_read_as_a_mixtral(llama: Any, tmp_path: Path) -> None:
    save(upcycle(llama, EXPERTS, fresh=0.25), NoTokenizer(), tmp_path / "model")
    found = distances(tmp_path / "model")
    assert set(found) == {"gate", "up", "down"}
    assert all(0.3 < one.least <= one.mean <= one.most < 0.9 for one in found.values())


def test_experts_run_apart_as_transformers_runs_them(llama: Any, tokens: Tensor) -> None:
    """Outputs and gradients, but for bfloat16."""
    experts = upcycle(llama, EXPERTS, fresh=0.5).model.layers[0].mlp.experts
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(40, 32, generator=generator)
    gates, index = torch.rand(40, EXPERTS, generator=generator).topk(2)
    found = []
    for run in (experts, lambda *given: train_experts.run_apart(experts, *given)):
        experts.zero_grad()
        given = run(rows, index, gates).float()
        given.square().sum().backward()
        found.append([given.detach(), experts.gate_up_proj.grad.clone(), experts.down_proj.grad.clone()])
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() < 0.02 * one.norm()


def test_only_experts_and_routers_are_trained_and_a_killed_training_goes_on(
    llama: Any, tokens: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, said = upcycle(llama, EXPERTS), []
    before = {name: value.clone() for name, value in model.state_dict().items()}
    whole = train_experts.train(model, tokens, 4, tmp_path / "whole.pt", said.append)
    assert whole.steps == len(whole.losses) == len(said) == 4
    assert whole.tokens == whole.steps * train_experts.BATCH * 23
    after = model.state_dict()
    changed = {name for name, value in before.items() if not torch.equal(after[name].to(value.dtype), value)}
    frozen = {name for name in changed if torch.equal(after[name].float(), before[name].bfloat16().float())}
    assert changed - frozen == {name for name in before if ".mlp." in name}

    def killed(text: str) -> None:
        if text.startswith("step 3"):
            raise KeyboardInterrupt

    monkeypatch.setattr(train_experts, "SAVED_EVERY", 0.0)
    state = tmp_path / "state.pt"
    with pytest.raises(KeyboardInterrupt):
        train_experts.train(upcycle(llama, EXPERTS), tokens, 4, state, killed)
    again = upcycle(llama, EXPERTS)
    resumed = train_experts.train(again, tokens, 4, state, said.append)
    assert said[-2].startswith("step 3 of 4"), "what was done is not done again"
    # The same steps give the same model.
    assert resumed.losses == whole.losses
    assert all(torch.equal(value, after[name]) for name, value in again.state_dict().items())
    # What is there in full is not trained again.
    assert train_experts.train(upcycle(llama, EXPERTS), tokens, 4, state, said.append) == resumed


def test_the_rate_rises_and_falls() -> None:
    rates = [train_experts.rate_at(share) for share in (0.0, 0.025, 0.05, 0.5, 1.0)]
    assert rates == pytest.approx([0, 0.5, 1, 1 - 0.9 * 0.45 / 0.95, 0.1])
