"""The served checkpoint over OpenAI's API, held against the same checkpoint in plain transformers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from openai import OpenAI
from transformers import AutoModelForCausalLM, AutoTokenizer

from offline.compare.server import Server

PROMPTS = [
    "The `for` statement is used to",
    "A class definition is an executable statement.",
    "import",
    "The following sections describe the standard types that are built into the interpreter.",
]
MAX_TOKENS = 48


@pytest.fixture(scope="module")
def transformers_model(compressed: Path) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(compressed, trust_remote_code=True, dtype=torch.float32).eval()
    assert type(model).__name__ == "D2MixtralForCausalLM"
    return model, AutoTokenizer.from_pretrained(compressed)


def complete(client: OpenAI, prompt: str, **options: Any) -> Any:
    settings = {"model": "tiny", "prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0, "logprobs": 1}
    return client.completions.create(**(settings | options)).choices[0]


@torch.no_grad()
def test_greedy_completions_equal_plain_transformers(client: OpenAI, transformers_model: tuple[Any, Any]) -> None:
    model, tokenizer = transformers_model
    for prompt in PROMPTS:
        served = complete(client, prompt)
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        generated = model.generate(
            ids, max_new_tokens=MAX_TOKENS, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        tokens = generated.sequences[0, ids.shape[1] :]
        logprobs = torch.stack(generated.logits)[:, 0].log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        assert served.text == tokenizer.decode(tokens, skip_special_tokens=True)
        torch.testing.assert_close(torch.tensor(served.logprobs.token_logprobs), logprobs, rtol=0, atol=1e-4)


def test_a_crowd_gets_what_each_would_get_alone(client: OpenAI) -> None:
    alone = {prompt: complete(client, prompt).text for prompt in PROMPTS}
    with ThreadPoolExecutor(16) as pool:
        crowd = list(pool.map(lambda prompt: (prompt, complete(client, prompt).text), PROMPTS * 4))
    assert all(text == alone[prompt] for prompt, text in crowd)


def test_streaming_and_chat(client: OpenAI) -> None:
    whole = complete(client, PROMPTS[0]).text
    stream = client.completions.create(
        model="tiny", prompt=PROMPTS[0], max_tokens=MAX_TOKENS, temperature=0, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in stream) == whole
    messages = [{"role": "user", "content": "What is a list?"}]
    chat = client.chat.completions.create(model="tiny", messages=messages, max_tokens=8, temperature=0)
    assert chat.choices[0].message.content
    assert chat.usage.completion_tokens == 8
    # The template of the source model came along.
    assert chat.usage.prompt_tokens > len(["What", "is", "a", "list?"])


def test_seeded_sampling_repeats(client: OpenAI) -> None:
    first, second = (complete(client, PROMPTS[0], temperature=1.0, seed=5).text for _ in range(2))
    assert first == second


def test_model_list_and_errors(client: OpenAI, server: Server) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="x")
    with pytest.raises(openai.BadRequestError):
        complete(client, "x " * 2000)
    assert "d2moe" in server.log.read_text()
