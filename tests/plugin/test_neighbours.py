"""What a request can learn of another one that shares its forward passes: nothing, but in scope `batch`."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from engine import generate
from synthetic import Synthetic, write_checkpoint
from torch import Tensor

pytest.importorskip("vllm")

SECRETS, LENGTH, TOKENS = 8, 32, 8
ROUNDING = 1e-5
"""Nats. Sums of float32 in another order differ by less here; scope `batch` lets through a hundred times more."""


def prompts() -> list[dict[str, list[int]]]:
    """One request of the observer's, and SECRETS of somebody else's, all of one length."""
    generator = random.Random(0)
    return [{"prompt_token_ids": [generator.randrange(10, 4000) for _ in range(LENGTH)]} for _ in range(1 + SECRETS)]


def observed(folder: Path, scope: str) -> tuple[Tensor, Tensor, list[list[int]]]:
    """The observer's log-probabilities beside each secret, float64 [SECRETS, n], in two rounds; its tokens."""
    write_checkpoint(folder / "checkpoint", Synthetic(dtype=torch.float32))
    mine, *others = prompts()
    results = generate(
        folder / scope, folder / "checkpoint", dtype="float32", enforce_eager=True,
        job={"batches": [[mine, other] for other in others * 2], "max_tokens": TOKENS},
        additional_config={"d2moe": {"scope": scope}},
    )[::2]  # fmt: skip
    figures = torch.tensor([r["prompt_logprobs"] + r["logprobs"] for r in results], dtype=torch.float64)
    return figures[:SECRETS], figures[SECRETS:], [r["ids"] for r in results]


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["off", "token", "batch"])
def test_what_a_neighbour_reveals(scope: str, tmp_path: Path) -> None:
    """An observer who knows eight possible requests of a neighbour looks at his own log-probabilities.

    With `off` and `token` they say nothing: no more than rounding differs. With `batch` he learns in a first round how
    each looks, and names the neighbour of each answer of the second.
    """
    first, second, tokens = observed(tmp_path, scope)
    spread = float((first - first[0]).abs().max())
    named = torch.cdist(second, first).argmin(dim=1)
    right = int((named == torch.arange(SECRETS)).sum())
    different = len({tuple(ids) for ids in tokens})
    print(f"{scope}: differences of {spread:.2e} nats, {right} of {SECRETS} named, {different} different answers")
    if scope == "batch":
        assert spread > 100 * ROUNDING
        assert right == SECRETS
    else:
        assert spread == 0 if scope == "token" else spread < ROUNDING
        assert different == 1
