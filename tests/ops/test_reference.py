"""The torch reference backend against a naive float64 oracle (METHODS 1.5, 1.6)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from moe_cases import cases, random_case
from moe_oracle import Case, forward, kernel_arguments
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from d2moe_vllm.ops.reference import fused_experts, select_columns

SCOPES = ("batch", "token", "off")


def run(case: Case, dtype: torch.dtype = torch.float64, **changes: Any) -> torch.Tensor:
    tensors, options = kernel_arguments(case, dtype)
    return fused_experts(*tensors, **{**options, **changes})


@settings(max_examples=150, deadline=None)
@given(cases())
def test_equals_the_oracle(case: Case) -> None:
    expected = forward(case)
    np.testing.assert_allclose(run(case).numpy(), expected, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(run(case, static_shapes=True).numpy(), expected, rtol=1e-9, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(cases())
def test_float32_equals_the_oracle(case: Case) -> None:
    # Both start from the same float32 inputs, so that a selection can only differ in a near tie.
    case.x = case.x.astype(np.float32).astype(np.float64)
    np.testing.assert_allclose(run(case, torch.float32).double().numpy(), forward(case), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("static_shapes", [False, True])
@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 1e30])
def test_padding_rows_influence_nobody(scope: str, static_shapes: bool, garbage: float) -> None:
    case = random_case(1, tokens=9, padding=4, scope=scope)
    clean = run(case, torch.float32, static_shapes=static_shapes)[:5]
    case.x[5:] = garbage
    case.topk_weights[5:] = np.nan
    # Wherever the padding rows may be routed to, together or not at all.
    case.topk_ids[5:] = [[0, 1], [0, 1], [-1, 3], [3, 2]]
    dirty = run(case, torch.float32, static_shapes=static_shapes)[:5]
    assert torch.equal(clean, dirty)


@pytest.mark.parametrize("scope", ["token", "off"])
def test_a_token_does_not_depend_on_its_neighbours(scope: str) -> None:
    case = random_case(2, tokens=8, scope=scope)
    together = run(case)
    for t in range(8):
        alone = random_case(2, tokens=8, scope=scope)
        alone.x, alone.topk_ids = case.x[t : t + 1], case.topk_ids[t : t + 1]
        alone.topk_weights = case.topk_weights[t : t + 1]
        torch.testing.assert_close(run(alone)[0], together[t], rtol=1e-12, atol=1e-12)


def test_scopes_differ_where_they_should() -> None:
    results = [run(random_case(3, tokens=6, scope=scope)) for scope in SCOPES]
    assert all(not torch.allclose(a, b) for i, a in enumerate(results) for b in results[:i])


def test_using_every_kept_column_is_no_selection() -> None:
    off = run(random_case(4, used=(3, 5), scope="off"))
    for scope in ("batch", "token"):
        assert torch.equal(run(random_case(4, used=(3, 5), scope=scope)), off)


def test_ties_go_to_the_lowest_column() -> None:
    kept = torch.ones(3, 8)
    for scope in ("batch", "token"):
        mask = select_columns(kept, torch.ones(8), None, scope=scope, groups=2, used=4)
        assert mask is not None
        assert mask[0].tolist() == [True, True, False, False] * 2


def test_unknown_scope() -> None:
    with pytest.raises(ValueError, match="scope is 'tokens'"):
        select_columns(torch.ones(1, 4), torch.ones(4), None, scope="tokens", groups=1, used=2)


def test_experts_that_are_not_here_add_nothing() -> None:
    case = random_case(5, tokens=4)
    case.topk_ids[:] = -1
    assert not run(case).any()
    case.topk_ids[:] = case.num_experts  # transformers' own marker
    assert not run(case).any()
    assert not run(case, static_shapes=True).any()


def test_deltas_may_be_lists() -> None:
    tensors, options = kernel_arguments(random_case(6), torch.float64)
    lists = [list(t) if t is not None and t.dim() == 3 else t for t in tensors]
    assert torch.equal(fused_experts(*lists, **options), fused_experts(*tensors, **options))


def test_tensor_parallel_slices_add_up() -> None:
    """Gate and up by output rows, down by input columns: two ranks' outputs sum to the whole, selections included."""
    for scope in SCOPES:
        tensors, options = kernel_arguments(random_case(7, tokens=6, scope=scope), torch.float64)
        whole = fused_experts(*tensors, **options)
        total = torch.zeros_like(whole)
        for rank in range(2):
            own, parts = slice(rank * 8, rank * 8 + 8), list(tensors)
            u13, base13, v2 = tensors[3], tensors[5], tensors[9]
            parts[3] = u13[:, own]
            parts[5] = torch.cat([base13[:, :16][:, own], base13[:, 16:][:, own]], 1)
            parts[9] = v2[:, :, own]
            kept = slice(rank * 5, rank * 5 + 5)
            parts[10], parts[11], parts[12] = tensors[10][kept], tensors[11][kept] - rank * 8, tensors[12][kept]
            total += fused_experts(*parts, **{**options, "w2_groups": 1, "w2_used": 3})
        torch.testing.assert_close(total, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_static_path_has_no_data_dependent_shape(scope: str, dtype: torch.dtype) -> None:
    tensors, options = kernel_arguments(random_case(8, tokens=6, scope=scope, padding=1), dtype)

    def layer(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return fused_experts(x, weights, ids, *tensors[3:-1], mask, **options, static_shapes=True)

    graph = make_fx(layer, tracing_mode="fake", _allow_non_fake_inputs=True)(*tensors[:3], tensors[-1])
    torch.testing.assert_close(graph(*tensors[:3], tensors[-1]), layer(*tensors[:3], tensors[-1]))
    with FakeTensorMode() as mode:
        fakes = [None if t is None else mode.from_tensor(t) for t in tensors]
        output = fused_experts(*fakes, **options, static_shapes=True)
    assert (output.shape, output.dtype) == (tensors[0].shape, dtype)


def dense_layer(case: Case, dtype: torch.dtype) -> torch.Tensor:
    """An ordinary MoE layer in dtype with the reconstructed weights, sums over experts in float32."""
    x = torch.from_numpy(case.x).to(dtype)
    ids, weights = torch.from_numpy(case.topk_ids), torch.from_numpy(case.topk_weights).float()
    output = torch.zeros(x.shape, dtype=torch.float32)
    for expert in range(case.num_experts):
        matrices = {}
        for role in ("gate", "up", "down"):
            full = case.delta_u[role][expert] @ case.delta_v[role][expert]
            full[:, case.columns[role]] += case.base[role]
            matrices[role] = torch.from_numpy(full).to(dtype)
        rows, slot = torch.where(ids == expert)
        gate, up = x[rows] @ matrices["gate"].t(), x[rows] @ matrices["up"].t()
        h = (torch.nn.functional.silu(gate.float()) * up.float()).to(dtype)
        output.index_add_(0, rows, weights[rows, slot, None] * (h @ matrices["down"].t()).float())
    return output.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("static_shapes", [False, True])
def test_rounding_error_is_that_of_a_dense_layer(dtype: torch.dtype, static_shapes: bool) -> None:
    """Relative error against float64 at most that of the dense layer the factors stand for."""
    sizes = {"hidden": 256, "intermediate": 512, "rank": (48, 40, 64), "kept": (28, 56), "used": (28, 56)}
    case = random_case(9, tokens=64, num_experts=8, groups=8, **sizes)
    for name in ("x", "topk_weights"):
        setattr(case, name, torch.from_numpy(getattr(case, name)).to(dtype).double().numpy())
    for table in (case.delta_u, case.delta_v):
        for role, matrices in table.items():
            table[role] = [torch.from_numpy(m).to(dtype).double().numpy() for m in matrices]
    for role, base in case.base.items():
        case.base[role] = torch.from_numpy(base).to(dtype).double().numpy()
    exact = run(case)
    ours, dense = run(case, dtype, static_shapes=static_shapes), dense_layer(case, dtype)
    error, dense_error = ((y.double() - exact).norm() / exact.norm() for y in (ours, dense))
    assert error <= 1.1 * dense_error
