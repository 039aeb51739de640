"""What compose files and manifests hand to `vllm serve`, read by vLLM's own parser."""

from __future__ import annotations

import argparse
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml


@functools.cache
def _parser() -> Any:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return make_arg_parser(FlexibleArgumentParser())


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """As `vllm serve` reads and checks them; AssertionError where it would refuse."""
    from vllm.entrypoints.launchers.cli_args import validate_parsed_serve_args

    try:
        found = _parser().parse_args([*arguments])
    except SystemExit as stop:
        raise AssertionError(f"vLLM refuses {' '.join(arguments)}") from stop
    validate_parsed_serve_args(found)
    return found


def interpolated(text: str, values: Mapping[str, str]) -> str:
    """${NAME}, ${NAME:-default} and ${NAME:?why} as Compose puts values in; raises KeyError(why) for the last."""

    def value(found: re.Match[str]) -> str:
        name, kind, rest = found[1], found[2], found[3]
        if values.get(name):
            return values[name]
        if kind == ":-":
            return rest
        raise KeyError(rest or name)

    return re.sub(r"\$\{(\w+)(?:(:-|:\?)([^}]*))?\}", value, text)


def compose(text: str, values: Mapping[str, str]) -> dict[str, Any]:
    """A compose file with values put in; every scalar stays what YAML made of it."""

    def walk(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: walk(below) for key, below in node.items()}
        if isinstance(node, list):
            return [walk(below) for below in node]
        return interpolated(node, values) if isinstance(node, str) else node

    return walk(yaml.safe_load(text))
