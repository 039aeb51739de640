"""What goes wrong around a server: bad requests, wrong keys, a killed worker, a checkpoint swapped under its feet."""

from __future__ import annotations

import json
import os
import random
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

pytest.importorskip("vllm")

from compression import TINY
from killing import GOOD, kill_its_worker, openai_client, start
from openai import OpenAI
from safetensors.torch import load_file, save_file

from offline.compare.server import ServerError

KILL_SECONDS = float(os.environ.get("D2MOE_KILL_SECONDS", "600"))
ENDS_WITHIN = 30.0
"""Seconds from a worker's death until no stream and no process of its server is left."""

MALFORMED = [
    # path, body, status, what the error says
    ("completions", b'{"model": "tiny", ', 400, "JSON decode error"),
    ("completions", [1, 2], 400, "valid dictionary"),
    ("completions", {**GOOD, "prompt": {"a": 1}}, 400, "body.prompt"),
    ("completions", {**GOOD, "prompt": ""}, 400, "prompt"),
    ("completions", {**GOOD, "prompt": [99999999]}, 400, "out of vocabulary"),
    ("completions", {**GOOD, "prompt": "x " * 2000}, 400, "maximum context length is 512 tokens"),
    ("completions", {**GOOD, "model": "other"}, 404, "`other` does not exist"),
    ("completions", {**GOOD, "max_tokens": -1}, 400, "max_tokens must be at least 1"),
    ("completions", {**GOOD, "max_tokens": 100000}, 400, "max_model_len=512"),
    ("completions", {**GOOD, "max_tokens": "many"}, 400, "body.max_tokens"),
    ("completions", {**GOOD, "temperature": -1}, 400, "temperature must be non-negative"),
    ("completions", {**GOOD, "top_p": 7}, 400, "top_p must be in (0, 1]"),
    ("completions", {**GOOD, "n": 0}, 400, "n must be at least 1"),
    ("completions", {**GOOD, "logprobs": 1000}, 400, "max allowed: 20"),
    ("completions", {**GOOD, "structured_outputs": {"json": "no"}}, 400, "grammar"),
    ("chat/completions", {"model": "tiny", "messages": "hi"}, 400, "body.messages"),
    ("nowhere", GOOD, 404, "Not Found"),
]


def post(client: OpenAI, path: str, body: Any, headers: dict[str, str] | None = None) -> httpx.Response:
    """What the OpenAI client would refuse to send; with its address and key."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    with_type = {"Content-Type": "application/json", **(client.auth_headers if headers is None else headers)}
    # Plain HTTP: reading the certificates of the system takes longer than all these requests.
    return httpx.post(f"{client.base_url}{path}", content=content, headers=with_type, timeout=120, verify=False)


@pytest.mark.parametrize(("path", "body", "status", "said"), MALFORMED, ids=[said for *_, said in MALFORMED])
def test_malformed_requests_are_refused_with_the_reason(
    client: OpenAI, path: str, body: Any, status: int, said: str
) -> None:
    answer = post(client, path, body)
    assert answer.status_code == status, answer.text
    assert said in answer.text
    assert "Traceback" not in answer.text


def test_the_server_survives_them_all_at_once(client: OpenAI) -> None:
    """Malformed and good requests side by side, several rounds: the good ones get what they always get."""
    before = post(client, "completions", GOOD).json()["choices"][0]["text"]
    answers: list[str] = []

    def good() -> None:
        answers.extend(post(client, "completions", GOOD).json()["choices"][0]["text"] for _ in range(4))

    def bad() -> None:
        for path, body, *_ in MALFORMED:
            post(client, path, body)

    threads = [threading.Thread(target=target) for target in (good, bad, good, bad)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [before] * 8


@pytest.mark.slow
@pytest.mark.parametrize("busy", [True, False], ids=["under load", "idle"])
def test_a_killed_worker_ends_the_server_as_it_ends_stock_vllm(pruned: Path, tmp_path: Path, busy: bool) -> None:
    """The same outcome for clients and the same exit code as vLLM without this plugin; a restart serves again."""
    with start(TINY, tmp_path, "stock", env={"VLLM_PLUGINS": ""}) as server:
        stock = kill_its_worker(server, busy)
    with start(pruned, tmp_path, "ours") as server:
        before = openai_client(server).completions.create(**GOOD).choices[0].text
        ours = kill_its_worker(server, busy)
    print(stock, ours)
    assert (ours.streams, ours.code) == (stock.streams, stock.code)
    assert "complete" not in ours.streams
    assert max(ours.seconds, stock.seconds) < ENDS_WITHIN
    with start(pruned, tmp_path, "again") as server:
        assert openai_client(server).completions.create(**GOOD).choices[0].text == before


@pytest.mark.slow
@pytest.mark.timeout(KILL_SECONDS + 900)
def test_workers_killed_for_ten_minutes(
    pruned: Path, tmp_path: Path, record_testsuite_property: Callable[[str, object], None]
) -> None:
    """Each server's at a random moment of its first seconds under load, or idle: it ends in bounded time and leaves no
    process, every client is told, and the next one says what the first said."""
    chance, deaths, answers = random.Random(7), [], set()
    end = time.monotonic() + KILL_SECONDS
    while not deaths or time.monotonic() < end:
        with start(pruned, tmp_path, f"server-{len(deaths)}") as server:
            answers.add(openai_client(server).completions.create(**GOOD).choices[0].text)
            deaths.append(kill_its_worker(server, busy=chance.random() < 0.75, wait=chance.uniform(0, 8)))
            print(deaths[-1], flush=True)
    slowest = max(death.seconds for death in deaths)
    for name, figure in (("kills", len(deaths)), ("slowest end in seconds", slowest)):
        record_testsuite_property(name, figure)
    assert len(answers) == 1
    assert not [death for death in deaths if "complete" in death.streams]
    assert {death.code for death in deaths} == {0}, "vLLM 0.32's front-end ends in good order: see docs/reliability.md"
    assert slowest < ENDS_WITHIN


def cut_short(model: Path) -> str:
    (file,) = model.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-4096])
    return file.name


def without_a_tensor(model: Path) -> str:
    (file,) = model.glob("*.safetensors")
    tensors = load_file(file)
    name = next(name for name in sorted(tensors) if name.endswith("delta_u"))
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    return name


@pytest.mark.slow
def test_a_checkpoint_swapped_for_a_damaged_one_is_refused_at_the_restart(pruned: Path, tmp_path: Path) -> None:
    """The running server goes on with what it has in memory; the next start names the file or the tensor, in one
    line. Its API key, on the way: 401 without it and with a wrong one, whatever else is wrong with the request."""
    model = tmp_path / "model"
    shutil.copytree(pruned, model)
    with start(model, tmp_path, "first", "--api-key", "right") as server:
        client = openai_client(server, "right")
        before = client.completions.create(**GOOD).choices[0].text
        for headers in ({}, {"Authorization": "Bearer wrong"}):
            for path, body in (("completions", GOOD), ("completions", b"{"), ("nowhere", GOOD)):
                assert post(client, path, body, headers).status_code == 401
        with pytest.raises(openai.AuthenticationError):
            openai_client(server, "wrong").models.list()
        model.rename(tmp_path / "away")
        shutil.copytree(pruned, model)
        name = cut_short(model)
        assert client.completions.create(**GOOD).choices[0].text == before
    refused(model, tmp_path, "cut", name, "damaged or truncated")
    shutil.rmtree(model)
    shutil.copytree(pruned, model)
    refused(model, tmp_path, "lost", without_a_tensor(model), "1 tensors missing")


def refused(model: Path, folder: Path, log: str, name: str, said: str) -> None:
    with pytest.raises(ServerError, match="exited with 1"), start(model, folder, log):
        pass
    lines = [line for line in (folder / f"{log}.log").read_text().splitlines() if name in line and said in line]
    assert len(lines) == 1, lines
