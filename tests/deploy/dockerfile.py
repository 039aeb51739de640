"""Reads a Dockerfile: stages, their instructions, and variables put in. Knows what ours uses and refuses the rest."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "Dockerfile"
KNOWN = ("ARG", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "HEALTHCHECK", "RUN", "USER", "WORKDIR")


@dataclass(frozen=True)
class Stage:
    """base: as `docker build` would see it, defaults of the build arguments put in."""

    name: str
    base: str
    instructions: tuple[tuple[str, str], ...]

    def last(self, keyword: str) -> str:
        """The value that holds in the image. Raises KeyError where the stage does not set it."""
        return dict(self.instructions)[keyword]


@dataclass(frozen=True)
class Mount:
    """One `RUN --mount=type=bind`: source: in the stage `stage`, or in the build context where that is None."""

    stage: str | None
    source: str
    target: str


def put_in(text: str, values: Mapping[str, str]) -> str:
    """$NAME and ${NAME} by value; raises KeyError for an unknown one."""
    return re.sub(r"\$\{(\w+)\}|\$(\w+)", lambda found: values[found[1] or found[2]], text)


def assignments(rest: str, values: Mapping[str, str]) -> dict[str, str]:
    """`A=1 B="two"` of ARG and ENV; an ARG without a value takes the global one."""
    found = {}
    for word in shlex.split(rest):
        name, equals, value = word.partition("=")
        found[name] = put_in(value, values) if equals else values[name]
    return found


def instructions(path: Path = DOCKERFILE) -> list[tuple[str, str]]:
    text = "\n".join(line for line in path.read_text().splitlines() if not line.lstrip().startswith("#"))
    joined = re.sub(r"\\\n\s*", " ", text)
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in joined.splitlines() if line.strip()]


def stages(path: Path = DOCKERFILE) -> tuple[dict[str, str], dict[str, Stage]]:
    """(global build arguments, stages by name in their order). Raises ValueError for what it does not know."""
    build_args: dict[str, str] = {}
    found: dict[str, tuple[str, list[tuple[str, str]]]] = {}
    name = None
    for keyword, rest in instructions(path):
        if keyword == "FROM":
            base, _, name = rest.split()
            found[name] = (put_in(base, build_args), [])
        elif keyword not in KNOWN:
            raise ValueError(f"{path.name}: {keyword} is not known here")
        elif name is None:
            build_args |= assignments(rest, build_args)
        else:
            found[name][1].append((keyword, rest))
    return build_args, {name: Stage(name, base, tuple(lines)) for name, (base, lines) in found.items()}


def mounts(command: str) -> tuple[list[Mount], str]:
    """Of a RUN: its bind mounts, and the shell command behind them."""
    found = []
    while command.startswith("--mount="):
        option, command = command.split(None, 1)
        fields = dict(field.split("=", 1) for field in option.removeprefix("--mount=").split(","))
        if fields.pop("type") != "bind":
            raise ValueError(f"{option}: only bind mounts are known here")
        found.append(Mount(fields.pop("from", None), fields.pop("source"), fields.pop("target")))
        if fields:
            raise ValueError(f"{option}: {sorted(fields)} are not known here")
    return found, command
