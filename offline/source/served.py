"""What vLLM serves, read from its files: importing it takes seconds, and neither planning nor compressing needs it."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

REGISTRY = Path("model_executor", "models", "registry.py")
OWN = ("_TEXT_GENERATION_MODELS", "_MULTIMODAL_MODELS")
"""Its tables of the classes that are vLLM's."""
FOREIGN = ("_TRANSFORMERS_SUPPORTED_MODELS", "_TRANSFORMERS_BACKEND_MODELS")
"""And of those that it has transformers run, which d2moe's plugin refuses."""


def served_by(config: Mapping[str, Any]) -> str:
    """One line: whether the vLLM that is installed has a class of a config.json's `architectures`."""
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None
    if name is None:
        return "config.json says no architectures, by which vLLM finds the class that serves a model"
    tables = _tables()
    if tables is None:
        return f"whether vLLM has a class {name} is not known here, where vLLM is not installed or is another release"
    release = f"vLLM {importlib.metadata.version('vllm')}"
    if name in tables[0]:
        return f"{release} has a class {name}; whether its loader knows the experts' names, its first start says"
    if name in tables[1]:
        return f"{release} has no class {name} of its own, only transformers', in which d2moe's layers cannot be served"
    return f"{release} has no class {name} and will not serve the result; transformers will"


def _tables() -> tuple[frozenset[str], frozenset[str]] | None:
    """Architectures in OWN and in FOREIGN; None where there is no such file, or not as expected."""
    spec = importlib.util.find_spec("vllm")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    found: dict[str, frozenset[str]] = {}
    try:
        tree = ast.parse((Path(folders[0]) / REGISTRY).read_text(encoding="utf-8"))
        importlib.metadata.version("vllm")
    except (IndexError, OSError, SyntaxError, importlib.metadata.PackageNotFoundError):
        return None
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict) and isinstance(node.targets[0], ast.Name):
            keys = (key.value for key in node.value.keys if isinstance(key, ast.Constant))
            found[node.targets[0].id] = frozenset(key for key in keys if isinstance(key, str))
    if any(table not in found for table in OWN):
        return None
    own, foreign = ([found.get(table, frozenset()) for table in tables] for tables in (OWN, FOREIGN))
    return frozenset().union(*own), frozenset().union(*foreign)
