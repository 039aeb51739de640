"""Runs the commands of a document, and compares what a session shows with what they print."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path

from compression import d2moe_here
from reader import PORT, WORDS

SHELL_ONLY = re.compile(r"[|;&<>()`$]")
"""What only a shell understands, once quoted text is gone."""


@dataclass(frozen=True)
class Outcome:
    """What a reader sees: stdout, and of stderr the lines that begin with `d2moe:`; the rest of it is progress."""

    code: int
    stdout: str
    stderr: str

    @property
    def shown(self) -> list[str]:
        errors = [line for line in self.stderr.splitlines() if line.startswith("d2moe:")]
        return [*self.stdout.splitlines(), *errors]


def commands(text: str) -> list[str]:
    """The lines of a block, continued ones joined, without comments and empty ones."""
    joined = re.sub(r"\\\n\s*", "", text)
    return [line.strip() for line in joined.split("\n") if line.strip() and not line.lstrip().startswith("#")]


INSTALLS = re.compile(r"\bpip3? install\b|^make ", re.MULTILINE)


def words(command: str) -> list[str]:
    """A command's words, the comment behind it left out, placeholders filled in."""
    return [WORDS.get(word, word) for word in shlex.split(command, comments=True)]


def run(command: str, folder: Path, port: int | None = None, env: Mapping[str, str] | None = None) -> Outcome:
    """One command in the reader's folder: d2moe's own in this process, all others in bash."""
    assert not INSTALLS.search(command), f"{command}: it would change what runs these tests; mark its block `installs`"
    unquoted = re.sub(r"'[^']*'|\"[^\"$`]*\"|#.*", "", command)
    if command.startswith("d2moe ") and not SHELL_ONLY.search(unquoted):
        with chdir(folder):
            done = d2moe_here(*words(command)[1:])
    else:
        if port:
            command = command.replace(PORT, f"127.0.0.1:{port}")
        scripts = Path(sys.executable).parent
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command],
            cwd=folder, capture_output=True, text=True, check=False, timeout=900,
            env={**os.environ, "PATH": f"{scripts}:{os.environ['PATH']}", **(env or {})},
        )  # fmt: skip
    return Outcome(done.returncode, done.stdout, done.stderr)


def steps(session: str) -> list[tuple[str, list[str]]]:
    """The commands of a session, `$ command`, each with the lines that it is said to print."""
    found: list[tuple[str, list[str]]] = []
    for line in session.split("\n"):
        if line.startswith("$ "):
            found.append((line[2:], []))
        else:
            found[-1][1].append(line)
    return [(command, "\n".join(lines).strip("\n").split("\n")) for command, lines in found]


def shape(line: str) -> str:
    """A line with every number as `#` and every run of blanks as one."""
    return re.sub(r"\d[\d,.]*", "#", " ".join(line.split())).removesuffix("|")


def difference(expected: list[str], shown: list[str]) -> str | None:
    """Why a command's output has not the shape of a document's lines; None if it has.

    Lines are compared by their words, whatever the numbers. `...` on a line of its own stands for any lines, at the end
    of a line for its rest.
    """
    pattern = ""
    for line in expected:
        if line.strip() == "...":
            pattern += r"(?:.*\n)*?"
            continue
        cut = line.rstrip().endswith("...")
        pattern += re.escape(shape(line.rstrip().removesuffix("...") if cut else line)) + (r".*\n" if cut else r"\n")
    actual = "".join(f"{shape(line)}\n" for line in shown)
    if re.fullmatch(pattern, actual):
        return None
    return "the document shows\n  " + "\n  ".join(expected) + "\nand the command printed\n  " + "\n  ".join(shown)
