"""Compiles kernels for NVIDIA GPUs without having one, and reads what they need there.

`record` finds what a call would launch, specialized as triton itself does it, without launching or compiling anything:
its tensors may be on the meta device, and so as large as they like. `compile_launch` makes machine code of it.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
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
TENSOR_COLUMNS = 512
"""Of tensor memory on sm_100."""


@dataclass(frozen=True)
class Launch:
    """One kernel with all that its machine code depends on.

    function: triton's JITFunction. signature: triton's type of each argument. constants: values by place. attributes:
    what is known of arguments, by place (multiples of 16).
    """

    function: Any
    signature: dict[str, str]
    constants: dict[Any, Any]
    attributes: dict[Any, Any]
    num_warps: int
    num_stages: int

    @property
    def name(self) -> str:
        return str(self.function.__name__)

    def __str__(self) -> str:
        names = list(self.signature)
        constants = ", ".join(f"{names[place[0]]}={value}" for place, value in self.constants.items())
        types = ", ".join(f"{name}: {kind}" for name, kind in self.signature.items() if kind != "constexpr")
        return f"{self.name}({types}; {constants}; {self.num_warps} warps, {self.num_stages} stages)"


class Compiled(NamedTuple):
    """shared_bytes: shared memory of a block. registers: of a thread. spill_bytes: what a thread stores to and loads
    from local memory because registers are too few. tensor_columns: of tensor memory. cubin: the code, an ELF file."""

    shared_bytes: int
    registers: int
    spill_bytes: int
    tensor_columns: int
    cubin: bytes

    def refused_by(self, target: Target) -> str | None:
        """Why it would not run there, or not as it should, in a few words; None if it does."""
        if self.shared_bytes > target.shared_limit:
            return f"{self.shared_bytes} bytes of shared memory, {target.shared_limit} are there"
        if self.tensor_columns > TENSOR_COLUMNS:
            return f"{self.tensor_columns} columns of tensor memory, {TENSOR_COLUMNS} are there"
        return f"{self.spill_bytes} bytes of spilled registers" if self.spill_bytes else None


def record(call: Callable[[], Any], target: Target) -> list[Launch]:
    """What `call` launches on a device of this kind, each different kernel once, in order of its first launch.

    Nothing is computed: what `call` returns has undefined values. Not for several threads at once. Raises RuntimeError
    where kernels are interpreted in this process.
    """
    from triton import knobs
    from triton.runtime.driver import driver

    if knobs.runtime.interpret:
        raise RuntimeError("kernels are interpreted in this process; start it without TRITON_INTERPRET")
    launches: dict[str, Launch] = {}

    def keep(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        launch = Launch(
            fn.jit_function,
            compile["signature"],
            compile["constants"],
            compile["configs"][0],
            compile["num_warps"],
            compile["num_stages"],
        )
        launches.setdefault(f"{launch} {launch.attributes}", launch)
        return True  # neither to be compiled nor launched

    before, knobs.runtime.jit_cache_hook = knobs.runtime.jit_cache_hook, keep
    driver.set_active(_driver(target))
    try:
        call()
    finally:
        knobs.runtime.jit_cache_hook = before
        driver.set_active(None)  # the machine's own is found again when it is asked for
    return list(launches.values())


def compile_launch(launch: Launch, target: Target) -> Compiled:
    """Machine code for the target, and what it needs. Raises what triton raises."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    compiled = triton.compile(
        ASTSource(launch.function, launch.signature, launch.constants, launch.attributes),
        target=GPUTarget("cuda", target.capability, 32),
        options={"num_warps": launch.num_warps, "num_stages": launch.num_stages},
    )
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
    """What ptxas, the one that triton brings, says about registers: triton itself throws it away."""
    from triton import knobs
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(ptx)
        # The options that triton's backend gives.
        options = ["-v", "-lineinfo", "--regAllocOptLevel=2", *(knobs.nvidia.ptxas_options or "").split()]
        architecture = f"--gpu-name={sm_arch_from_capability(target.capability)}"
        command = [get_ptxas(target.capability).path, *options, architecture, str(source), "-o", str(out)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stderr


def _driver(target: Target) -> Any:
    """As much of a driver as triton asks before it compiles."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase

    class Absent(DriverBase):
        is_active = classmethod(lambda cls: True)

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", target.capability, 32)

        def get_current_device(self) -> tuple[str, int]:
            # Triton keeps what it knows of a kernel by device: not under the number of a real one.
            return ("absent", target.capability)

        def get_current_stream(self, device: object) -> int:
            return 0

        def map_python_to_cpp_type(self, ty: str) -> str:
            raise NotImplementedError

        def get_active_torch_device(self) -> object:
            raise NotImplementedError

        def get_benchmarker(self) -> Any:
            raise NotImplementedError

    return Absent()
