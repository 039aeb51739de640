"""The torch reference backend against a naive float64 oracle (METHODS 1.5, 1.6)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from moe_cases import CROWDED, cases, crowd, random_case
from moe_oracle import Case, delta_matrix, forward, kernel_arguments
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from d2moe_vllm.ops import BACKENDS
from d2moe_vllm.ops.reference import fused_experts, select_columns
from d2moe_vllm.ops.weights import HalfSpec, Weights

SCOPES = ("batch", "token", "off")


def run(case: Case, dtype: torch.dtype = torch.float64, **changes: Any) -> torch.Tensor:
    tensors, spec = kernel_arguments(case, dtype)
    return fused_experts(*tensors, spec._replace(**changes))


@settings(max_examples=150, deadline=None)
@given(cases())
def test_equals_the_oracle(case: Case) -> None:
    expected = forward(case)
    for changes in ({}, {"static_shapes": True}, {"batch_invariant": True}):
        np.testing.assert_allclose(run(case, **changes).numpy(), expected, rtol=1e-9, atol=1e-9)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scope", ["token", "off"])
@pytest.mark.parametrize("variant", CROWDED)
def test_batch_invariant_rows_are_the_same_bits_alone_and_in_a_crowd(
    dtype: torch.dtype, scope: str, variant: str
) -> None:
    """Also where a row stands in its batch, and how many neighbours its experts have, must not show."""
    case = crowd(variant, scope)
    arguments, spec = kernel_arguments(case, dtype)

    def some(rows: torch.Tensor) -> torch.Tensor:
        return fused_experts(*(t[rows] for t in arguments[:3]), *arguments[3:], spec._replace(batch_invariant=True))

    together = some(torch.arange(67))
    for size in (1, 2, 5, 16, 31):
        rows = torch.randperm(67, generator=torch.Generator().manual_seed(size))[:size]
        assert torch.equal(some(rows), together[rows]), size
    assert not torch.equal(some(torch.arange(2)), together[2:4])


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu2"])
@pytest.mark.parametrize(("intermediate", "threads"), [(176, 1), (176, 2), (1408, 4), (14336, 3)])
def test_batch_invariant_activations(activation: str, intermediate: int, threads: int) -> None:
    """Sizes and numbers of threads with which torch computes some values of a batch by scalars, others by vectors."""
    sizes = {"hidden": 32, "intermediate": intermediate, "num_experts": 2, "rank": (8, 8, 8)}
    case = random_case(3, tokens=40, kept=(0, 0), used=(0, 0), **sizes)
    arguments, spec = kernel_arguments(case, torch.float32)
    spec = spec._replace(activation=activation, batch_invariant=True)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        alone = [fused_experts(*(t[row : row + 1] for t in arguments[:3]), *arguments[3:], spec) for row in range(40)]
        together = fused_experts(*arguments, spec)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(torch.cat(alone), together)


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_what_needs_a_gate_is_refused_without_one(backend: str) -> None:
    """And not left out, or computed with another half of the weights."""
    arguments, spec = kernel_arguments(random_case(3, gate=False), torch.float32)
    if backend == "triton":
        pytest.importorskip("triton")
    run = BACKENDS[backend].fused_experts
    with pytest.raises(ValueError, match="a clamped SwiGLU needs a gate"):
        run(*arguments, spec._replace(swiglu=(7.0, 1.702, 1.0)))
    bases = {"bases": torch.ones(2, 2, 8), "alpha": torch.ones(4, 2), "a": torch.ones(4, 16, 2)}
    arguments[3] = Weights(**bases)
    with pytest.raises(ValueError, match="bases are mixed for gate and up"):
        run(*arguments, spec._replace(w13=HalfSpec((2,)), function="silu"))


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
        mask = select_columns(kept, torch.ones(8), None, HalfSpec((0, 0), groups=2, used=4), scope)
        assert mask is not None
        assert mask[0].tolist() == [True, True, False, False] * 2


def test_unknown_scope() -> None:
    with pytest.raises(ValueError, match="scope is 'tokens'"):
        select_columns(torch.ones(1, 4), torch.ones(4), None, HalfSpec((0,), used=2), "tokens")


def test_experts_that_are_not_here_add_nothing() -> None:
    case = random_case(5, tokens=4)
    case.topk_ids[:] = -1
    assert not run(case).any()
    case.topk_ids[:] = case.num_experts  # transformers' own marker
    assert not run(case).any()
    assert not run(case, static_shapes=True).any()


@pytest.mark.parametrize("delta", ["factors", "columns"])
def test_deltas_may_be_lists(delta: str) -> None:
    arguments, spec = kernel_arguments(random_case(6, delta=(delta, delta), trimmed=(1,)), torch.float64)
    lists = list(arguments)
    for place in (3, 4):
        stacked = {kind: getattr(arguments[place], kind) for kind in ("delta_u", "delta_v", "delta_columns")}
        lists[place] = arguments[place]._replace(**{k: list(t) for k, t in stacked.items() if t is not None})
    assert torch.equal(fused_experts(*lists, spec), fused_experts(*arguments, spec))


def test_sharing_and_trimming_are_exactly_what_they_stand_for() -> None:
    """A layer that stores every expert's factors for itself, and zeros for trimmed experts."""
    shared = random_case(10, tokens=9, delta=("shared V", "factors"), distinct_u=(2, 3), trimmed=(1,))
    arguments, spec = kernel_arguments(shared, torch.float32)
    spread = list(arguments)
    for place in (3, 4):
        weights = arguments[place]
        us = weights.delta_u[weights.u_index.clamp(min=0).long()]
        us[1] = 0
        if (vs := weights.delta_v) is None:
            vs = weights.shared_v.expand(shared.num_experts, -1, -1)
        else:
            vs = vs[weights.v_index.clamp(min=0).long()]
        spread[place] = weights._replace(delta_u=us, delta_v=vs, shared_v=None, u_index=None, v_index=None)
    expected = fused_experts(*spread, spec)
    for static_shapes in (False, True):
        output = fused_experts(*arguments, spec._replace(static_shapes=static_shapes))
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)


def test_a_shared_v_meets_each_token_once() -> None:
    """Not once per expert: counted by the rows that any product with it has."""
    arguments, spec = kernel_arguments(random_case(11, tokens=7, delta=("shared V", "factors")), torch.float32)
    shared_v = arguments[3].shared_v
    rows = []

    class Counting(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten.mm.default and args[1].data_ptr() == shared_v.data_ptr():
                rows.append(args[0].shape[0])
            return func(*args, **(kwargs or {}))

    for static_shapes in (False, True):
        with Counting():
            fused_experts(*arguments, spec._replace(static_shapes=static_shapes))
    assert rows == [7, 7]


def test_a_rank_may_have_trimmed_experts_only() -> None:
    """Nothing is stored there, and everything runs on the base."""
    case = random_case(12, trimmed=(0, 1, 2))
    alone = random_case(12, trimmed=(0, 1, 2, 3))
    case.topk_ids %= 3
    alone.topk_ids %= 3
    arguments, spec = kernel_arguments(case, torch.float64)
    expected = fused_experts(*arguments, spec)
    np.testing.assert_allclose(expected.numpy(), forward(alone), rtol=1e-9, atol=1e-9)
    for place in (3, 4):
        weights = arguments[place]
        arguments[place] = weights._replace(delta_u=weights.delta_u[:0], delta_v=weights.delta_v[:0])
    for static_shapes in (False, True):
        output = fused_experts(*arguments, spec._replace(static_shapes=static_shapes))
        torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)


def test_tensor_parallel_slices_add_up() -> None:
    """Gate and up by output rows, down by input columns: two ranks' outputs sum to the whole, selections included."""
    for scope in SCOPES:
        arguments, spec = kernel_arguments(random_case(7, tokens=6, scope=scope), torch.float64)
        whole = fused_experts(*arguments, spec)
        total = torch.zeros_like(whole)
        for rank in range(2):
            own, parts = slice(rank * 8, rank * 8 + 8), list(arguments)
            w13, w2 = arguments[3], arguments[4]
            base13 = torch.cat([w13.base[:, :16][:, own], w13.base[:, 16:][:, own]], 1)
            parts[3] = w13._replace(delta_u=w13.delta_u[:, own], base=base13)
            kept = slice(rank * 5, rank * 5 + 5)
            parts[4] = w2._replace(
                delta_v=w2.delta_v[:, :, own],
                base=w2.base[kept],
                base_columns=w2.base_columns[kept] - rank * 8,
                base_norms=w2.base_norms[kept],
            )
            total += fused_experts(*parts, spec._replace(intermediate_size=8, w2=spec.w2._replace(groups=1, used=3)))
        torch.testing.assert_close(total, whole, rtol=1e-12, atol=1e-12)


VARIANTS: dict[str, dict[str, Any]] = {
    "columns": {},
    "low rank, delta columns": {"base_rank": (2, 3, 4), "kept": (0, 0), "used": (0, 0), "delta": ("columns",) * 2},
    "everything shared": {"delta": ("shared V",) * 2, "distinct_u": (2, 1), "trimmed": (0, 2)},
    "own V's, shared U's": {"distinct_u": (3, 2), "trimmed": (1,)},
}


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_static_path_has_no_data_dependent_shape(scope: str, dtype: torch.dtype, variant: str) -> None:
    case = random_case(8, tokens=6, scope=scope, padding=1, **VARIANTS[variant])
    arguments, spec = kernel_arguments(case, dtype)
    inputs = [*arguments[:3], arguments[-1]]

    def layer(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return fused_experts(x, weights, ids, *arguments[3:-1], mask, spec._replace(static_shapes=True))

    graph = make_fx(layer, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)
    torch.testing.assert_close(graph(*inputs), layer(*inputs))
    # Nothing may ask for a value either: these tensors have none.
    with FakeTensorMode() as mode:
        fakes = torch.utils._pytree.tree_map(
            lambda t: mode.from_tensor(t) if isinstance(t, torch.Tensor) else t, arguments
        )
        output = fused_experts(*fakes, spec._replace(static_shapes=True))
    assert (output.shape, output.dtype) == (arguments[0].shape, dtype)


def dense_layer(case: Case, dtype: torch.dtype) -> torch.Tensor:
    """An ordinary MoE layer in dtype with the reconstructed weights, sums over experts in float32."""
    x = torch.from_numpy(case.x).to(dtype)
    ids, weights = torch.from_numpy(case.topk_ids), torch.from_numpy(case.topk_weights).float()
    output = torch.zeros(x.shape, dtype=torch.float32)
    for expert in range(case.num_experts):
        matrices = {}
        for role in ("gate", "up", "down"):
            full = delta_matrix(case, role, expert)
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
