"""The C++ backend against the reference and the float64 oracle, and its bits against themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from moe_cases import CROWDED, cases, crowd
from moe_oracle import Case, forward, kernel_arguments

from d2moe_vllm.ops import cpu
from d2moe_vllm.ops.reference import Weights, fused_experts

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def run(arguments: list[Any], options: dict[str, Any]) -> torch.Tensor:
    """Packs copies: packing takes the storage it is given."""
    copies = [Weights(*(None if t is None else t.clone() for t in half)) for half in arguments[3:5]]
    packed = cpu.pack(*copies, ranks=options["ranks"], base_ranks=options["base_ranks"])
    return cpu.fused_experts(*arguments[:3], *packed, arguments[5], **options)


@settings(max_examples=200, deadline=None)
@given(cases())
def test_float32_equals_the_oracle(case: Case) -> None:
    case.x = case.x.astype(np.float32).astype(np.float64)
    arguments, options = kernel_arguments(case, torch.float32)
    np.testing.assert_allclose(run(arguments, options).double().numpy(), forward(case), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scope", ["off", "token", "batch"])
@pytest.mark.parametrize("variant", CROWDED)
def test_rounding_is_no_worse_than_the_reference(dtype: torch.dtype, scope: str, variant: str) -> None:
    arguments, options = kernel_arguments(crowd(variant, scope), dtype)
    exact = fused_experts(*in_float64(arguments), **options)
    error = [
        float((y.double() - exact).norm() / exact.norm())
        for y in (run(arguments, options), fused_experts(*arguments, **options))
    ]
    assert error[0] <= 1.3 * error[1] + 1e-7


def in_float64(arguments: list[Any]) -> list[Any]:
    def widen(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return tensor.double() if tensor is not None and tensor.is_floating_point() else tensor

    halves = [Weights(*map(widen, half))._replace(base_norms=half.base_norms) for half in arguments[3:5]]
    return [*map(widen, arguments[:3]), *halves, arguments[5]]
