"""MoBE's layers in the Triton backend (METHODS 3), against a float64 oracle and the reference, as in test_triton.py."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from mixed_cases import MIXED_SMALL, forward, mixed_case, mixed_cases
from triton_kernels import DEVICES, Backend, products_by_rows, shapes_seen

from d2moe_vllm import ops
from d2moe_vllm.ops import reference, selfcheck
from d2moe_vllm.ops.reference import FUNCTIONS, fused_experts
from d2moe_vllm.ops.selfcheck import SelfCheckError, against_reference
from d2moe_vllm.ops.weights import LayerSpec


@pytest.fixture(scope="module", params=DEVICES)
def backend(request: pytest.FixtureRequest) -> Backend:
    return Backend(request.param)


@settings(max_examples=30, deadline=None)
@given(mixed_cases())
def test_float32_equals_the_oracle(backend: Backend, case: tuple[list[Any], LayerSpec]) -> None:
    """Any sizes, functions, groups (whose alphas are zero elsewhere), padding, no token at all."""
    np.testing.assert_allclose(backend.run(*case).double().numpy(), forward(*case), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("variant", MIXED_SMALL)
def test_rounding_is_no_worse_than_the_references(backend: Backend, variant: str) -> None:
    """V is rounded where the reference rounds it; blocks with many rows, more bases and experts than fit at once."""
    for dtype in backend.dtypes[1:]:
        arguments, spec = mixed_case(1, dtype, **MIXED_SMALL[variant])
        exact = torch.from_numpy(forward(arguments, spec))
        outputs = (backend.run(arguments, spec), fused_experts(*arguments, spec))
        errors = [float((y.double() - exact).norm() / exact.norm()) for y in outputs]
        assert errors[0] <= 1.3 * errors[1] + 1e-7, dtype


@pytest.mark.parametrize("function", ["silu", "tanh"])
def test_v_is_rounded_to_the_weights_type(backend: Backend, function: str) -> None:
    """After mixing and after f, bit by bit: mixes that float32 has exactly, and an input of one."""
    (x, gates, ids, w13, _, _), _ = mixed_case(2, torch.float16, tokens=1, hidden=1, bases=2, rank=(70, 50), top_k=1)
    x, alpha = torch.ones_like(x), torch.full_like(w13.alpha, 0.5)
    x, gates, ids, bases, alpha = backend.to([x, gates, ids, w13.bases, alpha])
    batch = backend.modules.launch.Batch(gates, ids, 4, torch.float16, False)
    matrices = backend.modules.launch.Matrices(bases, 120, 1)
    (found,) = batch.mixed_product(x, matrices, alpha, gate_rank=70, function=function)
    mix = (w13.bases.double().sum(dim=0) / 2).half()
    assert torch.equal(found[0].cpu(), FUNCTIONS[function](mix)[:, 0])


@pytest.mark.parametrize("function", ["silu", "tanh"])
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 0.05, 0.2, 30.0])
def test_functions_of_small_and_large_values(backend: Backend, function: str, scale: float) -> None:
    """tanh keeps its digits near zero, and neither function overflows."""
    case = mixed_case(3, hidden=48, rank=(8, 8), function=function, scale=scale)
    expected = forward(*case)
    error = np.linalg.norm(backend.run(*case).double().numpy() - expected) / np.linalg.norm(expected)
    assert error < 2e-6


ROUTES = {
    "all tokens to one expert": [[2, 2]] * 70,
    "one expert twice, others never": [[1, 1], [1, 3]] * 10 + [[3, 3]],
    "nobody": [[-1, 7]] * 21,
    "half of them elsewhere": [[-1, 0], [3, -5]] * 10 + [[9, 2]],
    "one token": [[3, 0]],
}


@pytest.mark.parametrize("route", ROUTES)
def test_uneven_routes(backend: Backend, route: str) -> None:
    """More rows than a block for one expert, none for another, ids out of range."""
    arguments, spec = mixed_case(4, tokens=len(ROUTES[route]), hidden=40, rank=(9, 4))
    arguments[2] = torch.tensor(ROUTES[route], dtype=torch.int32)
    np.testing.assert_allclose(
        backend.run(arguments, spec).double().numpy(), forward(arguments, spec), rtol=1e-4, atol=1e-6
    )


def test_expert_parallel_ranks_add_up(backend: Backend) -> None:
    """Each has some experts' alphas, A and down; bases are everywhere; others' experts are -1 here."""
    arguments, spec = mixed_case(5, tokens=9, num_experts=6)
    whole, total = backend.run(arguments, spec), torch.zeros(9, 8)
    for own in (slice(0, 2), slice(2, 6)):
        count, w13, w2 = own.stop - own.start, arguments[3], arguments[4]
        ids = arguments[2] - own.start
        parts = [*arguments[:2], ids.masked_fill((ids < 0) | (ids >= count), -1)]
        halves = [w13._replace(alpha=w13.alpha[own], a=w13.a[own]), w2._replace(dense=w2.dense[own])]
        total += backend.run([*parts, *halves, None], spec._replace(num_experts=count))
    torch.testing.assert_close(total, whole, rtol=1e-5, atol=1e-6)


def test_tensor_parallel_slices_add_up(backend: Backend) -> None:
    """A by output rows, down by input columns."""
    arguments, spec = mixed_case(6, tokens=6)
    total = torch.zeros(6, 8)
    for own in (slice(0, 8), slice(8, 16)):
        w13 = arguments[3]._replace(a=arguments[3].a[:, own].contiguous())
        w2 = arguments[4]._replace(dense=arguments[4].dense[:, :, own].contiguous())
        total += backend.run([*arguments[:3], w13, w2, None], spec._replace(intermediate_size=8))
    torch.testing.assert_close(total, backend.run(arguments, spec), rtol=1e-5, atol=1e-6)


def test_batch_invariant_rows_are_the_same_bits_alone_and_in_a_crowd(backend: Backend) -> None:
    arguments, spec = mixed_case(7, backend.dtypes[-1], tokens=20, hidden=96, num_experts=20, rank=(20, 9))
    spec = spec._replace(batch_invariant=True)

    def some(rows: torch.Tensor) -> torch.Tensor:
        return backend.run([*(t[rows] for t in arguments[:3]), *arguments[3:]], spec)

    with products_by_rows():
        together = some(torch.arange(20))
        for size in (1, 7):
            rows = torch.randperm(20, generator=torch.Generator().manual_seed(size))[:size]
            assert torch.equal(some(rows), together[rows]), size
    assert not torch.equal(together[:2], together[2:4])


def test_padding_rows_influence_nobody(backend: Backend) -> None:
    """Though they share a tile of V, and a program, with others."""
    arguments, spec = mixed_case(8, tokens=9, padding=4)
    clean = backend.run(arguments, spec)[:5]
    arguments[0][5:] = torch.nan
    arguments[1][5:] = torch.nan
    arguments[2][5:] = torch.tensor([[0, 1], [0, 1], [-1, 3], [3, 2]], dtype=torch.int32)
    assert torch.equal(backend.run(arguments, spec)[:5], clean)


def test_no_shape_depends_on_data_and_nothing_is_waited_for(backend: Backend) -> None:
    arguments, spec = mixed_case(9, tokens=3)
    arguments = backend.to(arguments)
    seen = shapes_seen(backend, arguments, spec, [[-1, 7], [7, 7], [2, 5]])
    assert seen[0] == seen[1]
    # Of which none is a whole V: pairs, blocks, s, h, down's share and the output.
    sizes = [np.prod(shape) for name, shape in seen[0] if name == "empty"]
    assert len(sizes) >= 6
    assert max(sizes) < 4 * (3 + 2) * 8


@pytest.mark.parametrize("function", ["", "relu"])
def test_an_unknown_function_is_one_line(backend: Backend, function: str) -> None:
    arguments, spec = mixed_case(10)
    with pytest.raises(ValueError, match=f"function is '{function}', not one of silu, tanh"):
        backend.run(arguments, spec._replace(function=function))


@pytest.fixture
def check(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Loads a layer with a backend that is held against the reference; this one by default."""
    monkeypatch.setattr(selfcheck, "_DONE", set())

    def load(compute: Any = None, **changes: Any) -> None:
        compute = compute or backend.modules.layer.fused_experts
        monkeypatch.setitem(ops.BACKENDS, "new", ops.Backend(compute, check=True))
        arguments, spec = mixed_case(11, hidden=24, rank=(9, 4))
        parameters = backend.to(ops.flat(*arguments[3:5]))
        sizes = {"hidden_size": 24, "top_k": 2, "dtype": arguments[0].dtype}
        with against_reference(lambda: parameters, "new", spec._replace(**changes), **sizes):
            pass

    return load


def test_such_layers_are_checked_when_a_model_is_loaded(check: Any) -> None:
    """And once more where f is another one."""
    check()
    check(function="tanh")
    assert len(selfcheck._DONE) == 2


def without_function(*inputs: Any) -> torch.Tensor:
    return reference.fused_experts(*inputs[:-1], inputs[-1]._replace(function="tanh"))


def with_gates_alphas(*inputs: Any) -> torch.Tensor:
    w13 = inputs[3]
    gate = w13.alpha.chunk(2, dim=1)[0]
    return reference.fused_experts(*inputs[:3], w13._replace(alpha=torch.cat([gate, gate], 1)), *inputs[4:])


@pytest.mark.parametrize("wrong", [without_function, with_gates_alphas])
def test_what_computes_them_wrong_is_refused(check: Any, wrong: Any) -> None:
    with pytest.raises(SelfCheckError, match="differ"):
        check(wrong)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("variant", MIXED_SMALL)
def test_cuda_graph(variant: str) -> None:
    """A captured layer gives the result of whatever inputs are there when it is replayed."""
    backend = Backend("cuda")
    arguments, spec = mixed_case(1, torch.bfloat16, **MIXED_SMALL[variant])
    arguments = backend.to(arguments)
    inputs = [t.clone() for t in arguments[:3]]
    layer = partial(backend.modules.layer.fused_experts, *inputs, *arguments[3:], spec)
    layer()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = layer()
    count = len(inputs[0])
    for order in (torch.arange(count), torch.arange(count).flip(0), torch.zeros(count, dtype=torch.long)):
        for tensor, original in zip(inputs, arguments[:3], strict=True):
            tensor.copy_(original[order.to("cuda")])
        graph.replay()
        assert torch.equal(output, layer())
