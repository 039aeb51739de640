"""Every metric and label that the dashboard and the alerts ask for is in a real server's /metrics."""

from __future__ import annotations

import time
import urllib.request

import pytest
import yaml
from dashboard import ALERTS, BY_PROMETHEUS, expressions, selectors
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

from offline.compare.server import Server


@pytest.fixture(scope="module")
def scraped(server: Server, client: OpenAI) -> dict[str, set[str]]:
    """Sample name -> names of its labels, after a request; `up` is Prometheus' own."""
    client.completions.create(model="tiny", prompt="The for statement", max_tokens=2)
    deadline, text = time.monotonic() + 60, ""
    while "d2moe_experts_seconds_count{" not in text:  # written after the request, at most every 2 seconds
        assert time.monotonic() < deadline, "the server has no d2moe metrics"
        time.sleep(1)
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=60) as answer:
            text = answer.read().decode()
    found: dict[str, set[str]] = {"up": set()}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def test_panels_and_alerts_ask_for_what_there_is(scraped: dict[str, set[str]]) -> None:
    """Of vLLM's metrics and of ours; a name that vLLM changes is found here."""
    rules = yaml.safe_load(ALERTS.read_text())["groups"][0]["rules"]
    asked = [one for text in (*expressions(), *(rule["expr"] for rule in rules)) for one in selectors(text)]
    assert {name.split(":")[0].split("_")[0] for name, _ in asked} == {"up", "vllm", "d2moe", "http", "process"}
    missing = {name for name, _ in asked if name not in scraped}
    assert not missing
    for name, labels in asked:
        assert labels - BY_PROMETHEUS <= scraped[name], name


def test_the_autoscaler_asks_for_what_there_is(scraped: dict[str, set[str]]) -> None:
    """The adapter's rule too."""
    adapter = yaml.safe_load((ALERTS.parent / "prometheus-adapter.yaml").read_text())
    for rule in adapter["rules"]["custom"]:
        assert rule["seriesQuery"].split("{")[0] in scraped
