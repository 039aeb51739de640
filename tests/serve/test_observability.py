"""Metrics, the info endpoint and its page, from the real server; the page in a real browser."""

from __future__ import annotations

import json
import os
import re
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import chromium
from compression import TINY, d2moe_here
from openai import OpenAI
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from transformers import AutoModelForCausalLM

from d2moe_vllm.observability.recorder import INTERVAL
from offline.compare.server import Server

LAYERS, TOP_K, EXPERTS = 4, 2, 8


def get(server: Server, path: str, key: str | None = None) -> str:
    request = urllib.request.Request(f"http://127.0.0.1:{server.port}{path}")
    if key is not None:
        request.add_header("Authorization", f"Bearer {key}")
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read().decode()


def families(server: Server) -> dict[str, Metric]:
    found = text_string_to_metric_families(get(server, "/metrics"))
    return {family.name: family for family in found if family.name.startswith("d2moe")}


def tokens(server: Server) -> dict[tuple[int, int], int]:
    """By (layer, expert): the bundled model has so few layers that each is a group of its own."""
    samples = families(server)["d2moe_expert_tokens"].samples
    return {(int(s.labels["layers"]), int(s.labels["expert"])): int(s.value) for s in samples}


def settled(server: Server) -> dict[tuple[int, int], int]:
    """Once nothing changes any more: what was counted last is written within INTERVAL."""
    counts, deadline = tokens(server), time.monotonic() + 120
    while True:
        time.sleep(INTERVAL + 0.3)
        before, counts = counts, tokens(server)
        if counts == before:
            return counts
        assert time.monotonic() < deadline


def complete(client: OpenAI, ids: list[int], tokens: int) -> list[int]:
    """Token ids generated for a prompt of token ids; never stops early."""
    done = client.completions.create(
        model="tiny",
        prompt=ids,
        max_tokens=tokens,
        temperature=0,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    assert done.usage.completion_tokens == tokens
    return done.choices[0].token_ids  # type: ignore[attr-defined]


@torch.no_grad()
def test_tokens_per_expert_are_those_that_transformers_routes(server: Server, client: OpenAI, compressed: Path) -> None:
    """Exactly, expert by expert and layer by layer; the last generated token is never computed with."""
    before = settled(server)
    sequences = []
    for start in (11, 211, 411):
        prompt = [(start + 7 * i) % 1000 for i in range(20 + start % 9)]
        sequences.append((prompt + complete(client, prompt, 16))[:-1])
    after = settled(server)
    model = AutoModelForCausalLM.from_pretrained(compressed, trust_remote_code=True, dtype=torch.float32).eval()
    expected = torch.zeros(LAYERS, EXPERTS, dtype=torch.int64)
    for ids in sequences:
        for layer, logits in enumerate(model(torch.tensor([ids]), output_router_logits=True).router_logits):
            expected[layer] += torch.bincount(logits.topk(TOP_K).indices.flatten(), minlength=EXPERTS)
    assert int(expected.sum()) == sum(map(len, sequences)) * TOP_K * LAYERS
    assert {key: after[key] - before[key] for key in after} == {
        (layer, expert): int(expected[layer, expert]) for layer in range(LAYERS) for expert in range(EXPERTS)
    }


def test_metrics_follow_prometheus_conventions(server: Server) -> None:
    """What `promtool check metrics` asks for: help, base units, `_total` for counters and for nothing else."""
    found = families(server)
    types = {name: family.type for name, family in found.items()}
    assert types == {
        "d2moe_expert_tokens": "counter",
        "d2moe_base_columns_used_ratio": "gauge",
        "d2moe_delta_bytes": "gauge",
        "d2moe_experts_seconds": "summary",
    }
    for family in found.values():
        assert family.documentation.endswith(".")
        for sample in family.samples:
            assert re.fullmatch(r"[a-z][a-z0-9_]*", sample.name)
            assert sample.name.endswith("_total") == (family.type == "counter")
            assert set(sample.labels) <= {"layers", "expert", "half", "rank"}
            assert sample.value >= 0
    assert get(server, "/metrics").count("# TYPE d2moe_expert_tokens_total ") == 1


def test_info_agrees_with_inspect_and_metrics(server: Server, client: OpenAI, compressed: Path) -> None:
    info = json.loads(get(server, "/v1/d2moe/info", client.api_key))
    inspected = json.loads(d2moe_here("inspect", compressed, "--json").stdout)
    for name in ("method", "family", "source", "stores", "scope", "parameters", "bytes", "stored_ratio"):
        assert info[name] == inspected[name], name
    assert info["experts"] == inspected["experts"]
    for number, layer in inspected["layers"].items():
        for role in ("gate", "up", "down"):
            shown = info["layers"][number][role]
            assert shown["full_base"] == layer[role]["full_base"]
            assert shown["kept_columns"] == layer[role]["kept_columns"]
            assert shown["columns_in_use"] == (shown["columns"] if shown["full_base"] else shown["kept_columns"])
            assert shown["rank"] == layer[role]["rank"]
    assert info["recipe"]["ratio"] == 0.4
    assert info["parallel"] == {"tensor_parallel_size": 1, "expert_parallel_size": 1}
    assert info["backend"] == "cpu"
    assert set(info["versions"]) == {"d2moe_vllm", "vllm", "torch", "format"}
    counts = settled(server)
    shown = json.loads(get(server, "/v1/d2moe/info", client.api_key))["counters"]
    assert {(int(g), int(e)): n for g, group in shown["tokens"].items() for e, n in group.items()} == counts
    deltas = {s.labels["layers"]: int(s.value) for s in families(server)["d2moe_delta_bytes"].samples}
    assert {group: ranks["0"] for group, ranks in shown["delta_bytes"].items()} == deltas


@pytest.mark.parametrize("path", ["/v1/d2moe", "/v1/d2moe/info"])
@pytest.mark.parametrize("key", [None, "wrong"])
def test_both_routes_want_the_key(server: Server, path: str, key: str | None) -> None:
    with pytest.raises(urllib.error.HTTPError) as error:
        get(server, path, key)
    assert error.value.code == 401


@pytest.mark.parametrize("path", ["/metrics", "/health"])
def test_what_the_key_does_not_guard(server: Server, path: str) -> None:
    """As SECURITY.md and the deployment guide say: where vLLM comes to ask for the key here, they are to change."""
    get(server, path, None)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as launched:
        yield launched


@pytest.fixture
def problems() -> list[str]:
    return []


def open_page(browser: Any, url: str, problems: list[str], key: str | None = None, **context: Any) -> Any:
    """A tab at `url`; what goes wrong in it is appended to problems."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    tab = browser.new_context(extra_http_headers=headers, **context).new_page()
    tab.on("console", lambda message: problems.append(f"console: {message.text}"))
    tab.on("pageerror", lambda error: problems.append(f"error: {error}"))
    tab.on("requestfailed", lambda request: problems.append(f"failed: {request.url}"))
    tab.on("response", lambda response: problems.append(response.url) if response.status >= 400 else None)
    tab.goto(url)
    return tab


def shown_tokens(tab: Any) -> dict[int, int]:
    rows = tab.locator("#t-tokens tbody tr").evaluate_all("rows => rows.map(r => [...r.cells].map(c => c.textContent))")
    return {int(expert): int(count.replace(",", "")) for expert, count in rows}


def test_the_page_shows_the_numbers_and_refreshes_them(
    server: Server, client: OpenAI, browser: Any, problems: list[str]
) -> None:
    """In light and in dark, at once."""
    counts = settled(server)
    url = f"http://127.0.0.1:{server.port}/v1/d2moe"
    tabs = [open_page(browser, url, problems, client.api_key, color_scheme=scheme) for scheme in ("light", "dark")]
    info = json.loads(get(server, "/v1/d2moe/info", client.api_key))
    sizes = (info["source"]["bytes"], info["bytes"], info["experts"]["dense_bytes"], info["experts"]["bytes"])
    ranks = [[n, *(str(layer[role]["rank"]) for role in ("gate", "up", "down"))] for n, layer in info["layers"].items()]
    stored = [[number, layer["stores"], layer["channels"]] for number, layer in info["layers"].items()]
    total = {expert: sum(counts[layer, expert] for layer in range(LAYERS)) for expert in range(EXPERTS)}
    for tab in tabs:
        assert tab.locator("h1").text_content() == info["model"] == "tiny"
        cells = tab.locator("#t-sizes td").all_text_contents()
        assert [int(cells[i].replace(",", "")) for i in (1, 2, 4, 5)] == list(sizes)
        assert tab.locator("#t-ranks td").all_text_contents() == [cell for row in ranks for cell in row]
        assert tab.locator("#t-stores td").all_text_contents() == [cell for row in stored for cell in row]
        assert tab.locator("#ranked").is_visible()
        assert shown_tokens(tab) == total
        # One layer of them, by keyboard.
        tab.locator("#group").focus()
        tab.keyboard.press("ArrowDown")
        assert shown_tokens(tab) == {expert: counts[0, expert] for expert in range(EXPERTS)}
    complete(client, list(range(30, 50)), 8)
    grown = sum(counts[0, expert] for expert in range(EXPERTS)) + (20 + 8 - 1) * TOP_K
    for tab in tabs:
        tab.get_by_text(f"{grown:,} in all", exact=True).wait_for(timeout=30_000)
    assert problems == []
    for tab in tabs:
        tab.context.close()


def test_the_page_fits_a_phone_and_has_words_for_its_pictures(
    server: Server, client: OpenAI, browser: Any, problems: list[str]
) -> None:
    phone = {"width": 360, "height": 740}
    url = f"http://127.0.0.1:{server.port}/v1/d2moe"
    tab = open_page(browser, url, problems, client.api_key, viewport=phone)
    # Keyboard: the button is the first thing reached, and says what it did.
    tab.keyboard.press("Tab")
    tab.keyboard.press("Enter")
    assert tab.evaluate("document.activeElement.id") == "pause"
    assert tab.locator("#pause").get_attribute("aria-pressed") == "true"
    for summary in tab.locator("summary").all():
        summary.press("Enter")
    assert tab.evaluate("document.documentElement.scrollWidth") == 360
    pictures = tab.locator("svg")
    assert pictures.count() == 4
    assert all(picture.get_attribute("aria-label") for picture in pictures.all())
    assert tab.locator("details[open]").count() == 4
    assert problems == []
    tab.context.close()


def test_a_saved_page_shows_its_figures_and_asks_for_the_key(
    server: Server, client: OpenAI, browser: Any, problems: list[str], tmp_path: Path
) -> None:
    """How a browser gets in where there is a key: it cannot send one when it opens an address."""
    counts = settled(server)
    (tmp_path / "d2moe.html").write_text(get(server, "/v1/d2moe", client.api_key))
    tab = open_page(browser, f"file://{tmp_path}/d2moe.html", problems)
    assert sum(shown_tokens(tab).values()) == sum(counts.values())
    assert "A saved copy" in tab.locator("#state").text_content()
    assert problems == []
    # This server allows no other origins: the page says what it would take.
    tab.locator("#server").fill(f"http://127.0.0.1:{server.port}")
    tab.locator("#key").fill(client.api_key)
    tab.locator("#access button").click()
    tab.get_by_text("--allowed-origins").wait_for(timeout=30_000)
    tab.context.close()


SMALL = ["--dtype", "float32", "--max-model-len", "512", "--served-model-name", "tiny", "--enforce-eager"]
ENV = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_PLUGINS": "d2moe", "VLLM_CPU_OMP_THREADS_BIND": "0|1"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [[], ["--enable-expert-parallel"], ["--api-server-count", "2"]],
    ids=["tensor parallel", "expert parallel", "two API servers"],
)
def test_two_ranks_count_each_token_once(compressed: Path, tmp_path: Path, options: list[str]) -> None:
    """And the files are gone with the server, here with a worker killed. Two API servers: vLLM merges our files."""
    temporary = tmp_path / "t"
    temporary.mkdir()
    arguments = [*SMALL, "--tensor-parallel-size", "2", *options]
    with Server(compressed, arguments, log=tmp_path / "log", env={**ENV, "TMPDIR": str(temporary)}) as server:
        client = OpenAI(base_url=server.base_url, api_key="none", max_retries=0)
        files = list(temporary.glob("**/gauge_max_d2moe-*.db"))
        assert len(files) == 2
        assert sum(settled(server).values()) == 0
        complete(client, list(range(100, 130)), 10)
        counts = settled(server)
        assert len(counts) == LAYERS * EXPERTS
        for layer in range(LAYERS):
            assert sum(counts[layer, expert] for expert in range(EXPERTS)) == (30 + 10 - 1) * TOP_K
        info = json.loads(get(server, "/v1/d2moe/info"))
        expert_parallel = "--enable-expert-parallel" in options
        assert info["parallel"] == {"tensor_parallel_size": 2, "expert_parallel_size": 2 if expert_parallel else 1}
        assert all(set(ranks) == {"0", "1"} for ranks in info["counters"]["delta_bytes"].values())
        assert sum(map(sum, (group.values() for group in info["counters"]["tokens"].values()))) == sum(counts.values())
        os.kill(int(files[0].stem.rpartition("-")[2]), signal.SIGKILL)
        server.process.wait(timeout=120)
    assert list(temporary.glob("**/*d2moe-*")) == []


@pytest.mark.slow
def test_another_model_has_nothing_to_show(tmp_path: Path) -> None:
    temporary = tmp_path / "t"
    temporary.mkdir()
    with Server(TINY, SMALL, log=tmp_path / "log", env={**ENV, "TMPDIR": str(temporary)}) as server:
        assert families(server) == {}
        assert list(temporary.glob("**/*d2moe*")) == []
        for path in ("/v1/d2moe", "/v1/d2moe/info"):
            with pytest.raises(urllib.error.HTTPError) as error:
                get(server, path)
            assert error.value.code == 404
            assert "no d2moe checkpoint" in error.value.read().decode()
