"""The C++ backend against the reference and the float64 oracle, and its bits against themselves."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import forks
import numpy as np
import pytest
import torch
from crowds import same_bits
from hypothesis import given, settings
from moe_cases import CROWDED, cases, crowd, random_case
from moe_oracle import Case, forward, kernel_arguments

from d2moe_vllm.ops import choose_backend, cpu
from d2moe_vllm.ops.reference import fused_experts
from d2moe_vllm.ops.weights import LayerSpec, Weights

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def run(arguments: list[Any], spec: LayerSpec, *, int8: bool = False) -> torch.Tensor:
    """Packs copies: packing takes the storage it is given."""
    copies = [Weights(*(None if t is None else t.clone() for t in half)) for half in arguments[3:5]]
    packed = cpu.pack(*copies, spec, int8=int8)
    return cpu.fused_experts(*arguments[:3], *packed, arguments[5], spec, int8=int8)


@settings(max_examples=200, deadline=None)
@given(cases())
def test_float32_equals_the_oracle(case: Case) -> None:
    case.x = case.x.astype(np.float32).astype(np.float64)
    arguments, spec = kernel_arguments(case, torch.float32)
    np.testing.assert_allclose(run(arguments, spec).double().numpy(), forward(case), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scope", ["off", "token", "batch"])
@pytest.mark.parametrize("variant", CROWDED)
def test_rounding_is_no_worse_than_the_reference(dtype: torch.dtype, scope: str, variant: str) -> None:
    arguments, spec = kernel_arguments(crowd(variant, scope), dtype)
    exact = fused_experts(*in_float64(arguments), spec)
    error = [
        float((y.double() - exact).norm() / exact.norm())
        for y in (run(arguments, spec), fused_experts(*arguments, spec))
    ]
    assert error[0] <= 1.3 * error[1] + 1e-7


@pytest.mark.parametrize("scope", ["off", "token", "batch"])
@pytest.mark.parametrize("sizes", [(4352, 40), (40, 4160)], ids=["wide down", "wide gate and up"])
def test_a_base_that_is_folded_at_512_outputs_with_a_part_of_a_fold_left(sizes: tuple[int, int], scope: str) -> None:
    """On any number of threads: they change how the last fold is cut."""
    case = random_case(3, tokens=11, hidden=sizes[0], intermediate=sizes[1], kept=(16, 16), used=(8, 12), scope=scope)
    arguments, spec = kernel_arguments(case, torch.float32)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            result = run(arguments, spec).double().numpy()
            np.testing.assert_allclose(result, forward(case), rtol=1e-3, atol=1e-3)
    finally:
        torch.set_num_threads(before)


def in_float64(arguments: list[Any]) -> list[Any]:
    def widen(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return tensor.double() if tensor is not None and tensor.is_floating_point() else tensor

    halves = [Weights(*map(widen, half))._replace(base_norms=half.base_norms) for half in arguments[3:5]]
    return [*map(widen, arguments[:3]), *halves, arguments[5]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scope", ["token", "off"])
@pytest.mark.parametrize("variant", CROWDED)
def test_rows_are_the_same_bits_alone_in_a_crowd_and_on_any_number_of_threads(
    dtype: torch.dtype, scope: str, variant: str
) -> None:
    arguments, spec = kernel_arguments(crowd(variant, scope), dtype)

    def some(rows: torch.Tensor) -> torch.Tensor:
        return run([*(t[rows] for t in arguments[:3]), *arguments[3:]], spec)

    same_bits(some)


@pytest.mark.parametrize("scope", ["off", "token", "batch"])
@pytest.mark.parametrize("garbage", [np.nan, np.inf, 1e30])
def test_padding_and_absent_experts(scope: str, garbage: float) -> None:
    """Rows of padding influence nobody, whatever is in them; ids out of range are nobody's."""
    case = random_case(1, tokens=9, padding=4, scope=scope)
    clean = run(*kernel_arguments(case, torch.float32))[:5]
    case.x[5:] = garbage
    case.topk_ids[5:] = [[0, 1], [99, 1], [-1, 3], [-7, 2]]
    assert torch.equal(run(*kernel_arguments(case, torch.float32))[:5], clean)
    case.topk_ids[:] = -1
    case.base = dict.fromkeys(case.base)
    arguments, spec = kernel_arguments(case, torch.float32)
    assert not run(arguments, spec)[:5].any()
    assert run([t[:0] for t in arguments[:3]] + arguments[3:5] + [None], spec).shape == (0, 8)


def test_packing_takes_no_more_memory_where_sizes_are_multiples() -> None:
    arguments, spec = kernel_arguments(
        random_case(2, hidden=64, intermediate=128, rank=(16, 32, 16), kept=(32, 48), used=(32, 48)), torch.bfloat16
    )
    packed = cpu.pack(*arguments[3:5], spec)
    for before, after in zip(arguments[3:5], packed, strict=True):
        for old, new in zip(before, after, strict=True):
            assert old is None or (new.data_ptr() == old.data_ptr() and new.numel() == old.numel())


SOURCES = Path(cpu.__file__).with_name("csrc")
DRIVER = Path(__file__).with_name("driver.cpp")


@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_the_core_is_clean_under_sanitizers(tmp_path: Path, sanitizers: str) -> None:
    """In a stand-alone program on plain threads: no access out of bounds, no undefined behaviour, no race."""
    program = tmp_path / "driver"
    flags = ["-std=c++17", "-O1", "-g", "-march=native", "-Wno-psabi", "-pthread", f"-fsanitize={sanitizers}"]
    command = ["c++", *flags, "-fno-sanitize-recover=all", "-I", str(SOURCES), str(DRIVER), "-o", str(program)]
    subprocess.run(command, check=True)
    # vLLM, set up by other tests in this process, may preload libraries, which must not come before the sanitizer's.
    env = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run([program, "60"], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-3000:]
    assert len(done.stdout.splitlines()) == 60


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        (
            {"CXX": "/nowhere/c++"},
            "/nowhere/c++: No such file or directory; install a C++ compiler",
        ),
        ({"CXX": "false"}, "false failed: it says nothing"),
        ({"CXX": "c++ -include no-such-file.h"}, "error: no-such-file.h: No such file or directory"),
        ({"D2MOE_CACHE": "/proc/nowhere"}, "name another folder by D2MOE_CACHE"),
    ],
)
def test_without_a_compiler_it_falls_back_and_says_why(environment: dict[str, str], words: str, tmp_path: Path) -> None:
    code = "from d2moe_vllm.ops import choose_backend; print(*choose_backend('cpu'), sep='|')"
    done = forks.python(code, imports=forks.TORCH, env={"D2MOE_CACHE": str(tmp_path), **environment})
    assert done.returncode == 0, done.stderr
    name, reason = done.stdout.strip().split("|")
    assert name == "reference"
    assert words in reason
    assert "\n" not in reason


def test_a_backend_that_is_asked_for_is_not_replaced() -> None:
    assert choose_backend("cpu") == ("cpu", None)
    assert choose_backend("cpu", "reference") == ("reference", None)
    # Never by itself: it computes something else.
    assert choose_backend("cpu", "cpu-int8") == ("cpu-int8", None)
    assert choose_backend("cuda", "reference") == ("reference", None)
    with pytest.raises(ValueError, match="backend 'cpu' is none of those for this device: triton, reference"):
        choose_backend("cuda", "cpu")
