"""The Triton backend against the float64 oracle and the reference, and its bits against themselves.

In Triton's interpreter on CPU tensors; the same on a GPU, where there is one, in bfloat16, too.
"""

from __future__ import annotations

import itertools
from typing import Any

import forks
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_cases import CROWDED, cases, crowd, random_case
from moe_oracle import Case, forward, kernel_arguments
from triton_kernels import DEVICES, Backend, products_by_rows, shapes_seen

from d2moe_vllm.ops import BACKENDS, choose_backend
from d2moe_vllm.ops.reference import fused_experts, select_columns
from d2moe_vllm.ops.weights import HalfSpec, Weights

SCOPES = ("off", "token", "batch")


@pytest.fixture(scope="module", params=DEVICES)
def backend(request: pytest.FixtureRequest) -> Backend:
    return Backend(request.param)


def in_float32(case: Case) -> Case:
    """Both start from the same float32 inputs, so that a selection can only differ in a near tie."""
    case.x = case.x.astype(np.float32).astype(np.float64)
    return case


@settings(max_examples=30, deadline=None)
@given(cases())
def test_float32_equals_the_oracle(backend: Backend, case: Case) -> None:
    """Any variant of weights, scope, routing, padding: no base, no deltas, trimmed experts, no token at all."""
    output = backend.run(*kernel_arguments(in_float32(case), torch.float32))
    np.testing.assert_allclose(output.double().numpy(), forward(case), rtol=1e-3, atol=1e-4)


def rounding_is_no_worse(backend: Backend, variant: str, scope: str, dtype: torch.dtype, tokens: int) -> None:
    arguments, spec = kernel_arguments(crowd(variant, scope), dtype)
    arguments[:3] = [t[:tokens] for t in arguments[:3]]
    exact = fused_experts(*in_float64(arguments), spec)
    outputs = (backend.run(arguments, spec), fused_experts(*arguments, spec))
    errors = [float((y.double() - exact).norm() / exact.norm()) for y in outputs]
    assert errors[0] <= 1.3 * errors[1] + 1e-7


def in_float64(arguments: list[Any]) -> list[Any]:
    def widen(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return tensor.double() if tensor is not None and tensor.is_floating_point() else tensor

    halves = [Weights(*map(widen, half))._replace(base_norms=half.base_norms) for half in arguments[3:5]]
    return [*map(widen, arguments[:3]), *halves, arguments[5]]


@pytest.mark.parametrize(("variant", "scope"), list(zip(CROWDED, itertools.cycle(SCOPES), strict=False)))
def test_rounding_is_no_worse_than_the_reference(backend: Backend, variant: str, scope: str) -> None:
    """In sizes that are multiples of nothing and several blocks wide."""
    for dtype in backend.dtypes[1:]:
        rounding_is_no_worse(backend, variant, scope, dtype, tokens=19)


@pytest.mark.slow
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("variant", CROWDED)
def test_rounding_is_no_worse_in_a_crowd(backend: Backend, variant: str, scope: str) -> None:
    for dtype in backend.dtypes:
        rounding_is_no_worse(backend, variant, scope, dtype, tokens=67)


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu2"])
def test_activations(backend: Backend, activation: str, gate: bool) -> None:
    arguments, spec = kernel_arguments(random_case(3, tokens=4, gate=gate), torch.float32)
    spec = spec._replace(activation=activation)
    arguments[0] *= 8
    expected = fused_experts(*arguments, spec)
    torch.testing.assert_close(backend.run(arguments, spec), expected, rtol=1e-4, atol=1e-5)


ROUTES = {
    "all tokens to one expert": [[2, 2]] * 21,
    "one expert twice, others never": [[1, 1], [1, 3]] * 10 + [[3, 3]],
    "nobody": [[-1, 7]] * 21,
    "half of them elsewhere": [[-1, 0], [3, -5]] * 10 + [[9, 2]],
}


@pytest.mark.parametrize("route", ROUTES)
def test_uneven_routes(backend: Backend, route: str) -> None:
    """More rows than a block for one expert, none for another, ids out of range."""
    case = in_float32(random_case(4, tokens=21, delta=("factors", "shared V"), trimmed=(3,)))
    arguments, spec = kernel_arguments(case, torch.float32)
    arguments[2] = torch.tensor(ROUTES[route], dtype=torch.int32)
    # The reference takes an expert that comes twice in a row for one row of its own; count its choices one by one.
    expected = sum(
        fused_experts(arguments[0], arguments[1][:, k : k + 1], arguments[2][:, k : k + 1], *arguments[3:], spec)
        for k in range(2)
    )
    torch.testing.assert_close(backend.run(arguments, spec), expected, rtol=1e-4, atol=1e-5)
    alone = [t[:1] for t in arguments[:3]]
    expected = backend.run(arguments, spec)[:1]
    torch.testing.assert_close(backend.run(alone + arguments[3:], spec), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("variant", "scope"), [("pruned base", "token"), ("trimmed", "off"), ("shared V", "off")])
def test_batch_invariant_rows_are_the_same_bits_alone_and_in_a_crowd(
    backend: Backend, variant: str, scope: str
) -> None:
    arguments, spec = kernel_arguments(crowd(variant, scope), backend.dtypes[-1])
    spec = spec._replace(batch_invariant=True)

    def some(rows: torch.Tensor) -> torch.Tensor:
        return backend.run([*(t[rows] for t in arguments[:3]), *arguments[3:]], spec)

    with products_by_rows():
        together = some(torch.arange(20))
        for size in (1, 7):
            rows = torch.randperm(20, generator=torch.Generator().manual_seed(size))[:size]
            assert torch.equal(some(rows), together[rows]), size
    assert not torch.equal(together[:2], together[2:4])


def test_the_same_bits_on_every_call(backend: Backend) -> None:
    arguments, spec = kernel_arguments(crowd("pruned base", "batch"), backend.dtypes[-1])
    arguments[:3] = [t[:5] for t in arguments[:3]]
    first = backend.run(arguments, spec)
    for _ in range(1 if backend.device == "cpu" else 20):
        assert torch.equal(backend.run(arguments, spec), first)


@pytest.mark.parametrize(
    ("scope", "tokens", "garbage"),
    [("off", 6, np.nan), ("token", 6, np.inf), ("batch", 9, np.nan), ("batch", 9, 1e30), ("batch", 21, np.inf)],
)
def test_padding_rows_influence_nobody(backend: Backend, scope: str, tokens: int, garbage: float) -> None:
    """Neither what is in them, nor where they are routed to, nor how they are weighted."""
    case = random_case(1, tokens=tokens, padding=4, scope=scope)
    real = tokens - 4
    clean = backend.run(*kernel_arguments(case, torch.float32))[:real]
    case.x[real:] = garbage
    case.topk_weights[real:] = np.nan
    case.topk_ids[real:] = [[0, 1], [0, 1], [-1, 3], [3, 2]]
    assert torch.equal(backend.run(*kernel_arguments(case, torch.float32))[:real], clean)


def test_tensor_parallel_slices_add_up(backend: Backend) -> None:
    """Gate and up by output rows, down by input columns: two ranks' outputs sum to the whole, selections included."""
    arguments, spec = kernel_arguments(in_float32(random_case(7, tokens=6, scope="token")), torch.float32)
    whole = backend.run(arguments, spec)
    total = torch.zeros_like(whole)
    for rank in range(2):
        own, parts = slice(rank * 8, rank * 8 + 8), list(arguments)
        w13, w2 = arguments[3], arguments[4]
        base13 = torch.cat([w13.base[:, :16][:, own], w13.base[:, 16:][:, own]], 1)
        parts[3] = w13._replace(delta_u=w13.delta_u[:, own].contiguous(), base=base13)
        kept = slice(rank * 5, rank * 5 + 5)
        parts[4] = w2._replace(
            delta_v=w2.delta_v[:, :, own].contiguous(),
            base=w2.base[kept],
            base_columns=w2.base_columns[kept] - rank * 8,
            base_norms=w2.base_norms[kept],
        )
        total += backend.run(parts, spec._replace(intermediate_size=8, w2=spec.w2._replace(groups=1, used=3)))
    torch.testing.assert_close(total, whole, rtol=1e-5, atol=1e-5)


def batch_of(backend: Backend, tokens: int, dtype: torch.dtype = torch.float32) -> Any:
    ids = torch.zeros(tokens, 1, dtype=torch.int32, device=backend.device)
    return backend.modules.launch.Batch(ids.float(), ids, 1, dtype, False)


@pytest.mark.parametrize("scope", ["batch", "token"])
@pytest.mark.parametrize(("rows", "size", "some"), [(1, 5, 2), (3, 37, 36), (16, 64, 1), (17, 37, 12), (70, 5, 2)])
def test_selection_is_the_references(backend: Backend, scope: str, rows: int, size: int, some: int) -> None:
    """Small integers, whose sums are exact: full of ties, and with zeros, infinities and NaN among them; norms that are
    negative, as invented ones are (--load-format dummy), take as many columns as any."""
    groups, width = 3, size * 3 + 4
    generator = torch.Generator().manual_seed(rows)
    x = torch.randint(-2, 3, (rows, width), generator=generator).float()
    columns = torch.randperm(width, generator=generator)[: size * groups].sort().values
    norms = torch.randint(-1, 3, (size * groups,), generator=generator).float()
    if rows > 1:
        x[0, columns[1]], x[1, columns[3]], x[0, columns[-1]] = torch.inf, torch.nan, torch.nan
    padding = torch.arange(rows) == rows - 1 if rows > 2 else None
    kept = x[:, columns]
    half = HalfSpec((0, 0), groups=groups, used=some * groups)
    mask = select_columns(kept, norms, padding, half, scope)
    packed, chosen = batch_of(backend, rows).used_inputs(
        x.to(backend.device),
        columns.int().to(backend.device),
        norms.to(backend.device),
        None if padding is None else padding.view(torch.uint8).to(backend.device),
        half,
        scope,
    )
    if scope == "token":
        torch.testing.assert_close(packed.cpu(), torch.where(mask, kept, 0), rtol=0, atol=0, equal_nan=True)
    else:
        assert chosen.tolist() == mask[0].nonzero().flatten().tolist()
        torch.testing.assert_close(packed.cpu(), kept[:, mask[0]], rtol=0, atol=0, equal_nan=True)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 3), st.lists(st.integers(-2, 41), min_size=1, max_size=70), st.booleans())
def test_routing(backend: Backend, num_experts: int, top_k: int, chosen: list[int], invariant: bool) -> None:
    """Each pair whose expert is here stands in exactly one of that expert's blocks, ascending; blocks never run out."""
    check_routing(backend, num_experts, torch.tensor(chosen * top_k).view(-1, top_k), invariant)


@pytest.mark.parametrize("pairs", [511, 512, 513, 1024, 1900])
@pytest.mark.parametrize("num_experts", [1, 37, 256])
def test_routing_of_more_pairs_than_a_program_sorts(backend: Backend, pairs: int, num_experts: int) -> None:
    """Experts of one chunk, of several and of none; ids that are nobody's among them."""
    generator = torch.Generator().manual_seed(pairs)
    ids = torch.randint(-1, num_experts + 1, (pairs, 1), generator=generator)
    ids[100:480] = num_experts // 2
    check_routing(backend, num_experts, ids, False)


def check_routing(backend: Backend, num_experts: int, ids: torch.Tensor, invariant: bool) -> None:
    chosen, ids = ids.flatten().tolist(), ids.int().to(backend.device)
    batch = backend.modules.launch.Batch(ids.float(), ids, num_experts, torch.float32, invariant)
    block_m = batch.tile("shrink").block_m
    blocks, experts = batch.pairs.cpu().view(-1, block_m), batch.block_experts.tolist()
    assert len(blocks) == len(experts)
    found: dict[int, list[int]] = {}
    for block, expert in zip(blocks.tolist(), experts, strict=True):
        if expert >= 0:
            rows = [row for row in block if row >= 0]
            assert rows
            assert block == rows + [-1] * (block_m - len(rows))
            found.setdefault(expert, []).extend(rows)
    expected = {e: [i for i, c in enumerate(chosen) if c == e] for e in range(num_experts)}
    assert found == {e: rows for e, rows in expected.items() if rows}
    assert [e for e in experts if e >= 0] == sorted(e for e in experts if e >= 0)


@pytest.mark.parametrize(
    ("variant", "scope"),
    [("pruned base", "batch"), ("pruned base", "token"), ("low-rank base", "off"), ("column deltas", "off")],
)
def test_no_shape_depends_on_data_and_nothing_is_waited_for(backend: Backend, variant: str, scope: str) -> None:
    arguments, spec = kernel_arguments(crowd(variant, scope), torch.float32)
    arguments = backend.to([*(t[:3] for t in arguments[:3]), *arguments[3:]])
    seen = shapes_seen(backend, arguments, spec, [[-1, 7], [7, 7], [2, 5]])
    assert seen[0] == seen[1]
    assert any(name == "empty" for name, _ in seen[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("variant", CROWDED)
def test_cuda_graph(variant: str, scope: str) -> None:
    """A captured layer gives the result of whatever inputs are there when it is replayed."""
    backend = Backend("cuda")
    arguments, spec = kernel_arguments(crowd(variant, scope), torch.bfloat16)
    arguments, layer = backend.to(arguments), backend.modules.layer.fused_experts
    inputs = [t.clone() for t in arguments[:3]]
    layer(*inputs, *arguments[3:], spec)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = layer(*inputs, *arguments[3:], spec)
    for order in (torch.arange(67), torch.arange(66, -1, -1), torch.zeros(67, dtype=torch.long)):
        for tensor, original in zip(inputs, arguments[:3], strict=True):
            tensor.copy_(original[order.to("cuda")])
        graph.replay()
        assert torch.equal(output, layer(*inputs, *arguments[3:], spec))


def test_what_it_does_not_do_is_said_in_one_line(backend: Backend) -> None:
    arguments, spec = kernel_arguments(random_case(6), torch.float64)
    with pytest.raises(ValueError, match=r"x's dtype is torch.float64, not one of torch.float32"):
        backend.run(arguments, spec)
    arguments, spec = kernel_arguments(random_case(6), torch.float32)
    with pytest.raises(ValueError, match="activation is 'relu', not one of silu, gelu, gelu_tanh, relu2"):
        backend.run(arguments, spec._replace(activation="relu"))
    with pytest.raises(ValueError, match="scope is 'tokens', not batch, token or off"):
        backend.run(arguments, spec._replace(scope="tokens"))


def test_a_gpu_gets_it_and_others_do_not_import_triton() -> None:
    assert choose_backend("cuda") == ("triton", None)
    assert "triton" not in {choose_backend(device)[0] for device in ("cpu", "mps", "xpu")}
    code = "import sys, torch; known = {*sys.modules}; import d2moe_vllm.ops; print('triton' in {*sys.modules} - known)"
    done = forks.python(code, imports=forks.TORCH)
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        ("os.environ['PATH'] = ''; os.environ.pop('CC', None)", "triton finds no C compiler; install gcc or clang"),
        ("sys.modules['triton'] = None", "triton is not installed; pip install triton"),
    ],
)
def test_without_what_it_needs_it_falls_back_and_says_why(prepare: str, words: str) -> None:
    code = f"import os, sys; from d2moe_vllm.ops import choose_backend; {prepare}; print(*choose_backend('cuda'))"
    done = forks.python(code, imports=forks.TORCH)
    assert done.stdout.startswith("reference backend 'triton' cannot be used: " + words)
    assert BACKENDS["triton"].devices == ("cuda",)
