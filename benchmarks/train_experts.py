"""Trains a Mixtral's experts and routers apart, on a processor, in so many steps; an interrupted training goes on.

All else stays as it is. What is trained is kept in float32, all is multiplied in bfloat16 where the processor has it
(one with AVX2 alone takes seven times as long for it). AdamW moves a parameter as soon as its gradient is there, which
is then let go: 12 bytes a number, and what the backward pass needs.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from offline.algebra.products import has_bfloat16

BATCH = 8
"""Windows of a step."""
RATE, ROUTER_RATE = 5e-4, 1e-3
"""The highest, of experts and of routers, which start from noise; both rise over WARM_UP, then fall to a tenth."""
WARM_UP = 0.05
"""Share of the steps."""
SAVED_EVERY = 600.0
"""Seconds between two states that a killed training goes on from."""
THREADS = 2
"""A number of its own, as sums depend on it: the same steps on the same kind of processor give the same model."""
APART = "apart"
"""What our way of running experts is called where transformers looks for it."""
MULTIPLIED = torch.bfloat16 if has_bfloat16() else torch.float32
"""In what all is multiplied."""


@dataclass
class Trained:
    """seconds: of training, by the clock; tokens: that were predicted; losses: step by step, in nats a token, the
    router's own loss included."""

    seconds: float
    steps: int
    tokens: int
    losses: list[float]


def choose_windows(tokenizer: Any, texts: Sequence[str], length: int, seed: int = 0) -> Tensor:
    """int64 [n, length]: every non-overlapping window of the texts' tokens, in an order that is drawn."""
    whole = []
    for text in texts:
        tokens = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        whole.append(tokens[: len(tokens) // length * length].view(-1, length))
    windows = torch.cat(whole)
    return windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))]


def run_apart(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """transformers' MixtralExperts in MULTIPLIED, expert by expert, for training on a processor: rows are sorted by
    their experts once, a stack of matrices is converted and taken apart once, so that one gradient comes back for each.

    hidden_states [tokens, hidden]; top_k_index, top_k_weights [tokens, k]. Returns MULTIPLIED [tokens, hidden]."""
    chosen = top_k_index.flatten()
    order = chosen.argsort()
    rows = hidden_states.to(MULTIPLIED)[order // top_k_index.shape[1]]
    found = []
    for mine, gate_up, down in zip(
        rows.split(chosen.bincount(minlength=len(experts.down_proj)).tolist()),
        experts.gate_up_proj.to(MULTIPLIED).unbind(0),
        experts.down_proj.to(MULTIPLIED).unbind(0),
        strict=True,
    ):
        gate, up = F.linear(mine, gate_up).chunk(2, dim=-1)
        found.append(F.linear(experts.act_fn(gate) * up, down))
    given = torch.cat(found)[order.argsort()].view(*top_k_index.shape, -1)
    return (given * top_k_weights[..., None].to(given.dtype)).sum(1)


def _prepare(model: Any) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Experts and routers, the only ones that are trained from now on; all else becomes MULTIPLIED, its values kept."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(APART, run_apart)
    model.set_experts_implementation(APART)
    model.requires_grad_(False)
    model.to(MULTIPLIED)
    experts = [one for layer in model.model.layers for one in layer.mlp.experts.parameters()]
    routers = [layer.mlp.gate.weight for layer in model.model.layers]
    for parameter in (*experts, *routers):
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    return experts, routers


def rate_at(share: float) -> float:
    """Of the highest rate, when this share of the steps is over."""
    return share / WARM_UP if share < WARM_UP else 1 - 0.9 * (share - WARM_UP) / (1 - WARM_UP)


def train(model: Any, windows: Tensor, steps: int, state: Path, say: Any = print) -> Trained:
    """Trains `model` in place, so many steps in all; windows: int64 [n, length], BATCH a step, taken in their order,
    over and over.

    state: the file that a training that was killed goes on from; it is left, for a longer one to go on from.
    """
    experts, routers = _prepare(model)
    parameters = [*experts, *routers]
    rates = [RATE] * len(experts) + [ROUTER_RATE] * len(routers)
    optimizers = [torch.optim.AdamW([one], betas=(0.9, 0.95), weight_decay=0.0, fused=True) for one in parameters]
    done = Trained(0.0, 0, 0, [])
    if state.exists():
        found = torch.load(state, weights_only=True)
        with torch.no_grad():
            for parameter, value in zip(parameters, found["parameters"], strict=True):
                parameter.copy_(value)
        for optimizer, value in zip(optimizers, found["optimizers"], strict=True):
            optimizer.load_state_dict(value)
        done = Trained(**found["done"])
    hooks = [_move_at_once(*pair) for pair in zip(parameters, optimizers, strict=True)]
    model.train()
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    saved = time.monotonic()
    while done.steps < steps:
        started = time.monotonic()
        at = torch.arange(done.steps * BATCH, (done.steps + 1) * BATCH) % len(windows)
        for optimizer, most in zip(optimizers, rates, strict=True):
            optimizer.param_groups[0]["lr"] = most * max(rate_at(done.steps / steps), 0.01)
        with torch.autocast("cpu", torch.bfloat16, enabled=has_bfloat16()):
            loss = model(windows[at], labels=windows[at], output_router_logits=True, use_cache=False).loss
        loss.backward()
        done.seconds += time.monotonic() - started
        done.steps, done.tokens = done.steps + 1, done.tokens + windows[at][:, 1:].numel()
        done.losses.append(loss.item())
        say(f"step {done.steps} of {steps}, {done.seconds:.0f} s: loss {done.losses[-1]:.4f}")
        if time.monotonic() - saved > SAVED_EVERY or done.steps == steps:
            _save(state, parameters, optimizers, done)
            saved = time.monotonic()
    for hook in hooks:
        hook.remove()
    torch.set_num_threads(threads)
    model.eval()
    return done


def _move_at_once(parameter: nn.Parameter, optimizer: torch.optim.Optimizer) -> Any:
    """The handle of a hook that moves a parameter within the backward pass, and drops its gradient."""

    def move(_: Tensor) -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return parameter.register_post_accumulate_grad_hook(move)


def _save(
    state: Path, parameters: Sequence[nn.Parameter], optimizers: Sequence[torch.optim.Optimizer], done: Trained
) -> None:
    state.parent.mkdir(parents=True, exist_ok=True)
    partly = state.with_suffix(".part")
    content = {
        "parameters": [one.detach() for one in parameters],
        "optimizers": [one.state_dict() for one in optimizers],
        "done": asdict(done),
    }
    torch.save(content, partly)
    partly.rename(state)
