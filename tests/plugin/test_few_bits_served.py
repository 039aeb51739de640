"""Packed matrices and experts of unequal widths in the engine: stock vLLM on the dense reconstruction says the same."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from engine import TWO_RANKS, Results, assert_same, generate
from few_bits import SETS, write_few
from synthetic import write_dense

pytest.importorskip("vllm")

RANKS = {
    "tensor parallel": {"tensor_parallel_size": 2},
    "expert parallel": {"tensor_parallel_size": 2, "enable_expert_parallel": True},
}


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], tuple[Path, Results]]:
    """Of each of SETS its checkpoint `ours`' folder, and what stock vLLM says of the model that it stands for."""
    root = tmp_path_factory.mktemp("served")
    known: dict[int, tuple[Path, Results]] = {}

    def ask(number: int) -> tuple[Path, Results]:
        if number not in known:
            folder = root / str(number)
            meaning = write_few(folder / "ours", SETS[number])
            write_dense(folder / "ours", folder / "dense", torch.float32, meaning)
            plain = generate(
                folder / "stock", folder / "dense", {"VLLM_PLUGINS": ""}, dtype="float32", enforce_eager=True
            )
            known[number] = folder, plain
        return known[number]

    return ask


@pytest.mark.parametrize("number", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_served_as_stock_vllm_serves_the_dense_model(stock: Callable[[int], tuple[Path, Results]], number: int) -> None:
    """Traced as for compiling, so that a graph break ends it. By the C++ backend, all of it."""
    folder, expected = stock(number)
    found = generate(folder / "served", folder / "ours", {"VLLM_CPU_CI_ENV": "1"}, dtype="float32")
    assert_same(found, expected)
    assert "the slow backend" not in (folder / "served" / "log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "ranks"), list(itertools.product(range(len(SETS)), RANKS)))
def test_on_two_ranks(stock: Callable[[int], tuple[Path, Results]], number: int, ranks: str) -> None:
    folder, expected = stock(number)
    found = generate(
        folder / ranks.partition(" ")[0],
        folder / "ours",
        TWO_RANKS,
        dtype="float32",
        enforce_eager=True,
        **RANKS[ranks],
    )
    assert_same(found, expected)
