"""Prometheus' configuration, the alerts with their own tests, and the dashboard's expressions.

That every metric exists on a real server is tests/serve/test_dashboard.py.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import promql_parser
import pytest
import yaml
from dashboard import ALERTS, DASHBOARD, MONITORING, expressions, selectors
from dockerfile import ROOT

promtool = pytest.mark.skipif(
    not shutil.which("promtool"), reason="no promtool (Debian's package prometheus): the alerts are not tested here"
)


@promtool
@pytest.mark.parametrize("command", ["check config prometheus.yml", "test rules alerts.test.yml"])
def test_promtool_is_content(command: str) -> None:
    """The configuration is valid, and each alert fires when it should and at no other time."""
    done = subprocess.run(["promtool", *command.split()], cwd=MONITORING, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def alerts() -> dict[str, dict]:
    rules = yaml.safe_load(ALERTS.read_text())["groups"][0]["rules"]
    return {rule["alert"]: rule for rule in rules}


def test_every_alert_is_tested_both_ways() -> None:
    """Once that it fires, and at the well server that it does not."""
    cases = yaml.safe_load((MONITORING / "alerts.test.yml").read_text())["tests"]
    checks = [check for case in cases for check in case["alert_rule_test"]]
    assert {check["alertname"] for check in checks if check.get("exp_alerts")} == set(alerts())
    for case in cases[:2]:
        quiet = [check["alertname"] for check in case["alert_rule_test"] if not check.get("exp_alerts")]
        assert sorted(quiet) == sorted(alerts())


def test_every_alert_is_in_the_runbook() -> None:
    """docs/deploy.md says for each what to look at and what to do, and names none that is gone."""
    guide = (ROOT / "docs" / "deploy.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \|", guide.split("## At three in the morning")[1], re.MULTILINE)
    assert rows == list(alerts())
    assert {rule["labels"]["severity"] for rule in alerts().values()} == {"critical", "warning", "info"}


def test_kubernetes_has_the_same_alerts() -> None:
    manifest = yaml.safe_load((ROOT / "deploy" / "kubernetes" / "base" / "prometheusrule.yaml").read_text())
    assert manifest["spec"]["groups"] == yaml.safe_load(ALERTS.read_text())["groups"]


@pytest.mark.parametrize("expression", [*expressions(), *(rule["expr"] for rule in alerts().values())])
def test_expressions_parse(expression: str) -> None:
    """By the parser of the Prometheus project's grammar, each with a metric in it."""
    promql_parser.parse(expression)
    assert selectors(expression)


def test_the_parser_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="unclosed"):
        selectors("sum(rate(x[5m])")


def test_the_dashboard_is_whole() -> None:
    """Every panel says what it shows, no two share a place, and every expression listens to the server variable."""
    dashboard = json.loads(DASHBOARD.read_text())
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        assert panel["description"].endswith("."), panel["title"]
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells
        for target in panel["targets"]:
            assert 'instance=~"$instance"' in target["expr"], panel["title"]
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps([panel["targets"] for panel in panels])))
    assert used - {"__rate_interval"} == variables
