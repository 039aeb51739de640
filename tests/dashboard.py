"""What the dashboard and the alerts ask Prometheus for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import promql_parser

MONITORING = Path(__file__).resolve().parents[1] / "deploy" / "monitoring"
ALERTS = MONITORING / "alerts.yml"
DASHBOARD = MONITORING / "grafana" / "dashboards" / "d2moe.json"
VARIABLES = {"$__rate_interval": "1m", "$instance": ".*", "$layers": ".*"}
BY_PROMETHEUS = {"job", "instance"}
"""Labels that Prometheus puts on everything it scrapes."""


def expressions() -> list[str]:
    """Of every panel, as Grafana sends them."""
    found = []
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel.get("targets", []):
            expression = target["expr"]
            for name, value in VARIABLES.items():
                expression = expression.replace(name, value)
            found.append(expression)
    return found


def selectors(expression: str) -> set[tuple[str, frozenset[str]]]:
    """(metric, names of the labels it is chosen by); raises ValueError for what is no PromQL."""
    found: set[tuple[str, frozenset[str]]] = set()

    def look(node: Any) -> bool:
        if isinstance(node, promql_parser.VectorSelector):
            found.add((node.name, frozenset(matcher.name for matcher in node.matchers.matchers)))
        return True

    promql_parser.walk(promql_parser.parse(expression), look)
    return found
