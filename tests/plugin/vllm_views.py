"""Two ways to look a name of vLLM up: in the installed package, and in source that is not imported."""

from __future__ import annotations

import ast
import copy
import dis
import enum
import importlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any, get_args

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef | ast.Assign | ast.AnnAssign
Reader = Callable[[str], "tuple[str, bool] | None"]


@dataclass
class Described:
    """What contract.Use speaks of; parameters are those of a function, or of a class's __init__."""

    parameters: tuple[str, ...] = ()
    attributes: set[str] = field(default_factory=set)
    properties: set[str] = field(default_factory=set)
    methods: dict[str, tuple[str, ...]] = field(default_factory=dict)
    values: set[str] = field(default_factory=set)


class MissingError(Exception):
    """There is no such name."""


def installed(name: str) -> Described:
    """By import and inspection. Raises MissingError."""
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise MissingError(f"{name}: {error}") from None
    if inspect.isclass(found):
        return _installed_class(found)
    if inspect.isroutine(found):
        return Described(parameters=tuple(inspect.signature(found).parameters))
    if isinstance(found, str):
        return Described(values={found})
    return Described(values={str(value) for value in (found if isinstance(found, dict) else get_args(found))})


def _installed_class(cls: type) -> Described:
    described = Described()
    for base in reversed(cls.__mro__):
        described.attributes |= set(base.__dict__) | set(inspect.get_annotations(base))
        if inspect.isfunction(init := base.__dict__.get("__init__")):
            stores = (step.argval for step in dis.get_instructions(init) if step.opname == "STORE_ATTR")
            described.attributes |= set(stores)
        for name, member in base.__dict__.items():
            described.properties.discard(name)
            if isinstance(member, property):
                described.properties.add(name)
            elif callable(function := getattr(member, "__func__", member)) and not inspect.isclass(function):
                with_signature = inspect.isfunction(function)
                described.methods[name] = tuple(inspect.signature(function).parameters) if with_signature else ()
    described.parameters = described.methods["__init__"]
    if issubclass(cls, enum.Enum):
        described.values = {str(member.value) for member in cls}
    return described


class Source:
    """By syntax alone: definitions, and imports followed to them, in vLLM's own modules."""

    def __init__(self, read: Reader) -> None:
        """read: "vllm.config" -> (source, whether it is a package's __init__), None where there is no such module."""
        self._module = cache(lambda name: None if (found := read(name)) is None else (ast.parse(found[0]), found[1]))

    def __call__(self, name: str) -> Described:
        """Raises MissingError."""
        module, node = self.find(name)
        if isinstance(node, ast.ClassDef):
            return self._class(module, node)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return Described(parameters=_parameters(node))
        if isinstance(node.value, ast.Dict):
            return Described(values=_strings(key for key in node.value.keys if key))
        return Described(values=_strings(ast.walk(node.value) if node.value else ()))

    def code(self, name: str, member: str) -> str:
        """Normalised code, without docstrings, of a function (member "") or a class's method. Raises MissingError."""
        module, node = self.find(name)
        if member:
            methods = [n for _, c in self._bases(module, node) for n in c.body if getattr(n, "name", "") == member]
            if not methods:
                raise MissingError(f"{name}.{member}: not defined")
            node = methods[0]
        stripped = copy.deepcopy(node)
        for inner in ast.walk(stripped):
            if isinstance(inner, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(inner) is not None:
                inner.body = inner.body[1:] or [ast.Pass()]
        return ast.unparse(stripped)

    def find(self, name: str) -> tuple[str, Definition]:
        """(module, node) of the definition. Raises MissingError."""
        module, _, attribute = name.rpartition(".")
        found = self._module(module)
        if found is None:
            raise MissingError(f"{name}: no module {module}")
        tree, is_package = found
        for node in reversed(list(_top_level(tree.body))):
            if isinstance(node, ast.ImportFrom):
                origin = _origin(node, module, is_package)
                for alias in node.names:
                    if (alias.asname or alias.name) == attribute and origin.split(".")[0] == "vllm":
                        return self.find(f"{origin}.{alias.name}")
            elif attribute in _names(node):
                return module, node
        raise MissingError(f"{name}: {module} has no {attribute}")

    def _bases(self, module: str, node: Any) -> Iterator[tuple[str, ast.ClassDef]]:
        """The class and its base classes of vLLM's, nearest first."""
        if not isinstance(node, ast.ClassDef):
            raise MissingError(f"{module}: {_names(node)} is not a class")
        yield module, node
        for base in node.bases:
            try:
                yield from self._bases(*self.find(f"{module}.{ast.unparse(base)}"))
            except MissingError:
                continue  # torch's, typing's and the like

    def _class(self, module: str, node: ast.ClassDef) -> Described:
        described = Described()
        for _, cls in reversed(list(self._bases(module, node))):
            for member in cls.body:
                described.attributes |= _names(member)
                if isinstance(member, ast.Assign) and isinstance(member.value, ast.Constant):
                    described.values.add(str(member.value.value))
                if isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef):
                    self._method(described, member)
        described.parameters = described.methods.get("__init__", ())
        return described

    @staticmethod
    def _method(described: Described, method: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        described.properties.discard(method.name)
        decorators = {ast.unparse(decorator).split("(")[0] for decorator in method.decorator_list}
        if decorators & {"property", "cached_property"}:
            described.properties.add(method.name)
        described.methods[method.name] = _parameters(method)
        if method.name == "__init__":
            described.attributes |= {
                target.attr
                for target in ast.walk(method)
                if isinstance(target, ast.Attribute) and isinstance(target.ctx, ast.Store)
            }


def _top_level(body: list[ast.stmt]) -> Iterator[Any]:
    """Statements of a module, those under `if` and `try` included."""
    for node in body:
        if isinstance(node, ast.If | ast.Try):
            yield from _top_level([*node.body, *node.orelse])
        elif isinstance(node, Definition | ast.ImportFrom):
            yield node


def _origin(node: ast.ImportFrom, module: str, is_package: bool) -> str:
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    package = parts[: len(parts) - node.level + is_package]
    return ".".join([*package, *([node.module] if node.module else [])])


def _names(node: ast.AST) -> set[str]:
    if isinstance(node, ast.Assign):
        return {target.id for target in node.targets if isinstance(target, ast.Name)}
    if isinstance(node, ast.AnnAssign):
        return {node.target.id} if isinstance(node.target, ast.Name) else set()
    return {name} if (name := getattr(node, "name", None)) else set()


def _parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> tuple[str, ...]:
    arguments = node.args
    named = [*arguments.posonlyargs, *arguments.args, arguments.vararg, *arguments.kwonlyargs, arguments.kwarg]
    return tuple(argument.arg for argument in named if argument)


def _strings(nodes: Any) -> set[str]:
    return {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
