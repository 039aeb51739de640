"""The baseline `channels` of `d2moe compare`: scores against autograd on the whole model, and what is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from compression import TINY
from families import write_family
from rich.console import Console
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from d2moe_vllm.format.kinds import ROLES
from offline.compare.channels import (
    channel_bytes,
    channels_to_prune,
    lowest,
    write_pruned,
)
from offline.compare.rewriting import RECORD_FILE
from offline.errors import UnreachableError
from offline.methods.settings import Calibration
from offline.run.scores import Scores, score_channels, sweep_plan
from offline.source.dense import DenseModel, open_dense
from offline.source.tokens import Windows

TOKENS = torch.randint(0, 4096, (6, 24), generator=torch.Generator().manual_seed(1))


def scores_of(model: DenseModel, folder: Path) -> Scores:
    plan = sweep_plan(model, Calibration(windows=len(TOKENS), seq_len=TOKENS.shape[1]), None, backwards=True)
    console = Console(file=(folder / "log").open("w"))
    found = score_channels(plan, Windows(TOKENS), folder / "work", torch.device("cpu"), console)
    assert not (folder / "work").exists()
    return found


class Watched(nn.Module):
    """transformers' experts, channel by channel: keeps every expert's activations, so that autograd tells their
    gradients. Mixtral's and DeepSeek's hold gate and up stacked."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts
        self.middle: dict[int, Tensor] = {}

    def forward(self, hidden: Tensor, chosen: Tensor, gates: Tensor) -> Tensor:
        total = torch.zeros_like(hidden)
        for expert in chosen.unique().tolist():
            token, slot = (chosen == expert).nonzero(as_tuple=True)
            first, second = (hidden[token] @ self.experts.gate_up_proj[expert].T).chunk(2, dim=-1)
            self.middle[expert] = nn.functional.silu(first) * second
            self.middle[expert].retain_grad()
            output = gates[token, slot, None] * (self.middle[expert] @ self.experts.down_proj[expert].T)
            total = total.index_add(0, token, output)
        return total


def by_autograd(folder: Path, layers: tuple[int, ...]) -> Scores:
    """sum (dL/dh * h)² in float64, of the whole model at once."""
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    watched = {}
    for layer in layers:
        watched[layer] = whole.model.layers[layer].mlp.experts = Watched(whole.model.layers[layer].mlp.experts)
    logits = whole(TOKENS).logits
    nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten(), reduction="sum").backward()
    found = {}
    for layer, module in watched.items():
        size = module.experts.down_proj.shape
        found[layer] = torch.zeros(size[0], size[2], dtype=torch.float64)
        for expert, middle in module.middle.items():
            found[layer][expert] = (middle.grad * middle.detach()).square().sum(dim=0)
    return found


@pytest.mark.parametrize("family", ["trained", "qwen3_moe", "deepseek_v2"])
def test_scores_are_those_of_autograd_on_the_whole_model(family: str, tmp_path: Path) -> None:
    """Of every channel of every layer, to float32's precision; also where some layers are dense and experts shared."""
    source = TINY if family == "trained" else write_family(tmp_path / "source", family, dtype=torch.float32)
    model = open_dense(str(source))
    found, expected = scores_of(model, tmp_path), by_autograd(source, model.shape.layers)
    assert list(found) == list(model.shape.layers)
    for layer, scores in found.items():
        assert scores.dtype == torch.float64
        torch.testing.assert_close(scores, expected[layer], rtol=2e-3, atol=1e-6 * float(expected[layer].max()))


def test_the_lowest_scores_of_all_layers_are_zero_and_nothing_else(tmp_path: Path) -> None:
    """Read back from the file: a channel's rows and column are zero where its score is among the lowest of all layers
    and experts together, and as they were elsewhere. As many are zero as the ratio needs; experts keep unequal
    numbers, which the record tells."""
    model = open_dense(str(TINY))
    scores = scores_of(model, tmp_path)
    count = channels_to_prune(model, 0.4)
    write_pruned(model, lowest(scores, count), tmp_path / "pruned")
    pruned, record = open_dense(str(tmp_path / "pruned")), json.loads((tmp_path / "pruned" / RECORD_FILE).read_text())
    assert pruned.reader.nbytes == model.reader.nbytes
    kept, gone = [], []
    for layer in model.shape.layers:
        for expert in range(model.shape.num_experts):
            before = {role: model.weight(layer, expert, role) for role in ROLES}
            after = {role: pruned.weight(layer, expert, role) for role in ROLES}
            left = after["down"].abs().sum(dim=0) > 0
            for role in ("gate", "up"):
                assert torch.equal(after[role][left], before[role][left])
                assert int(after[role][~left].count_nonzero()) == 0
            assert torch.equal(after["down"][:, left], before["down"][:, left])
            assert record["layers"][str(layer)][expert] == int(left.sum())
            kept.append(scores[layer][expert][left])
            gone.append(scores[layer][expert][~left])
    assert float(torch.cat(gone).max()) <= float(torch.cat(kept).min())
    assert len(torch.cat(gone)) == count == record["pruned_channels"]
    assert len({len(one) for one in kept}) > 8
    same = [
        name for name in model.other_tensors if not torch.equal(*(one.other_tensor(name) for one in (model, pruned)))
    ]
    assert same == []


def test_the_count_meets_the_ratio_to_one_channel(tmp_path: Path) -> None:
    """The bytes that are counted are within the ratio; with one channel more they are not. All but the ratio that no
    experts at all would give is refused with that ratio."""
    model = open_dense(str(TINY))
    each = channel_bytes(model)
    assert each == 3 * 128 * 2
    for ratio in (0.05, 0.2, 0.4, 0.6):
        count = channels_to_prune(model, ratio)
        assert model.reader.nbytes - count * each <= (1 - ratio) * model.reader.nbytes
        assert model.reader.nbytes - (count - 1) * each > (1 - ratio) * model.reader.nbytes
    with pytest.raises(UnreachableError) as refused:
        channels_to_prune(model, 0.9)
    every = 4 * 8 * 256
    assert channels_to_prune(model, refused.value.most - 1e-9) == every


def test_transformers_loads_it_and_computes_without_these_channels(tmp_path: Path) -> None:
    """Logits are those of the source whose activations are set to zero there, in stock transformers."""
    model = open_dense(str(TINY))
    pruned = lowest(scores_of(model, tmp_path), channels_to_prune(model, 0.4))
    write_pruned(model, pruned, tmp_path / "pruned")
    stock = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (TINY, tmp_path / "pruned")]
    whole, loaded = (one.eval().requires_grad_(False) for one in stock)
    unchanged = whole(TOKENS).logits
    for layer, mask in pruned.items():
        experts = whole.model.layers[layer].mlp.experts
        experts.down_proj.mul_(~mask[:, None, :])
    expected = whole(TOKENS).logits
    found = loaded(TOKENS).logits
    assert float((found - expected).norm() / expected.norm()) < 1e-5
    assert float((found - unchanged).norm() / unchanged.norm()) > 1e-2


@pytest.mark.parametrize(("family", "stacked"), [("granitemoe", True), ("deepseek_v3", False)])
def test_other_families_and_forms_on_disk(family: str, stacked: bool, tmp_path: Path) -> None:
    """Scores, pruning and writing of stacks and of grouped routers: the result loads, with the same config.json."""
    source = write_family(tmp_path / "source", family, stacked=stacked)
    model = open_dense(str(source))
    write_pruned(model, lowest(scores_of(model, tmp_path), 7), tmp_path / "pruned")
    pruned = open_dense(str(tmp_path / "pruned"))
    assert pruned.config == model.config
    experts = [(layer, expert) for layer in model.shape.layers for expert in range(model.shape.num_experts)]
    zero = [int((pruned.weight(*one, "down").abs().sum(dim=0) == 0).sum()) for one in experts]
    assert sum(zero) == 7
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", dtype=torch.float32).eval()
    assert bool(torch.isfinite(stock(TOKENS).logits.detach()).all())
