"""What can be known of commands that cannot be run here: their syntax, options and files, by those who read them."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import typer
import yaml
from compression import ROOT
from dockerfile import stages
from running import commands, words
from serving import parsed

from offline.cli.app import app
from offline.cli.compare import spread

NEEDS = {
    "gpu": r"\bd2moe tune\b|--gpus\b|^vllm serve .*--tensor-parallel-size",
    "docker": r"\bdocker (build|run|compose)\b",
    "cluster": r"\b(kubectl|helm)\b",
    "installs": r"\bpip install\b|^make ",
    "internet": r"--tasks wikitext\b|\bmistralai/",
    "long": r"",
}
"""Marks, and how a block that has one shows that it needs it. `long` is not skipped: it is run in the slow tier."""


def valid_shell(text: str) -> None:
    """AssertionError where bash cannot read it."""
    done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def check(text: str) -> int:
    """Every command of a block, by the parser of the program that it calls; how many. Raises AssertionError."""
    valid_shell(text)
    for command in commands(text):
        arguments = words(command)
        while re.fullmatch(r"[A-Z_0-9]+=.*", arguments[0]):
            arguments.pop(0)
        program = Path(arguments[0]).name
        assert program in CHECKS, f"nobody here can check {command!r}"
        CHECKS[program](arguments[1:])
    return len(commands(text))


def d2moe(arguments: list[str]) -> None:
    """The command and its options exist, and their values are of the right type."""
    name, *rest = spread(arguments)
    known = typer.main.get_command(app).commands
    assert name in known, f"there is no d2moe {name}"
    try:
        known[name].make_context(name, rest)
    except typer.TyperException as error:
        raise AssertionError(f"d2moe {shlex.join(arguments)}: {error.format_message()}") from None


def vllm(arguments: list[str]) -> None:
    assert arguments[0] == "serve", f"vllm {arguments[0]} is not checked"
    parsed(arguments[1:])


def make(arguments: list[str]) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    asked = [word for word in arguments if "=" not in word]
    assert set(asked) <= set(targets), f"make has no target {sorted(set(asked) - set(targets))}"


def pip(arguments: list[str]) -> None:
    """Extras of ours are those of pyproject.toml; files that are named exist."""
    extras = re.findall(r"^([a-z]+) = \[", _section("project.optional-dependencies"), re.MULTILINE)
    for word in arguments:
        if ours := re.fullmatch(r"\.(?:\[([\w,]+)\])?", word):
            assert set((ours[1] or "").split(",")) - {""} <= set(extras), word
        elif "/" in word:
            assert (ROOT / word).exists(), word


def _section(name: str) -> str:
    return (ROOT / "pyproject.toml").read_text().partition(f"[{name}]")[2].partition("\n[")[0]


def docker(arguments: list[str]) -> None:
    """Targets are the Dockerfile's, Compose files exist, and what a container is given its entry point can read."""
    verb, *rest = arguments
    if verb == "build":
        targets = [rest[at + 1] for at, word in enumerate(rest) if word == "--target"]
        assert set(targets) <= set(stages()[1]), targets
    elif verb == "compose":
        files = [rest[at + 1] for at, word in enumerate(rest) if word == "-f"]
        assert files, "which compose file?"
        assert all((ROOT / name).exists() for name in files), files
    else:
        assert verb == "run", verb
        image = next(at for at, word in enumerate(rest) if word.startswith("d2moe-") and ":" not in word)
        (d2moe if rest[image] == "d2moe-compressor" else parsed)(rest[image + 1 :])


def kubectl(arguments: list[str]) -> None:
    """Folders that are applied have a kustomization, objects that are named exist in one."""
    for at, word in enumerate(arguments):
        if word == "-k":
            assert (ROOT / arguments[at + 1] / "kustomization.yaml").exists(), arguments[at + 1]
        if word.startswith("job/"):
            assert word.removeprefix("job/") in _jobs(), word


def _jobs() -> set[str]:
    files = (ROOT / "deploy" / "kubernetes").rglob("*.yaml")
    found = (part for file in files for part in yaml.safe_load_all(file.read_text()) if isinstance(part, dict))
    return {part["metadata"]["name"] for part in found if part.get("kind") == "Job"}


def uv(arguments: list[str]) -> None:
    assert arguments[0] == "pip", arguments
    pip(arguments[1:])


def curl(arguments: list[str]) -> None:
    assert any("://" in word for word in arguments)


def python(arguments: list[str]) -> None:
    """Modules that are run are there."""
    assert arguments[0] == "-m", arguments
    assert (ROOT / f"{arguments[1].replace('.', '/')}.py").exists(), arguments[1]


def lm_eval(arguments: list[str]) -> None:
    assert arguments[0] == "run", arguments


CHECKS = {
    "d2moe": d2moe, "vllm": vllm, "make": make, "pip": pip, "uv": uv, "docker": docker, "kubectl": kubectl,
    "curl": curl, "python": python, "lm-eval": lm_eval,
}  # fmt: skip
