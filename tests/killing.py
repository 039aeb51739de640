"""A server whose worker is killed: what its clients see, how it ends, and how long that takes."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import psutil
import pytest
from openai import OpenAI

from offline.compare.server import Server

AT_ONCE = 10
"""Tokens per message of a stream: with one, the engine is done long before its clients have read the middle."""
SETTINGS = [
    "--dtype", "float32", "--max-model-len", "1024", "--served-model-name", "tiny", "--enforce-eager",
    "--stream-interval", str(AT_ONCE),
]  # fmt: skip
CPU = {"VLLM_CPU_KVCACHE_SPACE": "1"}
GOOD = {"model": "tiny", "prompt": "A class definition", "max_tokens": 4, "temperature": 0}
STREAMS = 8
TOKENS = 1000
LONG = {"model": "tiny", "prompt": "x", "max_tokens": TOKENS, "stream": True, "extra_body": {"ignore_eos": True}}
"""Seconds of tokens, however they are drawn: a stream that ends by itself at an end-of-text token proves nothing."""


def start(model: Path, folder: Path, name: str, *arguments: str, env: dict[str, str] | None = None) -> Server:
    return Server(model, [*SETTINGS, *arguments], log=folder / f"{name}.log", env=CPU | (env or {}))


def openai_client(server: Server, key: str = "none") -> OpenAI:
    return OpenAI(base_url=server.base_url, api_key=key, max_retries=0, timeout=120)


def worker(server: Server) -> psutil.Process:
    """The process that computes. vLLM names it, also where there is only one."""
    children = psutil.Process(server.process.pid).children(recursive=True)
    (found,) = [process for process in children if "VLLM::Worker" in " ".join(process.cmdline())]
    return found


@dataclass
class Death:
    """streams: how they ended; code: the server's exit code; seconds: from the kill until no stream and no process of
    the server was left."""

    streams: list[str]
    code: int
    seconds: float


class Streams:
    """Eight clients that read long answers."""

    def __init__(self, client: OpenAI) -> None:
        self.chunks, self.ended = [0] * STREAMS, [""] * STREAMS
        self.threads = [threading.Thread(target=self._read, args=(client, number)) for number in range(STREAMS)]
        for thread in self.threads:
            thread.start()

    def _read(self, client: OpenAI, number: int) -> None:
        try:
            for _ in client.completions.create(**LONG):
                self.chunks[number] += 1
            self.ended[number] = "complete"
        except (openai.APIError, httpx.HTTPError) as error:
            self.ended[number] = type(error).__name__

    def all_in_the_middle(self) -> bool:
        """Waits until every stream has begun; whether none has ended, or is near its end, which may be on its way."""
        deadline = time.monotonic() + 120
        while min(self.chunks) < 3:
            assert time.monotonic() < deadline, (self.chunks, self.ended)
            time.sleep(0.01)
        return not any(self.ended) and max(self.chunks) < 0.6 * TOKENS / AT_ONCE

    def join(self) -> None:
        for thread in self.threads:
            thread.join(timeout=120)
            assert not thread.is_alive()


def kill_its_worker(server: Server, busy: bool, wait: float = 0.0) -> Death:
    """Kills it with eight streams under way, or none. wait: seconds before, while new streams follow on those that
    have ended."""
    client, victim = openai_client(server), worker(server)
    streams, moment = (Streams(client) if busy else None), time.monotonic() + wait
    while streams and not (streams.all_in_the_middle() and time.monotonic() >= moment):
        if any(streams.ended):
            streams.join()
            assert set(streams.ended) == {"complete"}
            streams = Streams(client)
        time.sleep(0.01)
    began = time.monotonic()
    victim.kill()
    if streams:
        streams.join()
    code = server.process.wait(timeout=120)
    while _group(server.process.pid):
        assert time.monotonic() < began + 120
        time.sleep(0.05)
    seconds = time.monotonic() - began
    with pytest.raises(openai.APIConnectionError):
        client.models.list()
    return Death(sorted(set(streams.ended)) if streams else [], code, seconds)


def _group(leader: int) -> list[int]:
    """Living processes of a server's group."""
    found = []
    for process in psutil.process_iter(["status"]):
        with contextlib.suppress(ProcessLookupError):
            if os.getpgid(process.pid) == leader and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found
