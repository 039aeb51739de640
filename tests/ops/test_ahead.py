"""The CPU backend's library compiled ahead of time: what a wheel has, and which of it is used."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from d2moe_vllm.ops.cpu import compiler, library

ROOT = Path(__file__).resolve().parents[2]
TARGETS = compiler.TARGETS.get(platform.machine(), {})
# What this machine can run of them.
ABLE = [name for name, target in TARGETS.items() if target.needs <= compiler._processor("flags", "Features")]
WITHOUT_COMPILER = {"CXX": "/nowhere/c++", "D2MOE_CACHE": "/proc/nowhere"}

pytestmark = pytest.mark.skipif(not ABLE, reason="nothing is compiled ahead of time for this processor")

# Every variant of the format, against the float64 oracle; of few bits also rows in other company, bit by bit.
CHECK = """
import dataclasses, numpy, torch
import few_cases
from test_cpu_few import LAYERS
from moe_cases import CROWDED, crowd
from moe_oracle import forward, kernel_arguments
from d2moe_vllm.ops import choose_backend, cpu
from d2moe_vllm.ops.cpu import compiler, library
from d2moe_vllm.ops.weights import Weights
print(*choose_backend("cpu"), compiler.compiled_ahead())
for variant in CROWDED:
    for dtype, near in ((torch.float32, 1e-3), (torch.bfloat16, 0.05)):
        case = crowd(variant, "off")
        arguments, spec = kernel_arguments(case, dtype)
        packed = cpu.pack(*arguments[3:5], spec)
        y = cpu.fused_experts(*arguments[:3], *packed, arguments[5], spec).double().numpy()
        exact = forward(case)
        assert numpy.linalg.norm(y - exact) <= near * numpy.linalg.norm(exact), (variant, dtype)
for name, few in LAYERS.items():
    for dtype, near in ((torch.float32, 1e-5), (torch.float16, 4e-3), (torch.bfloat16, 0.02)):
        few = dataclasses.replace(few, dtype=dtype)
        made = few_cases.make(few)
        arguments, spec = made.arguments, made.spec
        packed = cpu.pack(*arguments[3:5], spec)
        y = cpu.fused_experts(*arguments[:3], *packed, arguments[5], spec).double().numpy()
        exact = few_cases.forward(few, made)
        assert numpy.linalg.norm(y - exact) <= near * numpy.linalg.norm(exact), (name, dtype)
        some = torch.tensor([5, 17, 66])
        few_rows = cpu.fused_experts(*(t[some] for t in arguments[:3]), *packed, None, spec)
        assert numpy.array_equal(few_rows.double().numpy(), y[some.numpy()]), (name, dtype)
"""


def wheel(folder: Path, ahead: str) -> tuple[Path, Path]:
    """A wheel's file, and where it is unpacked. Built from a copy: setuptools works in the source's folder."""
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("d2moe_vllm", "offline"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, source]
    subprocess.run(command, check=True, env={**os.environ, "D2MOE_AHEAD": ahead})
    (file,) = folder.glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        archive.extractall(folder / "installed")
    return file, folder / "installed"


def check(installed: Path) -> str:
    """What serves and why, and the library's path; the results are right."""
    paths = os.pathsep.join([str(installed), str(ROOT / "tests" / "ops"), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, "-c", CHECK], capture_output=True, text=True, check=False, cwd="/",
        env={**os.environ, **WITHOUT_COMPILER, "PYTHONPATH": paths},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_a_wheel_with_a_library_serves_without_a_compiler(tmp_path: Path) -> None:
    """The least of the targets, so that AVX2's code computes something, too. Any Python will do, this platform only."""
    name = ABLE[-1]
    file, installed = wheel(tmp_path, name)
    assert "-py3-none-" in file.name
    assert platform.machine() in file.name
    assert check(installed).startswith(f"cpu None {installed}/d2moe_vllm/ops/cpu/built/{name}-libd2moe-")
    # Of other sources it is not used.
    with (installed / "d2moe_vllm" / "ops" / "cpu" / "csrc" / "api.cpp").open("a") as source:
        source.write("// changed\n")
    code = "from d2moe_vllm.ops import choose_backend; print(choose_backend('cpu'))"
    environment = {**os.environ, **WITHOUT_COMPILER, "PYTHONPATH": str(installed)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert "'reference', \"backend 'cpu' cannot be used" in done.stdout


@pytest.mark.slow
def test_a_wheel_with_all_libraries_uses_the_best(tmp_path: Path) -> None:
    _, installed = wheel(tmp_path, "1")
    built = installed / "d2moe_vllm" / "ops" / "cpu" / "built"
    assert sorted(file.name.partition("-libd2moe")[0] for file in built.iterdir()) == sorted(TARGETS)
    for name in ABLE:
        assert f"/built/{name}-libd2moe-" in check(installed)
        next(built.glob(f"{name}-libd2moe-*")).unlink()


def test_a_wheel_without_the_switch_is_pure(tmp_path: Path) -> None:
    file, installed = wheel(tmp_path, "")
    assert file.name.endswith("-py3-none-any.whl")
    assert not (installed / "d2moe_vllm" / "ops" / "cpu" / "built").exists()


def test_an_unknown_target_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        compiler.CompilerError, match=r"'avx1024' is none of the targets of \w+: avx512-bf16, avx512, avx2"
    ):
        compiler.compile_ahead(tmp_path, ["avx1024"])
    assert not list(tmp_path.iterdir())


def test_a_library_that_cannot_be_loaded_is_compiled_instead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By this machine's compiler, or from its cache."""
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"no library")
    monkeypatch.setattr(library, "compiled_ahead", lambda: broken)
    assert library._ahead() is None
    library.load.cache_clear()
    assert library.load().d2moe_packed_size(0, 16, 8) == 16 * 8
    library.load.cache_clear()
