"""Many clients at once for ten minutes: no error, no growth of memory or latency, and everyone gets what they would get
alone. `pytest -s` shows the figures by the minute, and the JUnit file keeps them."""

from __future__ import annotations

import asyncio
import os
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

pytest.importorskip("vllm")

from openai import AsyncOpenAI
from openai.types import Completion

from offline.compare.server import Server

CLIENTS = 64
SECONDS = float(os.environ.get("D2MOE_LOAD_SECONDS", "600"))
WARM_UP = min(60, SECONDS / 2)
"""Seconds of the same load before: torch's and the C library's allocators keep what the first few thousand requests'
batches of all sizes needed."""
GROWTH = 16 << 20
"""Bytes; see `growth`. Its two halves are five minutes and, on two cores, 10,000 to 20,000 requests apart: a leak of
2 KiB a request fails."""
SLOWER = {50: 1.5, 99: 2.0}
"""Percentile of a minute's latencies -> how many times its median over the first half of the minutes the second half's
may be. Wide, because a test has to bear with its neighbours on a machine; what fills up or leaks grows steadily."""
PRIMITIVES = "64"
"""Of oneDNN's cache. It makes and keeps a primitive of some 300 KB for every number of rows that any linear layer has
seen, 1024 of them by default: a stock server's memory grows for minutes by that alone, and then by the holes that the
ones thrown out leave in the heap. What is in use stays flat meanwhile. A small cache is full when the warm-up ends."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * SECONDS + 1500)]


@dataclass(frozen=True)
class Request:
    prompt: str
    max_tokens: int


@dataclass
class Outcome:
    """What all clients together saw."""

    done: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    different: list[tuple[Request, str]] = field(default_factory=list)
    memory: list[dict[str, int]] = field(default_factory=list)  # by process: bytes
    latencies: list[tuple[float, float]] = field(default_factory=list)  # seconds: when it ended, how long it took


@pytest.fixture(scope="module")
def server(pruned: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Scope `token`, so that what is computed differs from row to row and neighbours could be felt."""
    arguments = ["--dtype", "float32", "--max-model-len", "512", "--served-model-name", "tiny"]
    arguments += ["--additional-config", '{"d2moe": {"scope": "token"}}']
    # A KV cache becomes resident block by block, and blocks are used in turn: the default one would go on growing for
    # minutes. This one is full at once, and holds all that 64 clients need (blocks of 128 tokens, 3 for the longest).
    arguments += ["--num-gpu-blocks-override", "256"]
    log = tmp_path_factory.mktemp("load") / "log"
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": PRIMITIVES}
    with Server(pruned, arguments, log=log, env=environment) as running:
        yield running


def mixed_requests(text: str) -> list[Request]:
    """Short and long prompts (up to some 300 tokens), short and long answers; no two alike."""
    chance = random.Random(0)
    requests = []
    for prompt_length in (4, 20, 80, 250, 700):
        for max_tokens in (1, 7, 24, 60):
            start = chance.randrange(len(text) - prompt_length)
            requests.append(Request(text[start : start + prompt_length], max_tokens))
    return requests


async def create(client: AsyncOpenAI, request: Request, stream: bool = False) -> Completion:
    return await client.completions.create(
        model="tiny", prompt=request.prompt, max_tokens=request.max_tokens, temperature=0, stream=stream
    )


async def streamed(client: AsyncOpenAI, request: Request, abort_after: int | None = None) -> str:
    """The text that arrived; with abort_after the connection is closed after so many chunks."""
    text = ""
    async with await create(client, request, stream=True) as stream:
        async for chunk in stream:
            text += chunk.choices[0].text
            if abort_after is not None and (abort_after := abort_after - 1) < 0:
                break
    return text


async def one_client(client: AsyncOpenAI, number: int, expected: dict[Request, str], end: float, out: Outcome) -> None:
    """Requests one after the other until `end` (monotonic seconds), each of a kind drawn at random."""
    chance = random.Random(number)
    requests = list(expected)
    while time.monotonic() < end:
        request, kind = chance.choice(requests), chance.choice(("whole", "streamed", "aborted"))
        wanted, began = expected[request], time.monotonic()
        try:
            if kind == "whole":
                same = (text := (await create(client, request)).choices[0].text) == wanted
            elif kind == "streamed":
                same = (text := await streamed(client, request)) == wanted
            else:
                text = await streamed(client, request, abort_after=chance.randrange(request.max_tokens))
                same = wanted.startswith(text)
        except Exception as error:  # any error of any kind fails the test, with all others beside it
            out.errors.append(f"{kind}: {type(error).__name__}: {error}")
            continue
        out.done[kind] += 1
        if kind != "aborted":
            out.latencies.append((time.monotonic(), time.monotonic() - began))
        if not same:
            out.different.append((request, text))


async def watch(server: Server, end: float, out: Outcome) -> None:
    """Resident bytes of the server and all its children, once a second."""
    parent = psutil.Process(server.process.pid)
    await asyncio.sleep(WARM_UP)
    while time.monotonic() < end:
        tree = (parent, *parent.children(recursive=True))
        out.memory.append({f"{p.pid} {p.cmdline()[0]}": p.memory_info().rss for p in tree})
        await asyncio.sleep(1)


async def crowd(server: Server, expected: dict[Request, str]) -> Outcome:
    out, end = Outcome(), time.monotonic() + WARM_UP + SECONDS
    async with AsyncOpenAI(base_url=server.base_url, api_key="none", max_retries=0, timeout=600) as client:
        clients = [one_client(client, number, expected, end, out) for number in range(CLIENTS)]
        await asyncio.gather(watch(server, end, out), *clients)
    return out


async def alone(server: Server, requests: list[Request]) -> dict[Request, str]:
    async with AsyncOpenAI(base_url=server.base_url, api_key="none", max_retries=0, timeout=600) as client:
        return {request: (await create(client, request)).choices[0].text for request in requests}


def growth(memory: list[dict[str, int]]) -> dict[str, int]:
    """By process, and in all: bytes by which the second half of the time after warm-up has more than the first.

    By medians, because single samples swing with what is in flight; a leak raises the median, a peak does not.
    """
    half = len(memory) // 2
    samples = [{"all": sum(sample.values()), **sample} for sample in memory]
    series = {name: [sample[name] for sample in samples] for name in samples[0]}
    return {name: int(statistics.median(s[half:]) - statistics.median(s[:half])) for name, s in series.items()}


def by_minute(latencies: list[tuple[float, float]]) -> list[dict[int, float]]:
    """Seconds by percentile, of every minute after warm-up; a minute counts the requests that ended in it."""
    start = min(ended - took for ended, took in latencies) + WARM_UP
    minutes: dict[int, list[float]] = {}
    for ended, took in latencies:
        if start <= ended < start + SECONDS:  # later ones ran beside fewer and fewer others
            minutes.setdefault(int((ended - start) // 60), []).append(took)
    cuts = [statistics.quantiles(minutes[number], n=100) for number in sorted(minutes) if len(minutes[number]) > 1]
    return [{percentile: round(cut[percentile - 1], 3) for percentile in SLOWER} for cut in cuts]


@pytest.fixture(scope="module")
def expected(server: Server, texts: tuple[Path, Path]) -> dict[Request, str]:
    return asyncio.run(alone(server, mixed_requests(texts[1].read_text())))


@pytest.fixture(scope="module")
def outcome(server: Server, expected: dict[Request, str], record_testsuite_property: Callable[..., None]) -> Outcome:
    out = asyncio.run(crowd(server, expected))
    sizes = [round(sum(sample.values()) / 2**20) for sample in out.memory]
    figures = {
        "requests": dict(out.done),
        "different": len(out.different),
        "growth": growth(out.memory),
        "MiB by the minute": sizes[::60],
        "seconds by the minute": by_minute(out.latencies),
    }
    for name, figure in figures.items():
        print(f"{name}: {figure}")
        record_testsuite_property(name, str(figure))
    return out


def test_no_error_under_load(outcome: Outcome, expected: dict[Request, str], server: Server) -> None:
    """64 clients, streaming and not, mixed lengths, connections dropped in mid-stream; and then it serves on."""
    assert outcome.errors == []
    assert min(outcome.done[kind] for kind in ("whole", "streamed", "aborted")) > CLIENTS / 4
    assert asyncio.run(alone(server, list(expected)[:3])) == dict(list(expected.items())[:3])


def test_outputs_do_not_depend_on_neighbours(outcome: Outcome) -> None:
    """float32, scope `token`: every text is the one that the same request got alone."""
    total = sum(outcome.done.values())
    assert len(outcome.different) == 0, f"{len(outcome.different)} of {total}, first: {outcome.different[:3]}"


def test_memory_does_not_grow_after_warm_up(outcome: Outcome) -> None:
    assert len(outcome.memory) > SECONDS / 4
    assert growth(outcome.memory)["all"] < GROWTH, growth(outcome.memory)


@pytest.mark.parametrize("percentile", SLOWER)
def test_latency_does_not_grow_after_warm_up(outcome: Outcome, percentile: int) -> None:
    minutes = [minute[percentile] for minute in by_minute(outcome.latencies)]
    half = len(minutes) // 2
    if not half:
        pytest.skip("less than two minutes: nothing to compare")
    before, after = statistics.median(minutes[:half]), statistics.median(minutes[half:])
    assert after <= SLOWER[percentile] * before, minutes
