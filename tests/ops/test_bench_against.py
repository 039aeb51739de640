"""`make bench-against`: what it asks of both trees, and what it says of a commit that is none."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import bench_against
import pytest


class Tree:
    """Stands for a tree's process: its layer takes `milliseconds`, each call a little longer than the one before."""

    log: list[tuple[str, dict[str, Any]]]

    def __init__(self, name: str, milliseconds: float, log: list[tuple[str, dict[str, Any]]]) -> None:
        self.name, self.milliseconds, self.log = name, milliseconds, log

    def ask(self, **what: Any) -> Any:
        self.log.append((self.name, what))
        self.milliseconds *= 1.01
        return True if what else self.milliseconds


def test_calls_take_turns_and_the_ratio_is_of_pairs(capsys: pytest.CaptureFixture[str]) -> None:
    log: list[tuple[str, dict[str, Any]]] = []
    workers: Any = {"before": Tree("before", 10.0, log), "now": Tree("now", 20.0, log)}
    given = {"shapes": ["a"], "ratios": [0.4], "scopes": ["off"], "storages": [], "tokens": [1, 16], "pairs": 5}
    rows = bench_against.measure(workers, argparse.Namespace(**given))
    assert [row["tokens"] for row in rows] == [1, 16]
    assert all(row["ratio"] == pytest.approx(2.0) for row in rows)
    assert all(row["before_ms"] < row["now_ms"] for row in rows)
    calls = [name for name, what in log if not what]
    assert [calls[start : start + 2] for start in (0, 2, 4)] == [
        ["before", "now"],
        ["now", "before"],
        ["before", "now"],
    ]
    assert calls.count("before") == calls.count("now") == 2 * 5
    assert "now/before" in capsys.readouterr().out

    stored = argparse.Namespace(**{**given, "ratios": [], "storages": ["int4"]})
    assert [row["asked"] for row in bench_against.measure(workers, stored)] == ["int4", "int4"]
    assert ("now", {"layer": ("a", "int4", "off")}) in log


def test_an_unknown_commit_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_against.py", "no-such-commit"])
    with pytest.raises(SystemExit) as ended:
        bench_against.main()
    assert ended.value.code == 2
    assert "git has no no-such-commit" in capsys.readouterr().err
