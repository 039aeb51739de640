"""`make families`: that its columns are of tests that exist, what becomes of their results, and the committed table."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import run_families
import tiers
from small_families import SMALL

from offline.source.families import FAMILIES

PAGE = run_families.PAGE


def test_every_cell_has_tests_that_exist(pytestconfig: pytest.Config) -> None:
    nodes = set(pytestconfig.stash[tiers.EVERY_TEST])
    files = {node.partition("::")[0] for node in nodes}
    asked = {test for family in FAMILIES for tests in run_families.tests_of(family).values() for test in tests}
    assert sorted(test for test in asked if test.partition("::")[0] in files and test not in nodes) == []
    if not pytestconfig.option.file_or_dir:
        assert asked <= nodes


def write_record(path: Path, cases: dict[str, str], commands: tuple[str, ...] = run_families.COMMANDS) -> Path:
    """A JUnit file; cases: node id -> passed, failed or skipped; what is of MATRIX came through `commands`."""
    root = ElementTree.Element("testsuite")
    for node, state in cases.items():
        file, _, name = node.partition("::")
        module = file.removesuffix(".py").replace("/", ".")
        case = ElementTree.SubElement(root, "testcase", classname=module, name=name, time="1")
        if node.startswith(run_families.MATRIX):
            properties = ElementTree.SubElement(case, "properties")
            for command in commands:
                ElementTree.SubElement(properties, "property", name="command", value=command)
        if state != "passed":
            ElementTree.SubElement(case, {"failed": "failure", "skipped": "skipped"}[state], message="no such float")
    ElementTree.ElementTree(root).write(path)
    return path


def nodes_of(family: str) -> dict[str, str]:
    return {node: "passed" for nodes in run_families.tests_of(family).values() for node in nodes}


def cells(tmp_path: Path, family: str, changes: dict[str, str], **more: Any) -> dict[str, str]:
    cases = {**nodes_of(family), **{node.format(family): state for node, state in changes.items()}}
    cases = {node: state for node, state in cases.items() if state != "missing"}
    return run_families.cells_of(family, run_families.read_record(write_record(tmp_path / "a.xml", cases, **more)))


def test_what_passed_is_said_column_by_column(tmp_path: Path) -> None:
    assert set(cells(tmp_path, "mixtral", {}).values()) == {"passed"}


def test_a_command_that_was_not_reached_failed(tmp_path: Path) -> None:
    matrix = {f"{run_families.MATRIX}[{{}}-default]": "failed"}
    found = cells(tmp_path, "mixtral", matrix, commands=("plan", "compress"))
    assert [found[name] for name in run_families.COMMANDS] == ["passed", "passed", *["failed"] * 4]
    assert found["TP 2"] == "passed"


@pytest.mark.parametrize(("state", "cell"), [("failed", "failed"), ("missing", "failed"), ("skipped", "skipped: no")])
def test_a_test_that_did_not_pass_is_its_columns_affair(state: str, cell: str, tmp_path: Path) -> None:
    (node,) = run_families.COLUMNS["TP 2"]
    found = cells(tmp_path, "mixtral", {node: state})
    assert found.pop("TP 2").startswith(cell)
    assert set(found.values()) == {"passed"}


def test_a_family_that_is_not_served_here_has_its_refusal_tested(tmp_path: Path) -> None:
    family = next(name for name, small in SMALL.items() if small.refused_here)
    found = cells(tmp_path, family, {})
    assert {found[name] for name in run_families.SERVING} == {"refused"}
    assert {found[name] for name in run_families.COLUMNS if name not in run_families.SERVING} == {"passed"}
    found = cells(tmp_path, family, {run_families.REFUSED: "failed"})
    assert {found[name] for name in run_families.SERVING} == {"failed"}


def test_only_what_all_passed_with_the_installed_versions_is_known() -> None:
    versions, passed = run_families.installed(), dict.fromkeys(run_families.COLUMNS, "passed")
    whole = {"versions": versions, "cells": passed}
    assert run_families.is_known("mixtral", {"mixtral": whole})
    for other in (
        {"versions": {**versions, "vllm": "0.1"}},
        {"cells": {**passed, "EP 2": "failed"}},
        {"cells": {name: cell for name, cell in passed.items() if name != "EP 2"}},
    ):
        assert not run_families.is_known("mixtral", {"mixtral": {**whole, **other}})
    assert not run_families.is_known("mixtral", {})


def test_the_table_says_what_was_skipped_and_what_was_not_run() -> None:
    cells = dict.fromkeys(run_families.COLUMNS, "passed") | {"TP 2": "skipped: no such float", "EP 2": "failed"}
    known = {"versions": {"vllm": "0.32.0"}, "cells": cells, "date": "2026-12-01"}
    lines = run_families.table({"mixtral": known}).splitlines()
    assert lines[2].endswith("| yes | skipped (1) | **no** | 2026-12-01 |")
    assert lines[3].endswith("| not yet |")
    assert lines[-2:] == ["With vllm 0.32.0.", "(1) no such float."]


def test_the_documents_have_what_was_found() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert run_families.table(run_families.load()) in text


def test_a_family_that_nobody_knows_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run_families.main(["mixtrel"])
    assert stop.value.code == 2
    assert "'mixtrel' is no family" in capsys.readouterr().err
