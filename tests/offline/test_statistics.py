"""Fisher, Grams and counts of the streamed sweeps, against a whole model in float64 with a weight per position."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import calibration_memory
import pytest
import torch
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

from d2moe_vllm.ops.reference import gated, relu2
from offline.io.progress import Steps
from offline.methods.layer import LayerJob
from offline.plan.make import make_plan
from offline.plan.plan import Resources
from offline.plan.recipe import Recipe
from offline.run.calibration import Calibration, open_sweep
from offline.source.dense import open_dense
from offline.source.layerwise import next_token_loss
from offline.work.activations import Rows
from offline.work.statistics import Gradients, Outputs, Routing, Weights, gradients, mean_gram, outputs
from offline.work.workdir import WorkDir

WINDOWS, LENGTH, EXPERTS, LAYERS = 3, 7, 4, 3


class PerPosition(nn.Module):
    """Experts that clone every weight for every routed row, so that autograd tells positions apart."""

    def __init__(self, gate_up: Tensor, down: Tensor) -> None:
        super().__init__()
        gate, up = gate_up.chunk(2, dim=1)
        self.weights = {"gate": gate, "up": up, "down": down}
        self.rows: list[tuple[int, Tensor, Tensor, Tensor, dict[str, Tensor], Tensor]] = []
        self.mix: list[Tensor] = []
        self.inputs: list[Tensor] = []

    def forward(self, hidden: Tensor, index: Tensor, gates: Tensor) -> Tensor:
        outputs = []
        for token in range(len(hidden)):
            total, mix, x = 0, 0, hidden[token]
            for slot in range(index.shape[1]):
                expert = int(index[token, slot])
                own = {role: w[expert].detach().clone().requires_grad_() for role, w in self.weights.items()}
                middle = nn.functional.silu(own["gate"] @ x) * (own["up"] @ x)
                middle.retain_grad()
                g = gates[token, slot]
                total, mix = total + g * (own["down"] @ middle), mix + (g * middle).detach()
                self.rows.append((expert, x.detach(), middle.detach(), g.detach(), own, middle))
            outputs.append(total)
            self.mix.append(mix)
            self.inputs.append(x.detach())
        return torch.stack(outputs)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=LAYERS, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=EXPERTS, num_experts_per_tok=2, max_position_embeddings=64,
        initializer_range=0.3,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("random-mixtral")
    MixtralForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(0, 50, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(1))


def whole_model(folder: Path, tokens: Tensor) -> list[PerPosition]:
    """One backward pass of the log-likelihood per window, the whole model in float64."""
    model = MixtralForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager").eval()
    observed = []
    for layer in model.model.layers:
        experts = PerPosition(layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj)
        layer.mlp.experts = experts
        observed.append(experts)
    for window in tokens:
        logits = model(window[None], use_cache=False).logits
        (-next_token_loss(logits, window[None])).backward()
    return observed


@pytest.fixture(scope="module")
def expected(model_folder: Path, tokens: Tensor) -> list[PerPosition]:
    return whole_model(model_folder, tokens)


@dataclass
class Seen:
    """What the pipeline's own sweeps hand to the compression of one layer."""

    tokens: Tensor
    energy: dict[str, Tensor]
    gradients: list[Gradients]
    gram: dict[str, list[Tensor]]
    moments: list[Outputs]


KEPT = slice(3, 20, 2)
"""Channels that stay, of 24."""


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "gate-weighted"])
def streamed(
    request: pytest.FixtureRequest, model_folder: Path, tokens: Tensor, tmp_path_factory: pytest.TempPathFactory
) -> tuple[bool, dict[int, Seen]]:
    seen: dict[int, Seen] = {}
    recipe = Recipe(
        ratio=0.3,
        calibration={"windows": WINDOWS, "seq_len": LENGTH},
        base={"groups": 2},
        delta={"gate_weighted": request.param},
    )
    # Two windows and five rows at once: neither divides what there is.
    plan = make_plan(open_dense(str(model_folder)), recipe)
    plan = replace(plan, resources=Resources(batch_tokens=2 * LENGTH, rows=5))
    work = WorkDir(tmp_path_factory.mktemp("work"), {"test": 1})

    class Looking(Calibration):
        backwards = True

        def work_on(self, job: LayerJob) -> None:
            weighted = {"gate_weighted": request.param}
            grads, grams, moments = [], {"input": [], "middle": []}, []
            for expert in range(EXPERTS):
                weights = job.weights(expert)
                every = {"fisher": True, "sites": ["input", "middle"], **weighted}
                grads.append(gradients(weights, job.routing, expert, job.gated, **every))
                for site, found in grams.items():
                    found.append(mean_gram(weights, job.routing, expert, site, job.gated, **weighted))
                stored = Weights({role: weights[role][KEPT] for role in ("gate", "up")})
                moments.append(outputs(weights, stored, job.routing, expert, job.gated, **weighted))
            seen[job.number] = Seen(job.tokens, dict(job.energy), grads, grams, moments)

    with Steps(1) as steps:
        sweep = open_sweep(plan, tokens, work, steps, torch.device("cpu"))
        sweep.run(Looking(plan, work, sweep))
    return request.param, seen


def close(actual: Tensor, expected: Tensor) -> bool:
    return float((actual.double() - expected).norm()) <= 2e-4 * float(expected.norm()) + 1e-30


def test_tokens_are_the_routed_ones(streamed: tuple, expected: list[PerPosition]) -> None:
    for layer, observed in enumerate(expected):
        counts = torch.zeros(EXPERTS, dtype=torch.int64)
        for expert, *_ in observed.rows:
            counts[expert] += 1
        assert torch.equal(streamed[1][layer].tokens, counts)
        assert counts.sum() == WINDOWS * LENGTH * 2


def test_grams_are_of_routed_rows_only(streamed: tuple, expected: list[PerPosition]) -> None:
    weighted, statistics = streamed
    for layer, observed in enumerate(expected):
        for expert in range(EXPERTS):
            for site, position in (("input", 1), ("middle", 2)):
                rows = [row[position] * (row[3] if weighted else 1) for row in observed.rows if row[0] == expert]
                gram = sum(torch.outer(row, row) for row in rows) / len(rows)
                assert close(statistics[layer].gram[site][expert], gram)
                assert torch.equal(
                    statistics[layer].gradients[expert].grams[site], statistics[layer].gram[site][expert]
                )


def test_output_moments_are_of_what_channels_become_and_experts_give(
    streamed: tuple, expected: list[PerPosition]
) -> None:
    weighted, statistics = streamed
    for layer, observed in enumerate(expected):
        for expert in range(EXPERTS):
            rows = [(row[2], row[4]["down"].detach() @ row[2], row[3]) for row in observed.rows if row[0] == expert]
            moment = sum(torch.outer(h[KEPT], h[KEPT]) * (g.square() if weighted else 1) for h, _, g in rows)
            cross = sum(torch.outer(y, h[KEPT]) * (g.square() if weighted else 1) for h, y, g in rows)
            found = statistics[layer].moments[expert]
            assert close(found.moment, moment / len(rows))
            assert close(found.cross, cross / len(rows))
            energy = sum(float(y.double().square().sum()) * (float(g) ** 2 if weighted else 1) for _, y, g in rows)
            assert found.energy == pytest.approx(energy / len(rows), rel=1e-4)
            down = torch.linspace(-1, 1, cross.numel(), dtype=torch.float64).view(cross.shape).float()
            left = [(y - down.double() @ h[KEPT]) * (g if weighted else 1) for h, y, g in rows]
            error = sum(float(one.double().square().sum()) for one in left) / len(rows)
            assert found.error(down) == pytest.approx(error, rel=1e-3)


def test_energy_is_of_what_the_base_reads(streamed: tuple, expected: list[PerPosition]) -> None:
    for layer, observed in enumerate(expected):
        energy = streamed[1][layer].energy
        assert close(energy["input"], torch.stack(observed.inputs).square().sum(dim=0))
        assert close(energy["middle"], torch.stack(observed.mix).square().sum(dim=0))


def test_fisher_is_squared_per_position(streamed: tuple, expected: list[PerPosition]) -> None:
    for layer, observed in enumerate(expected):
        for role in ("gate", "up", "down"):
            for expert in range(EXPERTS):
                squares = [row[4][role].grad.square() for row in observed.rows if row[0] == expert]
                assert close(streamed[1][layer].gradients[expert].fisher[role], sum(squares))


def test_sensitivity_is_what_an_error_at_the_output_costs(streamed: tuple, expected: list[PerPosition]) -> None:
    """Sum over rows of |d log-likelihood / d output|², over outputs; before the gate where Grams carry the gate."""
    weighted, statistics = streamed
    for layer, observed in enumerate(expected):
        for role in ("gate", "up", "down"):
            for expert in range(EXPERTS):
                total, outputs = 0.0, 0
                for row in (row for row in observed.rows if row[0] == expert):
                    # The weight's gradient is the outer product of the output's gradient and the input.
                    inputs = row[2] if role == "down" else row[1]
                    gradient = row[4][role].grad
                    square = gradient.square().sum() / inputs.square().sum() / len(gradient)
                    total += float(square / row[3].square() if weighted else square)
                    squares = gradient.square().sum(dim=1) / inputs.square().sum()
                    outputs = outputs + (squares / row[3].square() if weighted else squares)
                found = statistics[layer].gradients[expert]
                assert found.sensitivity[role] == pytest.approx(total, rel=1e-3)
                assert close(found.rows[role], outputs)


def test_batching_of_windows_does_not_matter(model_folder: Path, tokens: Tensor, expected: list[PerPosition]) -> None:
    """Squares are taken per position: the whole-model oracle ran windows one by one, the sweep all at once."""
    one_by_one = whole_model(model_folder, tokens.flip(0))
    for first, second in zip(expected, one_by_one, strict=True):
        for expert in range(EXPERTS):
            total = [sum(r[4]["up"].grad.square() for r in o.rows if r[0] == expert) for o in (first, second)]
            assert torch.allclose(*total)


def test_channels_are_scored_by_what_their_loss_costs(streamed: tuple, expected: list[PerPosition]) -> None:
    """(dL/dh * h)² of every position, summed: with the gate, whether or not Grams carry it."""
    for layer, observed in enumerate(expected):
        for expert in range(EXPERTS):
            scores = [(row[5].grad * row[2]).square() for row in observed.rows if row[0] == expert]
            found = streamed[1][layer].gradients[expert].channels
            assert found.dtype == torch.float64
            assert close(found, sum(scores))


@pytest.mark.parametrize("gate_weighted", [False, True])
def test_gradients_of_an_expert_without_a_gate(gate_weighted: bool, tmp_path: Path) -> None:
    """y = down(relu(up x)²), by hand in float64, position by position; a third of its rows at once."""
    generator, rows, hidden, inner = torch.Generator().manual_seed(3), 13, 6, 10
    weights = Weights({"up": torch.randn(inner, hidden, generator=generator),
                       "down": torch.randn(hidden, inner, generator=generator)})  # fmt: skip
    inputs, upstream = (torch.randn(rows, hidden, generator=generator) for _ in range(2))
    choice = torch.stack([torch.arange(rows) % 2, 2 + torch.arange(rows) % 2], dim=1).int()
    gates = torch.rand(rows, 2, generator=generator)
    stored = {}
    for name, values in (("inputs", inputs), ("upstream", upstream)):
        stored[name] = Rows(tmp_path / name, rows, hidden)
        stored[name].allocate()
        stored[name].write(slice(0, rows), values)
    routing = Routing(stored["inputs"], choice, gates, stored["upstream"], 4, torch.device("cpu"))
    gate_less = gated(relu2, gate=False)
    every = {"fisher": True, "sites": ("input", "middle"), "gate_weighted": gate_weighted}
    found = gradients(weights, routing, 0, gate_less, **every)
    up, down = (weights[role].double() for role in ("up", "down"))
    fisher = {"up": torch.zeros_like(up), "down": torch.zeros_like(down)}
    sums = {"up": torch.zeros(inner).double(), "down": torch.zeros(hidden).double()}
    grams = {"input": torch.zeros(hidden, hidden).double(), "middle": torch.zeros(inner, inner).double()}
    channels, own = torch.zeros(inner).double(), [t for t in range(rows) if t % 2 == 0]
    for t in own:
        x, back, gate = inputs[t].double(), upstream[t].double(), float(gates[t, 0])
        before = up @ x
        middle = before.clamp(min=0) ** 2
        at_middle = down.T @ back
        outputs_back = {"up": at_middle * 2 * before.clamp(min=0), "down": back}
        for role, read in (("up", x), ("down", middle)):
            fisher[role] += (gate * torch.outer(outputs_back[role], read)) ** 2
            sums[role] += outputs_back[role] ** 2 * (1 if gate_weighted else gate**2)
        channels += (gate * at_middle * middle) ** 2
        scale = gate if gate_weighted else 1.0
        grams["input"] += torch.outer(scale * x, scale * x) / len(own)
        grams["middle"] += torch.outer(scale * middle, scale * middle) / len(own)
    assert found.fisher is not None
    assert set(found.fisher) == set(found.rows) == {"up", "down"}
    for role, expected in fisher.items():
        assert close(found.fisher[role], expected)
        assert close(found.rows[role], sums[role])
    assert close(found.channels, channels)
    for site, expected in grams.items():
        assert close(found.grams[site], expected)
        assert close(mean_gram(weights, routing, 0, site, gate_less, gate_weighted=gate_weighted), expected)


def test_many_experts_there_and_back_take_what_a_plan_says() -> None:
    """What autograd keeps of each expert lies between matrices that come and go: with holes left there it was three
    times as much, and `plan`, which counts what is kept, was wrong."""
    script = Path(calibration_memory.__file__)
    path = os.pathsep.join([str(script.parents[2]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, script], check=True, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    m = calibration_memory
    kept = 4 * m.TOKENS * m.CHOSEN * (3 * m.MIDDLE + 2 * m.HIDDEN)
    assert int(done.stdout) < 1.5 * kept
