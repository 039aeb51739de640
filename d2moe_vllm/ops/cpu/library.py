"""The C++ library behind the CPU backend: compiled once per machine and source, and its C interface.

The source includes neither torch nor Python and is linked to no OpenMP runtime: it runs on the threads of the one
that torch has loaded. Compiling takes some ten seconds.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

SOURCES = Path(__file__).with_name("csrc")
FLAGS = "-std=c++17 -O3 -march=native -ffp-contract=fast -fno-math-errno -fopenmp -fPIC -Wno-psabi"

I64, POINTER = ctypes.c_int64, ctypes.c_void_p


class Half(ctypes.Structure):
    """`HalfC` of api.cpp."""

    _fields_ = [
        *((name, POINTER) for name in ("u", "v", "base", "base_u", "base_v", "bases", "alpha")),
        *((name, POINTER) for name in ("columns", "u_index", "v_index", "base_columns", "base_norms")),
        *((name, I64) for name in ("u_size", "kept", "used", "groups", "shared_v", "by_columns")),
        *((name, I64) for name in ("whole", "mixed", "function")),
        ("rank", I64 * 2),
        ("base_rank", I64 * 2),
    ]


class Call(ctypes.Structure):
    """`CallC` of api.cpp."""

    _fields_ = [
        ("w13", Half),
        ("w2", Half),
        *((name, POINTER) for name in ("x", "gates", "ids", "padding", "y")),
        *((name, I64) for name in ("tokens", "top_k", "experts", "hidden", "intermediate")),
        *((name, I64) for name in ("dtype", "scope", "activation")),
    ]


class CompilerError(RuntimeError):
    """The library cannot be compiled or loaded here; the message is one line and says what was tried."""


@cache
def load() -> ctypes.CDLL:
    """The library, compiled first if this machine has not compiled this source yet. Raises CompilerError."""
    # Into the global scope: our symbols of OpenMP are found in the runtime that torch uses.
    if (runtime := _openmp_runtime()) is not None:
        ctypes.CDLL(str(runtime), ctypes.RTLD_GLOBAL)
    path = _compiled()
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:  # a file system that runs nothing, say
        raise CompilerError(f"{path} cannot be loaded ({error}); name another folder by D2MOE_CACHE") from None
    library.d2moe_fused_experts.argtypes = [ctypes.POINTER(Call)]
    library.d2moe_fused_experts.restype = None
    library.d2moe_packed_size.argtypes = library.d2moe_packed_base_size.argtypes = [I64, I64, I64]
    library.d2moe_packed_size.restype = library.d2moe_packed_base_size.restype = I64
    library.d2moe_pack_factors.argtypes = [I64, POINTER, ctypes.POINTER(I64), I64, I64, I64, POINTER]
    library.d2moe_pack_factors.restype = None
    library.d2moe_pack_mixed.argtypes = library.d2moe_pack_factors.argtypes
    library.d2moe_pack_mixed.restype = None
    library.d2moe_pack_bases.argtypes = [I64, POINTER, I64, I64, I64, I64, POINTER]
    library.d2moe_pack_bases.restype = None
    library.d2moe_huge_pages.argtypes = [POINTER, I64]
    library.d2moe_huge_pages.restype = None
    return library


def _openmp_runtime() -> Path | None:
    """The OpenMP runtime that comes with torch; None where torch uses the system's."""
    found = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    return found[0] if found else None


def _compiled() -> Path:
    """The library's file, named after all that its content depends on."""
    compiler = shlex.split(os.environ.get("CXX", "")) or [shutil.which("c++") or shutil.which("g++") or "c++"]
    sources = sorted(SOURCES.iterdir())
    content = hashlib.sha256("\0".join([*compiler, FLAGS, _machine()]).encode())
    for source in sources:
        content.update(source.read_bytes())
    # Where there is no home (some containers), the name stays as it is: a folder here, or one that cannot be written.
    folder = Path(os.path.expanduser(os.environ.get("D2MOE_CACHE") or "~/.cache/d2moe"))
    target = folder / f"libd2moe-{content.hexdigest()[:16]}.so"
    if target.exists():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("w")
    except OSError as error:
        raise CompilerError(
            f"{folder} cannot be written ({error.strerror}); name another folder by D2MOE_CACHE"
        ) from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # workers start together: one compiles
        if not target.exists():
            _compile(compiler, target)
    return target


def _compile(compiler: list[str], target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made, linked = Path(folder) / "api.o", Path(folder) / target.name
        for arguments in (
            [*FLAGS.split(), "-c", str(SOURCES / "api.cpp"), "-o", str(made)],
            # Without -fopenmp, which would name a runtime to load.
            ["-shared", str(made), "-o", str(linked)],
        ):
            try:
                done = subprocess.run([*compiler, *arguments], check=False, capture_output=True, text=True)
            except OSError as error:
                raise CompilerError(
                    f"{compiler[0]}: {error.strerror}; install a C++ compiler, or name one by CXX"
                ) from None
            if done.returncode:
                lines = done.stderr.splitlines()
                why = next((line for line in lines if "error" in line), lines[0] if lines else "it says nothing")
                raise CompilerError(f"{shlex.join(compiler)} failed: {why}")
        linked.rename(target)


def _machine() -> str:
    """What -march=native stands for."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
