"""Dependencies point one way: every module imports from its own room or from floors below, and nothing in a circle."""

from __future__ import annotations

import ast
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = (
    ("d2moe_vllm.format", "d2moe_vllm.configuration_deepseek"),
    ("d2moe_vllm.ops",),
    # The names of families are those of hf, for who wants no torch imported.
    ("d2moe_vllm.hf", "d2moe_vllm.families"),
    # The entry point: its own imports are made when vLLM asks for them.
    ("d2moe_vllm",),
    ("d2moe_vllm.compat", "d2moe_vllm.overrides"),
    ("d2moe_vllm.observability",),
    ("d2moe_vllm.serving",),
    ("d2moe_vllm.tuning",),
    ("offline", "offline.errors"),
    ("offline.io",),
    ("offline.source",),
    ("offline.algebra",),
    ("offline.work",),
    ("offline.methods",),
    ("offline.plan",),
    ("offline.checkpoint",),
    ("offline.run",),
    ("offline.compare", "offline.report"),
    ("offline.cli",),
)
"""Rooms, the lowest floor first. A room may use those below it, and others of its own floor."""
UPWARDS = {
    ("d2moe_vllm", "d2moe_vllm.serving"): "register() makes vLLM know the method",
}
"""Imports within functions that have to look up, and why."""


@cache
def modules() -> dict[str, Path]:
    found = {}
    for package in ("d2moe_vllm", "offline"):
        for path in sorted((ROOT / package).rglob("*.py")):
            found[".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")] = path
    return found


def imports(path: Path) -> set[str]:
    """Modules of ours that a file names in any import, also within functions and for type checkers only."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found = {f"{node.module}.{alias.name}" for alias in node.names} & modules().keys()
            names |= found or {node.module}
    return names & modules().keys()


def room(module: str) -> str:
    rooms = {room for floor in FLOORS for room in floor}
    while module not in rooms:
        assert "." in module, f"{module} is in no room of FLOORS"
        module = module.rpartition(".")[0]
    return module


def test_no_module_imports_upwards() -> None:
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    wrong = [
        f"{module} -> {used}"
        for module, path in modules().items()
        for used in imports(path)
        if floor[room(used)] > floor[room(module)] and (room(module), room(used)) not in UPWARDS
    ]
    assert not wrong


def test_no_module_imports_in_a_circle() -> None:
    graph = {module: imports(path) - {module} for module, path in modules().items()}
    for upper, lower in UPWARDS:
        for module in graph:
            if room(module) == upper:
                graph[module] = {used for used in graph[module] if room(used) != lower}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_a_module_that_imports_upwards_is_found(tmp_path: Path) -> None:
    """The check itself: imports within functions count, whichever way they are written."""
    (tmp_path / "one.py").write_text("def f():\n    from offline import cli\n    import offline.run.sweep\n")
    assert imports(tmp_path / "one.py") == {"offline.cli", "offline.run.sweep"}
