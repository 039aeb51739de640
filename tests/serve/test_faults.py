"""What goes wrong around a server: bad requests, wrong keys, a killed worker, a checkpoint swapped under its feet."""

from __future__ import annotations

import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

pytest.importorskip("vllm")

from compression import TINY
from openai import OpenAI
from safetensors.torch import load_file, save_file

from offline.server import Server, ServerError

SETTINGS = ["--dtype", "float32", "--max-model-len", "512", "--served-model-name", "tiny", "--enforce-eager"]
CPU = {"VLLM_CPU_KVCACHE_SPACE": "1"}
GOOD = {"model": "tiny", "prompt": "A class definition", "max_tokens": 4, "temperature": 0}

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
    return httpx.post(f"{client.base_url}{path}", content=content, headers=with_type, timeout=120)


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


def worker(server: Server) -> psutil.Process:
    """The process that computes. vLLM names it, also where there is only one."""
    children = psutil.Process(server.process.pid).children(recursive=True)
    (found,) = [process for process in children if "VLLM::Worker" in " ".join(process.cmdline())]
    return found


def start(model: Path, folder: Path, name: str, *arguments: str, env: dict[str, str] | None = None) -> Server:
    return Server(model, [*SETTINGS, *arguments], log=folder / f"{name}.log", env=CPU | (env or {}))


def openai_client(server: Server, key: str = "none") -> OpenAI:
    return OpenAI(base_url=server.base_url, api_key=key, max_retries=0, timeout=120)


def kill_its_worker(server: Server, busy: bool) -> dict[str, Any]:
    """What clients see, and how the server ends, when its worker dies with eight streams under way, or none."""
    client = openai_client(server)
    chunks, ended = [0] * 8, [""] * 8

    def stream(number: int) -> None:
        try:
            for _ in client.completions.create(model="tiny", prompt="x", max_tokens=500, stream=True):
                chunks[number] += 1
            ended[number] = "complete"
        except (openai.APIError, httpx.HTTPError) as error:
            ended[number] = type(error).__name__

    threads = [threading.Thread(target=stream, args=(number,)) for number in range(8 * busy)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 120
    while busy and min(chunks) < 3:
        assert time.monotonic() < deadline, (chunks, ended)
        time.sleep(0.05)
    worker(server).kill()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive()
    code = server.process.wait(timeout=120)
    with pytest.raises(openai.APIConnectionError):
        client.models.list()
    return {"streams": sorted(set(ended[: 8 * busy])), "exit code": code}


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
    assert ours == stock
    assert "complete" not in ours["streams"]
    with start(pruned, tmp_path, "again") as server:
        assert openai_client(server).completions.create(**GOOD).choices[0].text == before


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
