"""A layer of a backend that has never run on such hardware, held against the reference before anything is served."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from d2moe_vllm import ops
from d2moe_vllm.ops.weights import LayerSpec

ROWS = (1, 17, 300)
"""Batches to compare: backends treat one token, a few and many differently."""

TOLERANCE = {torch.bfloat16: 0.02, torch.float16: 0.005, torch.float32: 0.002}
"""Root mean square of a row's differences, relative to the row's own: several roundings; float32 may be TF32 inside."""
ELEMENT = 8.0
"""How much larger one element's may be, relative to it or to its row: of some thousands of random ones it is 4."""
SELECTING = 0.2
"""In place of TOLERANCE where columns are selected: between two nearly equal ones rounding decides."""

SWITCH = """--additional-config '{"d2moe": {"backend": "reference"}}'"""
OURS = SWITCH.replace("reference", "triton")
Theirs = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Computes a packed layer in a backend's place, of x [T, H], gates [T, K] and local ids [T, K], -1 for none: [T, H]."""


class SelfCheckError(RuntimeError):
    """A backend does not compute what the reference does; the message is one line and names the switch."""


class Example(NamedTuple):
    """x [T, H], gates float32 [T, K], ids int32 [T, K]; padding bool [T]; expected: the reference's rows of them
    that are no padding, float32 [n, H]."""

    scope: str
    x: Tensor
    gates: Tensor
    ids: Tensor
    padding: Tensor | None
    expected: Tensor = torch.empty(0)


_DONE: set[object] = set()
"""Kinds of layers that this process has checked: backend, sizes by kind, dtypes and which tensors they have; "opted"
where it has said how far off a backend is."""


@contextmanager
def against_reference(
    read: Callable[[], Sequence[Tensor | None]],
    backend: str,
    spec: LayerSpec,
    *,
    hidden_size: int,
    top_k: int,
    dtype: torch.dtype,
    theirs: Theirs | None = None,
) -> Iterator[None]:
    """Around the packing of a layer's weights: computes with them before and after, and compares.

    Does nothing for backends that need no check (`Backend.check`) and for a kind of layer checked before.
    read: the layer's parameters as they are now, in the order of ops.PARAMETERS. dtype: of what the layer is given,
    which packed weights do not tell. theirs: see there; `backend` is what it is called then. Leaves torch's random
    state alone. Raises SelfCheckError.
    """
    parameters = read()
    # Triton compiles sizes that are multiples of 16 for themselves.
    even = tuple(size % 16 == 0 for half in (spec.w13, spec.w2) for size in (*half.ranks, *half.base_ranks, half.used))
    # So many bases are mixed in one loop, and more of them in two.
    bases = None if (found := ops.halves(parameters)[0].bases) is None else len(found)
    # Codes of each number of bits have kernels of their own, and so have rows that begin within a group.
    storages = (bool(spec.widths), spec.w13.base, spec.w13.delta, spec.w2.base, spec.w2.delta)
    begin = any((spec.w2.base_first, spec.w2.delta_first, *spec.skipped))
    types = (None if t is None else t.dtype for t in parameters)
    kind = (backend, even, spec.function, bases, dtype, storages, begin, *types)
    if (theirs is None and not ops.BACKENDS[backend].check) or kind in _DONE:
        yield
        return
    # Before packing, which may take the storage of the original.
    by_scope = theirs is None and ops.BACKENDS[backend].by_scope
    examples = list(_examples(parameters, hidden_size, top_k, dtype, spec, by_scope=by_scope))
    yield
    for example in examples:

        def compute(example: Example = example) -> Tensor:
            if theirs is not None:
                return _real(example, theirs(example.x, example.gates, example.ids))
            return _compute(backend, example, read(), spec)

        if (wrong := _difference(example, compute)) is not None:
            raise SelfCheckError(
                f"backend {backend!r} does not compute what the reference does on {_device(example.x)} ({wrong}): "
                f"not serving; start with {SWITCH if theirs is None else OURS} and report it"
            )
    _DONE.add(kind)


@contextmanager
def how_far_off(
    read: Callable[[], Sequence[Tensor | None]],
    backend: str,
    spec: LayerSpec,
    *,
    hidden_size: int,
    top_k: int,
    dtype: torch.dtype,
    say: Callable[[float], None],
) -> Iterator[None]:
    """Around the packing of a layer's weights, as `against_reference`, for a backend that computes something else
    (`Backend.opted`): `say` is told the root mean square of its differences from the reference, relative to what this
    gives, for a random token. Once in a process, of the first layer."""
    found = ops.BACKENDS.get(backend)
    parameters = read()
    if found is None or not found.opted or "opted" in _DONE:
        yield
        return
    device = next(t.device for t in parameters if t is not None)
    random: dict[str, Any] = {"generator": torch.Generator().manual_seed(0), "device": "cpu", "dtype": torch.float32}
    x = torch.randn(1, hidden_size, **random).to(device, dtype)
    # Those that are whole here: some may keep no channel.
    whole = [expert for expert in range(spec.num_experts) if not spec.widths or spec.widths[expert]]
    ids = torch.tensor([whole[:top_k]], dtype=torch.int32, device=device)
    example = Example(spec.scope, x, torch.full(ids.shape, 1 / top_k, dtype=torch.float32, device=device), ids, None)
    expected = _compute("reference", example, parameters, spec)
    yield
    _DONE.add("opted")
    if (size := float(expected.norm())) > 0:
        say(float((_compute(backend, example, read(), spec) - expected).norm()) / size)


def _examples(
    parameters: Sequence[Tensor | None],
    hidden_size: int,
    top_k: int,
    dtype: torch.dtype,
    spec: LayerSpec,
    *,
    by_scope: bool,
) -> Iterator[Example]:
    device = next(t.device for t in parameters if t is not None)
    # Weights that --load-format dummy invented may have norms below zero, by which nothing is selected.
    sane = all(half.base_norms is None or bool((half.base_norms >= 0).all()) for half in ops.halves(parameters))
    # Explicitly: while a model is loaded, torch's defaults are the model's.
    random: dict[str, Any] = {"generator": torch.Generator().manual_seed(0), "device": "cpu", "dtype": torch.float32}
    # Where columns are selected rounding decides between near ones: closely everything is compared without.
    scopes = {spec.scope: None} if by_scope else dict.fromkeys(("off", spec.scope if sane else "off"))
    for scope in scopes:
        for rows in ROWS:
            # Experts that this rank does not have, where there are too few here or by chance, of one row all.
            ids = torch.rand(rows, max(spec.num_experts, top_k), **random).argsort(dim=1)[:, :top_k].int()
            absent = (ids >= spec.num_experts) | (torch.rand(rows, top_k, **random) < 0.2)
            absent[rows // 2 + 1 : rows // 2 + 2] = True
            example = Example(
                scope,
                torch.randn(rows, hidden_size, **random).to(device, dtype),
                torch.rand(rows, top_k, **random).to(device),
                ids.masked_fill(absent, -1).to(device),
                (torch.arange(rows, device="cpu") >= max(1, rows - 2)).to(device) if scope == "batch" else None,
            )
            expected = _compute("reference", example, parameters, spec)
            if not bool(expected.isfinite().all()):
                raise SelfCheckError("a layer's outputs are not finite in the reference; look with `d2moe verify`")
            yield example._replace(expected=expected)


def _compute(backend: str, example: Example, parameters: Sequence[Tensor | None], spec: LayerSpec) -> Tensor:
    inputs = (example.x, example.gates, example.ids, *ops.halves(parameters), example.padding)
    return _real(example, ops.fused_experts(backend, *inputs, spec._replace(scope=example.scope)))


def _real(example: Example, output: Tensor) -> Tensor:
    """Rows that are no padding."""
    return (output if example.padding is None else output[~example.padding]).float()


def _difference(example: Example, compute: Callable[[], Tensor]) -> str | None:
    """What is wrong, in a few words; None if nothing is."""
    rows, where = len(example.x), f"{len(example.x)} rows, scope {example.scope!r}"
    try:
        output = compute()
    except Exception as failure:  # whatever a compiler, a driver or a kernel raises
        return f"{where}: {type(failure).__name__}: {' '.join(str(failure).split())[:300]}"
    if output.shape != example.expected.shape:
        return f"{where}: shape {list(output.shape)} for {list(example.expected.shape)}"
    bound = TOLERANCE[example.x.dtype] if example.scope == "off" else SELECTING
    size = example.expected.square().mean(dim=1).sqrt()
    error = output - example.expected
    of_rows = error.square().mean(dim=1).sqrt()
    largest = torch.maximum(example.expected.abs(), size.unsqueeze(1))
    # What is that small has few digits in float16 (weights that --load-format dummy invented make it so).
    floor = torch.finfo(example.x.dtype).tiny
    # Not the other way round: a comparison with NaN is false.
    fine = (of_rows <= bound * size + floor) & (error.abs() <= ELEMENT * bound * largest + floor).all(dim=1)
    if bool(fine.all()):
        return None
    worst = float((of_rows / size.clamp(min=torch.finfo(torch.float32).tiny))[~fine].max())
    return f"{where}: {int((~fine).sum())} of {rows} differ, by up to {worst:.3g} of a row where {bound} is rounding"


def _device(x: Tensor) -> str:
    return torch.cuda.get_device_name(x.device) if x.device.type == "cuda" else f"this {x.device.type}"
