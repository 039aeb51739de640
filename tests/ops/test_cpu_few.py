"""Few bits and unequal widths in the C++ backend, against a float64 oracle and the reference, as in test_cpu.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from crowds import same_bits
from few_cases import Few, few_cases, forward, lowest_codes, make, mixed_few
from hypothesis import given, settings
from moe_cases import SWIGLU
from test_cpu import DTYPES, run

from d2moe_vllm.ops import cpu
from d2moe_vllm.ops.reference import fused_experts
from d2moe_vllm.ops.weights import Weights

BIG = Few(
    11, tokens=67, hidden=192, intermediate=320, experts=8, absent=0.1, ranks=(48, 33, 40), base_ranks=(40, 40, 24)
)
UNEQUAL: dict[str, Any] = {
    "widths": (320, 16, 0, 37, 150, 208, 1, 112),
    # On the second rank or a later one, whose groups the first may have begun, in the middle of a byte, too.
    "skipped": (0, 5, 0, 37, 64, 31, 9, 128),
}
COLUMNS: dict[str, Any] = {"base": "columns", "groups": 4, "kept": (40, 60), "used": (20, 31)}
LAYERS: dict[str, Few] = {
    **{
        f"{bits} bits by {group}": replace(BIG, storages=((bits, group), (bits, group)))
        for bits, group in (
            (8, 64),
            (4, 64),
            (3, 64),
            (2, 64),
            (8, 128),
            (4, 32),
            (3, 32),
            (2, 128),
            (8, 512),
            (3, 512),
        )
    },
    "not packed": replace(BIG, storages=(None, None)),
    "a group that another rank began": replace(BIG, storages=((8, 64), (2, 64)), delta_first=147),
    "unequal widths": replace(BIG, storages=((3, 64), (4, 32)), **UNEQUAL),
    "unequal widths, eight bits and two": replace(BIG, storages=((8, 64), (2, 64)), **UNEQUAL),
    "unequal widths, three bits": replace(BIG, storages=((2, 32), (3, 64)), **UNEQUAL),
    "unequal widths, not packed": replace(BIG, storages=(None, None), **UNEQUAL),
    "on a base": replace(BIG, storages=((2, 64), (2, 64)), base="full", base_storage=(4, 64), base_first=32),
    "on a base, unequal widths": replace(
        BIG, storages=((2, 64), (3, 64)), base="full", base_storage=(4, 64), without=(3,), base_first=77, **UNEQUAL
    ),
    "on a base of 16 bits, unequal widths": replace(BIG, storages=((2, 64), (2, 64)), base="full", **UNEQUAL),
    "on a base of columns": replace(BIG, storages=((3, 64), (2, 64)), base_storage=(4, 64), without=(1, 5), **COLUMNS),
    "on a low-rank base": replace(BIG, storages=((4, 64), (8, 64)), base="low rank", base_storage=(4, 32)),
    "factors": replace(BIG, delta="factors", storages=((8, 64), (4, 32)), base_storage=(8, 64), **COLUMNS),
    "factors, unequal widths": replace(BIG, delta="factors", storages=((8, 64), (3, 64)), **UNEQUAL),
    "shared V": replace(BIG, delta="shared V", storages=((2, 64), (8, 128))),
    "columns": replace(BIG, delta="columns", storages=((4, 32), (8, 64)), delta_first=45),
    "biases": replace(BIG, storages=((4, 64), (3, 64)), biased=True, swiglu=SWIGLU),
    "biases, on a base, unequal widths": replace(
        BIG, storages=((2, 64), (3, 64)), base="full", without=(3,), biased=True, swiglu=SWIGLU, **UNEQUAL
    ),
    **{
        f"no gate, {bits} bits": replace(BIG, storages=((bits, 64), (bits, 64)), gate=False, activation="relu2")
        for bits in (8, 4, 3, 2)
    },
    "no gate, not packed": replace(BIG, storages=(None, None), gate=False, activation="relu2"),
    "no gate, on a base, unequal widths": replace(
        BIG,
        storages=((2, 64), (3, 64)),
        base="full",
        base_storage=(4, 64),
        without=(3,),
        base_first=77,
        gate=False,
        activation="relu2",
        **UNEQUAL,
    ),
    "no gate, unequal widths, biases": replace(
        BIG, storages=((3, 64), (4, 32)), gate=False, activation="relu2", biased=True, **UNEQUAL
    ),
    "no gate, factors": replace(
        BIG,
        delta="factors",
        storages=((8, 64), (4, 32)),
        base_storage=(8, 64),
        gate=False,
        activation="relu2",
        **COLUMNS,
    ),
    "no gate, factors, unequal widths": replace(
        BIG, delta="factors", storages=((8, 64), (3, 64)), gate=False, activation="relu2", **UNEQUAL
    ),
}
"""Sizes that are multiples of nothing, experts with no tokens among them."""


@settings(max_examples=200, deadline=None)
@given(few_cases())
def test_float32_equals_the_oracle(few: Few) -> None:
    made = make(few)
    found = run(made.arguments, made.spec).double().numpy()
    real = slice(0, few.tokens - few.padding)
    np.testing.assert_allclose(found[real], forward(few, made)[real], rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LAYERS)
def test_rounding_is_no_worse_than_the_reference(name: str, dtype: torch.dtype) -> None:
    few = replace(LAYERS[name], dtype=dtype)
    made = make(few)
    exact = torch.from_numpy(forward(few, made))
    outputs = (run(made.arguments, made.spec), fused_experts(*made.arguments, made.spec))
    errors = [float((y.double() - exact).norm() / exact.norm()) for y in outputs]
    assert errors[0] <= 1.3 * errors[1] + 2e-7


@pytest.mark.parametrize("name", ["8 bits by 128", "4 bits by 64", "3 bits by 64", "2 bits by 64"])
def test_an_input_far_above_the_others_of_its_group_costs_them_nothing(name: str) -> None:
    """Where a processor multiplies integers, 16 bits are what the largest of a group leaves to the others."""
    few = replace(LAYERS[name], dtype=torch.bfloat16)
    made = make(few)
    made.arguments[0][::2, ::37] *= 1000
    exact = torch.from_numpy(forward(few, made))
    size = exact.norm(dim=1)
    outputs = (run(made.arguments, made.spec), fused_experts(*made.arguments, made.spec))
    errors = [((y.double() - exact).norm(dim=1) / size)[size > 0].max() for y in outputs]
    assert errors[0] <= 1.3 * errors[1]


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("name", ["8 bits by 64", "4 bits by 64", "3 bits by 64", "2 bits by 64"])
def test_what_is_no_number_stays_in_its_row(name: str, int8: bool) -> None:
    made = make(replace(LAYERS[name], dtype=torch.bfloat16))
    x, *rest = made.arguments
    strange = x.clone()
    strange[3, 5], strange[4, 70], strange[5] = float("nan"), float("inf"), 0.0
    before, after = (run(arguments, made.spec, int8=int8) for arguments in (made.arguments, (strange, *rest)))
    used = (made.arguments[2] >= 0).any(dim=1)
    assert not after[[3, 4]][used[[3, 4]]].isfinite().any()
    assert not after[5].any()
    others = [row for row in range(len(x)) if row not in (3, 4, 5)]
    assert torch.equal(before[others], after[others])


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("name", "scope"),
    [*((name, "off") for name in LAYERS), *((name, "token") for name, few in LAYERS.items() if few.base == "columns")],
)
def test_rows_are_the_same_bits_alone_in_a_crowd_and_on_any_number_of_threads(
    name: str, scope: str, dtype: torch.dtype, int8: bool
) -> None:
    made = make(replace(LAYERS[name], dtype=dtype, scope=scope))
    packed = cpu.pack(
        *(Weights(*(None if t is None else t.clone() for t in h)) for h in made.arguments[3:5]), made.spec, int8=int8
    )

    def some(rows: torch.Tensor) -> torch.Tensor:
        return cpu.fused_experts(*(t[rows] for t in made.arguments[:3]), *packed, None, made.spec, int8=int8)

    same_bits(some)


@pytest.mark.parametrize("scope", ["token", "batch"])
@pytest.mark.parametrize("delta", ["dense", "factors"])
def test_columns_of_a_packed_base_are_chosen_as_elsewhere(delta: str, scope: str) -> None:
    """In batch scope padding has no say, whatever it is."""
    few = replace(
        BIG, delta=delta, storages=((2, 64), (4, 64)), base_storage=(3, 64), padding=20, scope=scope, **COLUMNS
    )
    made = make(few)
    np.testing.assert_allclose(
        run(made.arguments, made.spec).double().numpy()[:47], forward(few, made)[:47], rtol=1e-3, atol=2e-4
    )
    clean = run(made.arguments, made.spec)[:47]
    made.arguments[0][47:] = torch.nan
    assert torch.equal(run(made.arguments, made.spec)[:47], clean)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bases", [1, 3, 4, 37])
@pytest.mark.parametrize("storage", [(8, 64), (4, 32), (3, 64), (2, 128)])
def test_packed_bases_that_vs_are_mixed_from(storage: tuple[int, int], bases: int, dtype: torch.dtype) -> None:
    """MoBE's in few bits: no worse than the reference, which opens all bases, and the same bits in other company."""
    sizes: dict[str, Any] = {"tokens": 33, "hidden": 150, "intermediate": 40, "rank": (19, 33)}
    arguments, spec, found = mixed_few(6, dtype, storage, bases=bases, groups=bases, **sizes)
    expected = torch.from_numpy(found)
    outputs = (run(arguments, spec), fused_experts(*arguments, spec))
    errors = [float((y.double() - expected).norm() / expected.norm()) for y in outputs]
    assert errors[0] <= 1.3 * errors[1] + 3e-7
    some = torch.tensor([4, 17, 32])
    assert torch.equal(run([*(t[some] for t in arguments[:3]), *arguments[3:]], spec), outputs[0][some])


@pytest.mark.parametrize("name", LAYERS)
def test_rows_of_8_bits_equal_the_oracle_that_rounds_them(name: str) -> None:
    """float32, so that little else is rounded; what is on the edge between two steps goes either way."""
    few = LAYERS[name]
    made = make(few)
    exact, rounded = forward(few, made), forward(few, made, int8=True)
    found = run(made.arguments, made.spec, int8=True).double().numpy()
    size = np.linalg.norm(exact)
    asked = np.linalg.norm(rounded - exact) / size
    assert np.linalg.norm(found - rounded) <= (1e-3 if asked else 1e-6) * size
    assert asked <= 0.03


@settings(max_examples=100, deadline=None)
@given(few_cases())
def test_rows_of_8_bits_of_any_layer(few: Few) -> None:
    """Small ones, where a single step of a single input is not little: within what rounding costs."""
    made = make(few)
    real = slice(0, few.tokens - few.padding)
    exact, rounded = forward(few, made)[real], forward(few, made, int8=True)[real]
    found = run(made.arguments, made.spec, int8=True).double().numpy()[real]
    np.testing.assert_allclose(found, rounded, rtol=0.05, atol=0.05 * max(np.abs(exact).max(initial=0), 1e-2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "name", ["4 bits by 64", "3 bits by 64", "2 bits by 64", "on a base, unequal widths", "factors"]
)
def test_rows_of_8_bits_cost_no_more_than_these(name: str, dtype: torch.dtype) -> None:
    few = replace(LAYERS[name], dtype=dtype)
    made = make(few)
    exact, rounded = (torch.from_numpy(forward(few, made, int8=int8)) for int8 in (False, True))
    found, stock = run(made.arguments, made.spec, int8=True), fused_experts(*made.arguments, made.spec)
    errors = [float((y.double() - exact).norm() / exact.norm()) for y in (found, rounded, stock)]
    assert errors[0] <= 1.1 * (errors[1] + errors[2])


@pytest.mark.parametrize("name", ["4 bits by 64", "unequal widths", "on a base, unequal widths"])
def test_experts_that_are_nowhere_or_keep_nothing(name: str) -> None:
    """Ids out of range, and experts without channels, add nothing; no token at all is none."""
    made = make(LAYERS[name])
    arguments = list(made.arguments)
    arguments[2] = torch.full_like(arguments[2], 2 if LAYERS[name].widths else 8)
    assert not run(arguments, made.spec).any()
    assert run([t[:0] for t in arguments[:3]] + arguments[3:], made.spec).shape == (0, 192)


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("widths", [(), (256, 64, 0, 128, 32, 224)])
def test_packing_takes_no_more_memory_where_sizes_are_multiples(bits: int, widths: tuple[int, ...]) -> None:
    """Neither codes nor scales are widened, and both lie where they lay."""
    few = Few(2, hidden=128, intermediate=256, experts=6, storages=((bits, 64), (bits, 32)), widths=widths)
    few = replace(few, base="full", base_storage=(bits, 64), skipped=(0,) * len(widths))
    made = make(few)
    packed = cpu.pack(*made.arguments[3:5], made.spec)
    for before, after in zip(made.arguments[3:5], packed, strict=True):
        for old, new in zip(before, after, strict=True):
            assert old is None or (new.data_ptr() == old.data_ptr() and new.numel() == old.numel())


def test_a_code_that_no_compressor_writes_is_the_number_it_stands_for() -> None:
    for arguments, spec, expected in lowest_codes():
        torch.testing.assert_close(run(arguments, spec), expected, rtol=1e-5, atol=1e-5)
