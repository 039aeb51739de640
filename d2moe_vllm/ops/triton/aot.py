"""Compiles a kernel for an NVIDIA GPU without having one, and reads what it needs there."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple


class Target(NamedTuple):
    """A device that kernels are made for. shared_limit: bytes of shared memory that one block may ask for (CUDA C++
    Programming Guide, table "Technical Specifications per Compute Capability")."""

    capability: int
    shared_limit: int


TARGETS = {
    "sm_80": Target(80, 163 * 1024),
    "sm_90": Target(90, 227 * 1024),
    "sm_100": Target(100, 227 * 1024),
}


class Compiled(NamedTuple):
    """shared_bytes: shared memory of a block. registers: of a thread. spill_bytes: what a thread stores to and loads
    from local memory because registers are too few. tensor_columns: of sm_100's tensor memory, of which there are 512.
    cubin: the machine code, an ELF file."""

    shared_bytes: int
    registers: int
    spill_bytes: int
    tensor_columns: int
    cubin: bytes


def compile_kernel(
    function: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    target: Target,
    *,
    num_warps: int,
    num_stages: int,
    divisible: Collection[str] = (),
) -> Compiled:
    """The machine code of a `triton.jit` function, and what it needs.

    signature: triton's type of each argument that is no constant, as "*bf16" or "i32". constexprs: the others' values.
    divisible: arguments that are multiples of 16, pointers included, as triton specializes them. Raises what triton
    raises, and RuntimeError where the kernels were imported to be interpreted, or ptxas reports nothing.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    if not isinstance(function, JITFunction):
        raise RuntimeError("kernels are interpreted in this process; start it without TRITON_INTERPRET")
    types = {name: "constexpr" if name in constexprs else signature[name] for name in function.arg_names}
    places = {name: place for place, name in enumerate(function.arg_names)}
    aligned: dict[Any, list[list[Any]]] = {(places[name],): [["tt.divisibility", 16]] for name in divisible}
    compiled = triton.compile(
        ASTSource(function, types, dict(constexprs), aligned),
        target=GPUTarget("cuda", target.capability, 32),
        options={"num_warps": num_warps, "num_stages": num_stages},
    )
    return _described(compiled, target)


def _described(compiled: Any, target: Target) -> Compiled:
    report = _assembler_report(compiled.asm["ptx"], target)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    registers = re.search(r"Used (\d+) registers", report)
    if spills is None or registers is None:
        raise RuntimeError(f"ptxas reports no registers: {report.strip()[-300:]}")
    return Compiled(
        shared_bytes=compiled.metadata.shared,
        registers=int(registers[1]),
        spill_bytes=int(spills[1]) + int(spills[2]),
        tensor_columns=compiled.metadata.tmem_size,
        cubin=compiled.asm["cubin"],
    )


def _assembler_report(ptx: str, target: Target) -> str:
    """What ptxas, the one triton brings, says about registers: triton itself throws it away."""
    from triton import knobs
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(ptx)
        # The options triton's backend itself gives.
        options = ["-v", "-lineinfo", "--regAllocOptLevel=2", *(knobs.nvidia.ptxas_options or "").split()]
        architecture = f"--gpu-name={sm_arch_from_capability(target.capability)}"
        command = [get_ptxas(target.capability).path, *options, architecture, str(source), "-o", str(out)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stderr
