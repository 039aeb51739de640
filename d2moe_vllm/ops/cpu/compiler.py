"""Compiles csrc/ to the library of the CPU backend: for this machine, or ahead of time for some kinds of machine.

setup.py loads this file by itself, where no package is installed yet: it imports the standard library only.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

SOURCES = Path(__file__).with_name("csrc")
BUILT = Path(__file__).with_name("built")
"""Where a wheel has what was compiled ahead of time."""
FLAGS = "-std=c++17 -O3 -ffp-contract=fast -fno-math-errno -fopenmp -fPIC -Wno-psabi"
NATIVE = "-march=native"

_V3 = frozenset(("avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"))
_V4 = _V3 | {f"avx512{part}" for part in ("f", "bw", "cd", "dq", "vl")}


class Target(NamedTuple):
    """arch: the compiler's flags. needs: of the processor, by Linux's names in /proc/cpuinfo."""

    arch: str
    needs: frozenset[str]


TARGETS: dict[str, dict[str, Target]] = {
    "x86_64": {
        "avx512-bf16": Target("-march=x86-64-v4 -mavx512bf16 -mavx512vnni", _V4 | {"avx512_bf16", "avx512_vnni"}),
        "avx512": Target("-march=x86-64-v4", _V4),
        "avx2": Target("-march=x86-64-v3", _V3),
    }
}
"""What is compiled ahead of time, by `platform.machine()`; by preference."""


class CompilerError(RuntimeError):
    """The library cannot be compiled or loaded here; the message is one line and says what was tried."""


def compiler() -> list[str]:
    """The command that CXX names, or the system's."""
    return shlex.split(os.environ.get("CXX", "")) or [shutil.which("c++") or shutil.which("g++") or "c++"]


def library_name(*what: str) -> str:
    """Of the library from the present sources, and from what else its content depends on."""
    content = hashlib.sha256("\0".join([*what, FLAGS]).encode())
    for source in sorted(SOURCES.iterdir()):
        content.update(source.read_bytes())
    return f"libd2moe-{content.hexdigest()[:16]}.so"


def ahead_name(name: str, target: Target) -> str:
    """Of the library that was compiled ahead of time for a target."""
    return f"{name}-{library_name(target.arch)}"


def compile_to(path: Path, arch: str) -> None:
    """Compile to `path`, whole or not at all, whose folder exists; the sources side by side. Takes a minute or two.
    Raises CompilerError."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        linked = Path(folder) / path.name
        sources = sorted(SOURCES.glob("*.cpp"))
        objects = [Path(folder) / f"{source.stem}.o" for source in sources]
        with ThreadPoolExecutor(len(sources)) as pool:
            flags = (*FLAGS.split(), *arch.split(), "-c")
            list(pool.map(lambda source, made: _run(*flags, source, "-o", made), sources, objects))
        # Without -fopenmp, which would name a runtime to load.
        _run("-shared", *objects, "-o", linked)
        linked.rename(path)


def _run(*arguments: object) -> None:
    command = [*compiler(), *map(str, arguments)]
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True)
    except OSError as error:
        raise CompilerError(f"{command[0]}: {error.strerror}; install a C++ compiler, or name one by CXX") from None
    if done.returncode:
        lines = done.stderr.splitlines()
        why = next((line for line in lines if "error" in line), lines[0] if lines else "it says nothing")
        raise CompilerError(f"{shlex.join(compiler())} failed: {why}")


def compile_ahead(folder: Path, wanted: Iterable[str] | None = None) -> list[Path]:
    """Compile for the targets of this architecture, or for those that are wanted. Raises CompilerError."""
    targets = TARGETS.get(platform.machine(), {})
    made = []
    folder.mkdir(parents=True, exist_ok=True)
    for name in targets if wanted is None else wanted:
        if name not in targets:
            raise CompilerError(
                f"{name!r} is none of the targets of {platform.machine()}: {', '.join(targets) or 'none'}"
            )
        made.append(folder / ahead_name(name, targets[name]))
        compile_to(made[-1], targets[name].arch)
    return made


def compiled_ahead(folder: Path = BUILT) -> Path | None:
    """The best library in a folder that was compiled ahead of time and runs on this processor; None: there is none."""
    able = _processor("flags", "Features")
    for name, target in TARGETS.get(platform.machine(), {}).items():
        path = folder / ahead_name(name, target)
        if target.needs <= able and path.exists():
            return path
    return None


def native_name() -> str:
    """Of the library that is compiled for this machine, by its compiler."""
    return library_name(*compiler(), NATIVE, *sorted(_processor("flags", "Features", "model name")))


def _processor(*fields: str) -> frozenset[str]:
    """The words of these lines of /proc/cpuinfo; where there is none, what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset(platform.processor().split())
    return frozenset(word for line in lines if line.startswith(fields) for word in line.partition(":")[2].split())
