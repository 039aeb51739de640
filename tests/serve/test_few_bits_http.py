"""Few bits and unequal widths over HTTP: `vllm serve` answers as stock vLLM does with the dense reconstruction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from few_bits import SETS, write_few
from openai import OpenAI
from synthetic import write_dense

from offline.compare.server import Server

PROMPTS = ("The `for` statement is used to", "import", "A class definition is an executable statement.")
MAX_TOKENS = 24
WAYS = {
    "one": (),
    "reference": ("--additional-config", '{"d2moe": {"backend": "reference"}}'),
    "tensor parallel": ("--tensor-parallel-size", "2"),
    "expert parallel": ("--tensor-parallel-size", "2", "--enable-expert-parallel"),
}
"""Arguments: our kernels for CPUs serve all but one of them."""


class Answer(NamedTuple):
    """Greedy tokens, and the log-probabilities of the prompt's and of these."""

    tokens: list[str]
    logprobs: list[float]


def answers(model: Path, folder: Path, arguments: Sequence[str], plugins: str) -> list[Answer]:
    """Of a server that is started for it."""
    env = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_PLUGINS": plugins}
    if "--tensor-parallel-size" in arguments:
        env["VLLM_CPU_OMP_THREADS_BIND"] = "0|1"
    every = ["--dtype", "float32", "--max-model-len", "256", "--served-model-name", "m", "--enforce-eager", *arguments]
    with Server(model, every, log=folder / "log", env=env) as server:
        client = OpenAI(base_url=server.base_url, api_key="none", max_retries=0)
        return [_ask(client, prompt) for prompt in PROMPTS]


def _ask(client: OpenAI, prompt: str) -> Answer:
    settings: dict[str, Any] = {"model": "m", "temperature": 0, "max_tokens": MAX_TOKENS, "logprobs": 0, "echo": True}
    found = client.completions.create(prompt=prompt, **settings).choices[0].logprobs
    return Answer(found.tokens, [one for one in found.token_logprobs if one is not None])


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], tuple[Path, list[Answer]]]:
    """Of each of SETS its checkpoint, and what stock vLLM says of what it stands for."""
    known: dict[int, tuple[Path, list[Answer]]] = {}

    def ask(number: int) -> tuple[Path, list[Answer]]:
        if number not in known:
            folder = tmp_path_factory.mktemp(f"set-{number}")
            meaning = write_few(folder / "ours", SETS[number])
            write_dense(folder / "ours", folder / "dense", torch.float32, meaning)
            known[number] = folder / "ours", answers(folder / "dense", folder, (), "")
        return known[number]

    return ask


@pytest.mark.slow
@pytest.mark.parametrize(("number", "way"), [*((0, way) for way in WAYS), (1, "one")])
def test_vllm_serve_answers_as_with_the_dense_model(
    stock: Callable[[int], tuple[Path, list[Answer]]], tmp_path: Path, number: int, way: str
) -> None:
    checkpoint, expected = stock(number)
    found = answers(checkpoint, tmp_path, WAYS[way], "d2moe")
    assert [one.tokens for one in found] == [one.tokens for one in expected]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(other.logprobs), rtol=0, atol=1e-4)
    assert "the slow backend" not in (tmp_path / "log").read_text()
