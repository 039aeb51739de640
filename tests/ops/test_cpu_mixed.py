"""MoBE's layers in the C++ backend (METHODS 3), against a float64 oracle and the reference, as in test_cpu.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from crowds import same_bits
from hypothesis import given, settings
from mixed_cases import forward, mixed_case, mixed_cases
from moe_cases import CROWDED, crowd
from moe_oracle import kernel_arguments
from test_cpu import DTYPES, in_float64, run

from d2moe_vllm.ops import cpu
from d2moe_vllm.ops.reference import fused_experts
from d2moe_vllm.ops.weights import LayerSpec

Case = tuple[list[Any], LayerSpec]
BIG = {"tokens": 67, "hidden": 192, "intermediate": 80, "num_experts": 8, "rank": (48, 33)}
MIXED = {
    "few bases": {**BIG, "bases": 2},
    "many bases": {**BIG, "bases": 37, "function": "tanh"},
    "many experts in groups": {**BIG, "num_experts": 40, "bases": 10, "groups": 5, "top_k": 3},
    "many rows for an expert": {**BIG, "num_experts": 2, "bases": 2, "rank": (17, 40)},
}
"""Sizes that are multiples of nothing."""


@settings(max_examples=150, deadline=None)
@given(mixed_cases())
def test_float32_equals_the_oracle(case: Case) -> None:
    """Any sizes, functions, groups (whose alphas are zero elsewhere), padding, no token at all."""
    np.testing.assert_allclose(run(*case).double().numpy(), forward(*case), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", MIXED)
def test_rounding_is_no_worse_than_the_reference(dtype: torch.dtype, variant: str) -> None:
    """V is rounded once here, and twice there."""
    arguments, spec = mixed_case(1, dtype, **MIXED[variant])
    exact = torch.from_numpy(forward(arguments, spec))
    outputs = (run(arguments, spec), fused_experts(*arguments, spec))
    errors = [float((y.double() - exact).norm() / exact.norm()) for y in outputs]
    # Of float32's functions 2 ulp are left, where torch's have half of one.
    assert errors[0] <= 1.3 * errors[1] + 2e-7


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", MIXED)
def test_rows_are_the_same_bits_alone_in_a_crowd_and_on_any_number_of_threads(dtype: torch.dtype, variant: str) -> None:
    """Which experts are mixed together, and how rows of V are cut into tasks, depends on both and must not show."""
    arguments, spec = mixed_case(7, dtype, **MIXED[variant])

    def some(rows: torch.Tensor) -> torch.Tensor:
        return run([*(t[rows] for t in arguments[:3]), *arguments[3:]], spec)

    same_bits(some)


@pytest.mark.parametrize("function", ["silu", "tanh"])
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 0.05, 0.2, 30.0])
def test_functions_of_small_and_large_values(function: str, scale: float) -> None:
    """tanh keeps its digits near zero, and neither function overflows."""
    case = mixed_case(3, hidden=48, rank=(8, 8), function=function, scale=scale)
    expected = forward(*case)
    error = np.linalg.norm(run(*case).double().numpy() - expected) / np.linalg.norm(expected)
    assert error < 2e-6


ROUTES = {
    "all tokens to one expert": [[2, 2]] * 70,
    "one expert twice, others never": [[1, 1], [1, 3]] * 10 + [[3, 3]],
    "nobody": [[-1, 7]] * 21,
    "half of them elsewhere": [[-1, 0], [3, -5]] * 10 + [[9, 2]],
    "one token": [[3, 0]],
}


@pytest.mark.parametrize("route", ROUTES)
def test_uneven_routes(route: str) -> None:
    """More rows than a tile for one expert, none for another, ids out of range."""
    arguments, spec = mixed_case(4, tokens=len(ROUTES[route]), hidden=40, rank=(9, 4))
    arguments[2] = torch.tensor(ROUTES[route], dtype=torch.int32)
    found = run(arguments, spec).double().numpy()
    np.testing.assert_allclose(found, forward(arguments, spec), rtol=1e-4, atol=1e-6)


def test_a_basis_that_an_expert_does_not_use_does_not_touch_it() -> None:
    """Bases of another group are not even multiplied by zero: what is in them does not matter, as it may be NaN."""
    arguments, spec = mixed_case(8, tokens=30, num_experts=6, bases=6, groups=3)
    arguments[2] %= 4  # experts of the first two groups
    expected = run(arguments, spec)
    arguments[3].bases[4:] = torch.nan
    assert torch.equal(run(arguments, spec), expected)


def test_expert_parallel_ranks_add_up() -> None:
    """Each has some experts' alphas, A and down; bases are everywhere; others' experts are -1 here."""
    arguments, spec = mixed_case(5, tokens=9, num_experts=6)
    whole, total = run(arguments, spec), torch.zeros(9, 8)
    for own in (slice(0, 2), slice(2, 6)):
        count, w13, w2 = own.stop - own.start, arguments[3], arguments[4]
        ids = arguments[2] - own.start
        parts = [*arguments[:2], ids.masked_fill((ids < 0) | (ids >= count), -1)]
        halves = [w13._replace(alpha=w13.alpha[own], a=w13.a[own]), w2._replace(dense=w2.dense[own])]
        total += run([*parts, *halves, None], spec._replace(num_experts=count))
    torch.testing.assert_close(total, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mixed", ["w13", "w2"])
@pytest.mark.parametrize("variant", [variant for variant in CROWDED if variant != "trimmed"])
def test_beside_a_half_of_another_kind(variant: str, mixed: str, dtype: torch.dtype) -> None:
    """The format lets gate and up be mixed from bases whatever down is, and down be dense whatever gate and up are."""
    arguments, spec = kernel_arguments(crowd(variant, "off"), dtype)
    sizes = {"hidden": 192, "intermediate": 320, "num_experts": 8, "bases": 3, "rank": (20, 37)}
    other, others = mixed_case(9, dtype, **sizes)
    if mixed == "w13":
        arguments[3] = other[3]._replace(a=other[3].a * 192**-0.5)
        spec = spec._replace(w13=others.w13, function="silu")
    else:
        arguments[4] = other[4]
        spec = spec._replace(w2=others.w2)
    exact = fused_experts(*in_float64(arguments), spec)
    outputs = (run(arguments, spec), fused_experts(*arguments, spec))
    errors = [float((y.double() - exact).norm() / exact.norm()) for y in outputs]
    assert errors[0] <= 1.3 * errors[1] + 2e-7


def refused(words: str, change: Any) -> None:
    arguments, spec = mixed_case(1)
    halves = change(*arguments[3:5])
    with pytest.raises(ValueError, match=words):
        cpu.pack(*halves, spec)
    with pytest.raises(ValueError, match=words):
        cpu.fused_experts(*arguments[:3], *halves, None, spec)


def test_what_no_checkpoint_has_is_refused() -> None:
    """Not left out of the sum."""
    refused("bases are for gate and up alone", lambda w13, w2: (w13, w2._replace(bases=w13.bases)))
    refused("bases need a and alpha", lambda w13, w2: (w13._replace(alpha=None), w2))
    refused("bases need a and alpha", lambda w13, w2: (w13._replace(bases=None), w2))


@pytest.mark.parametrize("bases", [1, 3, 4])
def test_packing_takes_no_more_memory_where_sizes_are_multiples(bases: int) -> None:
    """Also with a basis that has no partner for bfloat16's products."""
    sizes = {"hidden": 64, "intermediate": 128, "rank": (16, 32), "bases": bases}
    arguments, spec = mixed_case(2, torch.bfloat16, **sizes)
    packed = cpu.pack(*arguments[3:5], spec)
    for before, after in zip(arguments[3:5], packed, strict=True):
        for old, new in zip(before, after, strict=True):
            assert old is None or (new.data_ptr() == old.data_ptr() and new.numel() == old.numel())


def test_no_v_is_ever_whole() -> None:
    """Memory that a call takes beside the weights, as the system counts it, is a small part of one expert's V of gate
    and up; the reference with whole V's takes all of it, which shows that the measurement would see it."""
    program = Path(__file__).with_name("mixed_memory.py")
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    v, ours, whole = map(int, done.stdout.split())
    assert whole >= v
    assert ours < v / 8
