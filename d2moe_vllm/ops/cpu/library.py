"""The C++ library behind the CPU backend, and its C interface.

The source includes neither torch nor Python and is linked to no OpenMP runtime: it runs on the threads of the one
that torch has loaded.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from d2moe_vllm.ops.cpu.compiler import NATIVE, CompilerError, compile_to, compiled_ahead, native_name

I64, POINTER = ctypes.c_int64, ctypes.c_void_p


class Matrices(ctypes.Structure):
    """`MatricesC` of call.h."""

    _fields_ = [("data", POINTER), ("scales", POINTER), *((name, I64) for name in ("bits", "group", "first", "bytes"))]


class Half(ctypes.Structure):
    """`HalfC` of call.h."""

    _fields_ = [
        *((name, Matrices) for name in ("u", "v", "base", "base_u", "base_v", "bases")),
        ("alpha", POINTER),
        *((name, POINTER) for name in ("columns", "u_index", "v_index", "base_columns", "base_norms", "bias")),
        *((name, I64) for name in ("u_bytes", "kept", "used", "groups", "shared_v", "by_columns", "selects")),
        *((name, I64) for name in ("whole", "mixed", "function", "bias_step")),
        ("rank", I64 * 2),
        ("base_rank", I64 * 2),
    ]


class Call(ctypes.Structure):
    """`CallC` of call.h."""

    _fields_ = [
        ("w13", Half),
        ("w2", Half),
        *((name, POINTER) for name in ("x", "gates", "ids", "padding", "y", "widths", "skipped", "channels")),
        *((name, I64) for name in ("tokens", "top_k", "experts", "hidden", "intermediate")),
        *((name, I64) for name in ("dtype", "scope", "activation", "parts")),
        ("swiglu", ctypes.c_float * 3),
    ]


@cache
def load() -> ctypes.CDLL:
    """The library, compiled first if neither the wheel nor this machine's cache has it. Raises CompilerError."""
    # Into the global scope: our symbols of OpenMP are found in the runtime that torch uses.
    if (runtime := _openmp_runtime()) is not None:
        ctypes.CDLL(str(runtime), ctypes.RTLD_GLOBAL)
    library = _ahead() or _native()
    library.d2moe_fused_experts.argtypes = [ctypes.POINTER(Call)]
    library.d2moe_fused_experts.restype = None
    library.d2moe_packed_size.argtypes = library.d2moe_packed_base_size.argtypes = [I64, I64, I64]
    library.d2moe_packed_size.restype = library.d2moe_packed_base_size.restype = I64
    library.d2moe_codes_size.argtypes = library.d2moe_scales_size.argtypes = [I64] * 5
    library.d2moe_codes_size.restype = library.d2moe_scales_size.restype = I64
    strided: Any = [POINTER, ctypes.POINTER(I64)]
    library.d2moe_pack_codes.argtypes = [I64, I64, I64, I64, *strided, *strided, I64, I64, I64, POINTER, POINTER]
    library.d2moe_pack_codes.restype = None
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


def _ahead() -> ctypes.CDLL | None:
    """What the wheel has for this processor; None where it has nothing that can be loaded here."""
    if (path := compiled_ahead()) is None:
        return None
    try:
        return ctypes.CDLL(str(path))
    except OSError:  # a file system that runs nothing, say, or a file that was cut
        return None


def _native() -> ctypes.CDLL:
    path = _compiled()
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise CompilerError(f"{path} cannot be loaded ({error}); name another folder by D2MOE_CACHE") from None


def _compiled() -> Path:
    """The library's file, compiled by this machine if it has not yet."""
    # Where there is no home (some containers), the name stays as it is: a folder here, or one that cannot be written.
    folder = Path(os.path.expanduser(os.environ.get("D2MOE_CACHE") or "~/.cache/d2moe"))
    target = folder / native_name()
    if target.exists():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / "lock")
        lock.acquire()  # workers start together: one compiles
    except OSError as error:
        raise CompilerError(
            f"{folder} cannot be written ({error.strerror}); name another folder by D2MOE_CACHE"
        ) from None
    try:
        if not target.exists():
            compile_to(target, NATIVE)
    finally:
        lock.release()
    return target
