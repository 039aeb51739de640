"""What is checked when a model is loaded: a backend that computes something else than the reference is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from few_cases import Few, make
from moe_cases import CROWDED, crowd, random_case
from moe_oracle import kernel_arguments
from torch import Tensor

from d2moe_vllm import ops
from d2moe_vllm.ops import Backend, cpu, reference, selfcheck
from d2moe_vllm.ops.selfcheck import SelfCheckError, against_reference
from d2moe_vllm.ops.weights import LayerSpec

Change = Callable[..., Tensor]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _nothing_checked_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selfcheck, "_DONE", set())


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[[Backend], None]:
    return lambda backend: monkeypatch.setitem(ops.BACKENDS, "new", backend._replace(check=True))


def load(arguments: list[Any], spec: LayerSpec) -> list[Tensor | None]:
    """Packs as a layer that is loaded does, within the check."""
    parameters = [None if t is None else t.clone() for t in ops.flat(*arguments[3:5])]
    hidden, top_k = arguments[0].shape[1], arguments[2].shape[1]
    with against_reference(lambda: parameters, "new", spec, hidden_size=hidden, top_k=top_k, dtype=arguments[0].dtype):
        if (pack := ops.BACKENDS["new"].pack) is not None:
            parameters = ops.flat(*pack(*ops.halves(parameters), spec))
    return parameters


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scope", ["off", "token", "batch"])
@pytest.mark.parametrize("variant", CROWDED)
def test_a_right_backend_is_let_through(
    install: Callable[[Backend], None], variant: str, scope: str, dtype: torch.dtype
) -> None:
    """The C++ backend, whose packing takes the storage of what it packs; the random state stays as it was."""
    install(ops.BACKENDS["cpu"])
    state = torch.get_rng_state()
    load(*kernel_arguments(crowd(variant, scope), dtype))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("by_scope", [False, True])
@pytest.mark.parametrize("scope", ["token", "batch"])
def test_what_is_packed_for_every_scope_is_compared_without_one_too(
    monkeypatch: pytest.MonkeyPatch, scope: str, by_scope: bool
) -> None:
    """Within the bound of rounding, which a selection has not."""
    seen: list[str] = []

    def computes(*inputs: Any) -> Tensor:
        seen.append(inputs[-1].scope)
        return reference.fused_experts(*inputs)

    monkeypatch.setitem(
        ops.BACKENDS, "new", Backend(computes, pack=lambda *halves: halves[:2], check=True, by_scope=by_scope)
    )
    load(*kernel_arguments(crowd(next(iter(CROWDED)), scope), torch.float32))
    assert set(seen) == ({scope} if by_scope else {"off", scope})


def wrong_column(output: Tensor) -> Tensor:
    """Of the last column, as a kernel that is off by one at an odd size would."""
    return torch.cat([output[:, :-1], output[:, -2:-1]], dim=1)


def without_gates(*inputs: Any) -> Tensor:
    return reference.fused_experts(inputs[0], torch.ones_like(inputs[1]), *inputs[2:])


def without_deltas(*inputs: Any) -> Tensor:
    halves = (half._replace(delta_u=None) for half in inputs[3:5])
    return reference.fused_experts(*inputs[:3], *halves, *inputs[5:])


def absent_are_expert_0(*inputs: Any) -> Tensor:
    return reference.fused_experts(*inputs[:2], inputs[2].clamp(min=0), *inputs[3:])


def nothing_selected(*inputs: Any) -> Tensor:
    *inputs, spec = inputs
    w13, w2 = (half._replace(used=half.used // 4) for half in (spec.w13, spec.w2))
    return reference.fused_experts(*inputs, spec._replace(w13=w13, w2=w2))


def many_rows_wrong(*inputs: Any) -> Tensor:
    output = reference.fused_experts(*inputs)
    output[256:] = 0
    return output


def fails(*inputs: Any) -> Tensor:
    raise RuntimeError("out of resource: shared memory,\nRequired: 300000")


WRONG = {
    "a column": (lambda *i: wrong_column(reference.fused_experts(*i)), "17 rows|1 rows"),
    "three per cent": (lambda *i: reference.fused_experts(*i) * 1.03, "by up to 0.0[23]"),
    "NaN": (lambda *i: reference.fused_experts(*i).index_fill(1, torch.tensor([5]), torch.nan), "differ"),
    "gates": (without_gates, "differ"),
    "deltas": (without_deltas, "differ"),
    "absent experts": (absent_are_expert_0, "differ"),
    "selection": (nothing_selected, "scope 'batch'"),
    "many rows": (many_rows_wrong, "of 300 differ"),
    "shape": (lambda *i: reference.fused_experts(*i)[:, :-1], "shape"),
    "an error": (fails, "RuntimeError: out of resource: shared memory, Required: 300000"),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_backend_is_refused(install: Callable[[Backend], None], kind: str, dtype: torch.dtype) -> None:
    """In one line that names the switch; also the second time, since nothing has passed."""
    compute, words = WRONG[kind]
    install(Backend(compute))
    for _ in range(2):
        with pytest.raises(SelfCheckError, match=words) as error:
            load(*kernel_arguments(crowd("pruned base", "batch"), dtype))
        assert """--additional-config '{"d2moe": {"backend": "reference"}}'""" in str(error.value)
        assert "\n" not in str(error.value)


def test_only_what_is_new_is_checked(install: Callable[[Backend], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer of a kind, and layers of every kind; never the backends that have run on their hardware."""
    calls = []

    def count(*inputs: Any) -> Tensor:
        calls.append(len(inputs[0]))
        return reference.fused_experts(*inputs)

    install(Backend(count))
    for _ in range(3):
        load(*kernel_arguments(crowd("pruned base", "off"), torch.float32))
    assert tuple(calls) == selfcheck.ROWS
    load(*kernel_arguments(crowd("shared V", "off"), torch.float32))
    assert tuple(calls) == 2 * selfcheck.ROWS
    monkeypatch.setitem(ops.BACKENDS, "new", Backend(fails))
    load(*kernel_arguments(crowd("trimmed", "off"), torch.float32))


def test_fewer_experts_here_than_a_token_is_routed_to(install: Callable[[Backend], None]) -> None:
    """As under expert parallelism; and with a model's defaults for dtype, as while it is loaded."""
    install(Backend(cpu.fused_experts, ("cpu",), cpu.pack))
    torch.set_default_dtype(torch.bfloat16)
    try:
        arguments, spec = kernel_arguments(random_case(3, num_experts=2, top_k=2), torch.float32)
        load(arguments, spec._replace(num_experts=1))
    finally:
        torch.set_default_dtype(torch.float32)


def invented(dtype: torch.dtype) -> tuple[list[Any], LayerSpec]:
    """A layer as --load-format dummy fills it: floats, norms too, between -0.001 and 0.001."""
    arguments, spec = kernel_arguments(crowd("pruned base", "batch"), dtype)
    for half in arguments[3:5]:
        for tensor in half:
            if tensor is not None and tensor.is_floating_point():
                tensor.uniform_(-1e-3, 1e-3)
    return arguments, spec


@pytest.mark.parametrize("dtype", DTYPES)
def test_invented_weights_can_be_checked(install: Callable[[Backend], None], dtype: torch.dtype) -> None:
    install(ops.BACKENDS["cpu"])
    load(*invented(dtype))


def test_invented_weights_are_checked(install: Callable[[Backend], None]) -> None:
    install(Backend(without_gates))
    with pytest.raises(SelfCheckError, match="differ"):
        load(*invented(torch.bfloat16))


def test_damaged_weights_are_not_the_backends_fault(install: Callable[[Backend], None]) -> None:
    install(ops.BACKENDS["cpu"])
    arguments, spec = kernel_arguments(crowd("pruned base", "off"), torch.float32)
    arguments[3].base[0, 0] = torch.nan
    with pytest.raises(SelfCheckError, match="not finite in the reference; look with `d2moe verify`"):
        load(arguments, spec)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scope", ["off", "token", "batch"])
@pytest.mark.parametrize("variant", CROWDED)
def test_the_triton_backend_is_let_through_on_a_gpu(variant: str, scope: str, dtype: torch.dtype) -> None:
    arguments, spec = kernel_arguments(crowd(variant, scope), dtype)
    parameters = [None if t is None else t.cuda() for t in ops.flat(*arguments[3:5])]
    with against_reference(lambda: parameters, "triton", spec, hidden_size=arguments[0].shape[1], top_k=2, dtype=dtype):
        pass
    assert selfcheck._DONE


def test_what_has_never_run_on_its_hardware_is_checked() -> None:
    assert {name for name, backend in ops.BACKENDS.items() if backend.check} == {"triton"}
    assert {name for name, backend in ops.BACKENDS.items() if backend.opted} == {"cpu-int8"}


@pytest.mark.parametrize("backend", ["cpu", "cpu-int8"])
def test_how_far_a_backend_is_off_that_computes_something_else_is_said_once(backend: str) -> None:
    """Of the first layer that it packs; nothing is said of one that computes the same."""
    made = make(Few(1, torch.bfloat16, hidden=256, intermediate=128, widths=(128, 0, 64, 32), skipped=(0,) * 4))
    said: list[float] = []
    for _ in range(2):
        parameters = [None if t is None else t.clone() for t in ops.flat(*made.arguments[3:5])]
        known: Any = {"hidden_size": 256, "top_k": 2, "dtype": torch.bfloat16, "say": said.append}
        with selfcheck.how_far_off(lambda: parameters, backend, made.spec, **known):  # noqa: B023 - called within
            parameters = ops.flat(*ops.BACKENDS[backend].pack(*ops.halves(parameters), made.spec))  # type: ignore[misc]
    assert len(said) == (backend == "cpu-int8")
    assert all(0.003 < error < 0.03 for error in said)
