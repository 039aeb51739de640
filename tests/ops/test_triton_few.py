"""Few bits and unequal widths in the Triton backend, against a float64 oracle and the reference, as in test_triton.py;
the cases are those of the C++ backend (test_cpu_few.py), smaller, since every step is interpreted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from few_cases import Few, few_cases, forward, lowest_codes, make, mixed_few, packing
from hypothesis import given, settings
from mixed_cases import forward as mixed_forward
from mixed_cases import mixed_case
from moe_cases import NO_GATE, SWIGLU
from triton_kernels import DEVICES, Backend, products_by_rows, shapes_seen

from d2moe_vllm import ops
from d2moe_vllm.ops import reference, selfcheck, triton
from d2moe_vllm.ops.packing import Packing, opened
from d2moe_vllm.ops.reference import fused_experts
from d2moe_vllm.ops.selfcheck import SelfCheckError, against_reference
from d2moe_vllm.ops.triton.layout import padded_widths, units
from d2moe_vllm.ops.weights import Weights

SMALL = Few(
    11, tokens=6, hidden=72, intermediate=100, experts=5, absent=0.1, ranks=(48, 33, 40), base_ranks=(40, 40, 24)
)
UNEQUAL: dict[str, Any] = {"widths": (100, 16, 0, 37, 71), "skipped": (0, 5, 0, 37, 64)}
COLUMNS: dict[str, Any] = {"base": "columns", "groups": 4, "kept": (14, 20), "used": (7, 11)}
LAYERS: dict[str, Few] = {
    "8 and 3 bits": replace(SMALL, storages=((8, 64), (3, 32))),
    "4 and 2 bits": replace(SMALL, storages=((4, 32), (2, 128))),
    "a group that another rank began": replace(SMALL, storages=((8, 64), (2, 64)), delta_first=147),
    "a group of three bits that another rank began": replace(SMALL, storages=((2, 64), (3, 64)), delta_first=77),
    "not packed": replace(SMALL, storages=(None, None)),
    "unequal widths": replace(SMALL, storages=((3, 64), (4, 32)), **UNEQUAL),
    "unequal widths, three bits": replace(SMALL, storages=((8, 64), (3, 64)), **UNEQUAL),
    "unequal widths, down alone is packed": replace(SMALL, storages=(None, (2, 64)), **UNEQUAL),
    "unequal widths, not packed": replace(SMALL, storages=(None, None), **UNEQUAL),
    "on a base": replace(SMALL, storages=((2, 64), (2, 64)), base="full", base_storage=(4, 64), base_first=32),
    "on a base, unequal widths": replace(
        SMALL, storages=((2, 64), (3, 64)), base="full", base_storage=(4, 64), without=(3,), base_first=77, **UNEQUAL
    ),
    "on a base of 16 bits, unequal widths": replace(SMALL, storages=((2, 64), (2, 64)), base="full", **UNEQUAL),
    "on a base of columns": replace(
        SMALL, storages=((3, 64), (2, 64)), base_storage=(4, 64), without=(1, 4), **COLUMNS
    ),
    "on a low-rank base": replace(SMALL, storages=((4, 64), (8, 64)), base="low rank", base_storage=(3, 32)),
    "factors": replace(SMALL, delta="factors", storages=((8, 64), (4, 32)), base_storage=(8, 64), **COLUMNS),
    "factors, unequal widths": replace(SMALL, delta="factors", storages=((8, 64), (3, 64)), **UNEQUAL),
    "factors, unequal widths, not packed": replace(SMALL, delta="factors", storages=(None, None), **UNEQUAL),
    "shared V": replace(SMALL, delta="shared V", storages=((2, 64), (8, 128))),
    "columns": replace(SMALL, delta="columns", storages=((4, 32), (8, 64)), delta_first=45),
    "biases": replace(SMALL, storages=((4, 64), (3, 64)), biased=True, swiglu=SWIGLU),
    "biases, on a base, unequal widths": replace(
        SMALL, storages=((2, 64), (3, 64)), base="full", without=(3,), biased=True, swiglu=SWIGLU, **UNEQUAL
    ),
    "no gate": replace(SMALL, storages=((4, 32), (3, 64)), **NO_GATE),
    "no gate, not packed": replace(SMALL, storages=(None, None), **NO_GATE),
    "no gate, on a base, unequal widths": replace(
        SMALL, storages=((2, 64), (3, 64)), base="full", base_storage=(4, 64), without=(3,), **NO_GATE, **UNEQUAL
    ),
    "no gate, biases, unequal widths, not packed": replace(
        SMALL, storages=(None, None), biased=True, **NO_GATE, **UNEQUAL
    ),
    "no gate, on a base of columns": replace(
        SMALL, storages=((3, 64), (8, 64)), base_storage=(2, 64), biased=True, **NO_GATE, **COLUMNS
    ),
    "no gate, factors, unequal widths": replace(
        SMALL, delta="factors", storages=((8, 64), (2, 32)), **NO_GATE, **UNEQUAL
    ),
    "no gate, on a low-rank base": replace(
        SMALL, storages=((8, 64), (4, 64)), base="low rank", base_storage=(3, 32), **NO_GATE
    ),
}
"""Sizes that are multiples of nothing, experts with no tokens and with no channels among them."""


def cloned(halves: Any) -> list[Weights]:
    """Packing takes the storage of what it packs."""
    return [Weights(*(None if t is None else t.clone() for t in half)) for half in halves]


@pytest.fixture(scope="module", params=DEVICES)
def backend(request: pytest.FixtureRequest) -> Backend:
    return Backend(request.param)


@pytest.fixture
def large_tiles(backend: Backend) -> Iterator[None]:
    """As few steps as can be, where each is interpreted; on a GPU the tiles that are served with."""
    tiles = backend.modules.tiles
    forced = {kernel: {1: tiles.Tile(16, 64, 256, 4, 1)} for kernel in ("base", "base_few", *tiles.GROUPED)}
    # V's, of all experts at once, are large.
    forced |= {kernel: {1: tiles.Tile(16, 16, 32, 4, 1)} for kernel in ("shrink_mixed", "shrink_mixed_few")}
    with tiles.using(forced if backend.device == "cpu" else {}):
        yield


def packed(backend: Backend, made: Any) -> tuple[list[Any], Any]:
    return backend.to([*made.arguments[:3], *triton.pack(*cloned(made.arguments[3:5]), made.spec), None]), made.spec


def run(backend: Backend, arguments: list[Any], spec: Any) -> torch.Tensor:
    """For arguments as a checkpoint has them."""
    return backend.run([*arguments[:3], *triton.pack(*cloned(arguments[3:5]), spec), *arguments[5:]], spec)


def equals_the_oracle(backend: Backend, few: Few) -> None:
    made = make(few)
    found, real = run(backend, made.arguments, made.spec).double().numpy(), slice(0, few.tokens - few.padding)
    np.testing.assert_allclose(found[real], forward(few, made)[real], rtol=1e-3, atol=2e-4)


@settings(max_examples=6, deadline=None)
@given(few_cases())
def test_float32_equals_the_oracle(backend: Backend, few: Few) -> None:
    """Any variant of weights, scope, routing, padding: experts without channels, no token at all."""
    tiles = backend.modules.tiles
    with tiles.using({kernel: {1: tiles.Tile(16, 64, 256, 4, 1)} for kernel in ("base", "base_few", *tiles.GROUPED)}):
        equals_the_oracle(backend, few)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(few_cases())
def test_float32_equals_the_oracle_in_many_layers(backend: Backend, few: Few) -> None:
    equals_the_oracle(backend, few)


@pytest.mark.usefixtures("large_tiles")
@pytest.mark.parametrize("name", LAYERS)
def test_rounding_is_no_worse_than_the_reference(backend: Backend, name: str) -> None:
    """Weights are rounded where the reference rounds them."""
    for dtype in backend.dtypes[1:]:
        few = replace(LAYERS[name], dtype=dtype)
        made = make(few)
        exact = torch.from_numpy(forward(few, made))
        outputs = (run(backend, made.arguments, made.spec), fused_experts(*made.arguments, made.spec))
        errors = [float((y.double() - exact).norm() / exact.norm()) for y in outputs]
        assert errors[0] <= 1.3 * errors[1] + 2e-7, dtype


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_rounding_is_no_worse_in_a_crowd(backend: Backend, name: str) -> None:
    """With the tiles that are served with: several steps, blocks and parts of a sum; several blocks of one expert."""
    for dtype in backend.dtypes:
        few = replace(LAYERS[name], dtype=dtype, tokens=67, experts=5)
        made = make(few)
        exact = torch.from_numpy(forward(few, made))
        outputs = (run(backend, made.arguments, made.spec), fused_experts(*made.arguments, made.spec))
        errors = [float((y.double() - exact).norm() / exact.norm()) for y in outputs]
        assert errors[0] <= 1.3 * errors[1] + 3e-7, dtype


def same_bits(backend: Backend, name: str, scope: str, count: int, sizes: tuple[int, ...]) -> None:
    made = make(replace(LAYERS[name], dtype=backend.dtypes[-1], scope=scope, tokens=count, absent=0.1))
    arguments, spec = packed(backend, made)
    spec = spec._replace(batch_invariant=True)

    def some(rows: torch.Tensor) -> torch.Tensor:
        return backend.run([*(t[rows.to(t.device)] for t in arguments[:3]), *arguments[3:]], spec)

    with products_by_rows():
        together = some(torch.arange(count))
        for size in sizes:
            rows = torch.randperm(count, generator=torch.Generator().manual_seed(size))[:size]
            assert torch.equal(some(rows), together[rows]), size
    assert not torch.equal(together[:2], together[2:4])


@pytest.mark.usefixtures("large_tiles")
@pytest.mark.parametrize(("name", "scope"), [("on a base of columns", "token"), ("on a base, unequal widths", "off")])
def test_batch_invariant_rows_are_the_same_bits_alone_and_in_a_crowd(backend: Backend, name: str, scope: str) -> None:
    same_bits(backend, name, scope, 18, (1, 3))


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_batch_invariant_rows_of_every_layer_are_the_same_bits(backend: Backend, name: str) -> None:
    """With the tiles that are served with."""
    same_bits(backend, name, "token", 20, (1, 7))


@pytest.mark.usefixtures("large_tiles")
@pytest.mark.parametrize("scope", ["token", "batch"])
def test_columns_of_a_packed_base_are_chosen_as_elsewhere(backend: Backend, scope: str) -> None:
    """In batch scope padding has no say, whatever it is."""
    few = replace(SMALL, storages=((2, 64), (4, 64)), base_storage=(3, 64), padding=2, scope=scope, **COLUMNS)
    made = make(few)
    clean = run(backend, made.arguments, made.spec)[:4]
    np.testing.assert_allclose(clean.double().numpy(), forward(few, made)[:4], rtol=1e-3, atol=2e-4)
    made.arguments[0][4:] = torch.nan
    assert torch.equal(run(backend, made.arguments, made.spec)[:4], clean)


MERGED: dict[str, Few] = {
    "all widths": replace(SMALL, storages=((2, 64), (4, 64)), base="full", base_storage=(3, 32), without=(1, 4)),
    "another rank began": replace(
        SMALL, storages=((2, 64), (3, 64)), base="full", base_storage=(4, 128), base_first=77, delta_first=77
    ),
    "unequal widths": replace(LAYERS["on a base, unequal widths"], biased=True),
    "no gate": replace(SMALL, storages=((4, 64), (2, 64)), base="full", base_storage=(2, 32), without=(1,), **NO_GATE),
    "no gate, unequal widths": replace(LAYERS["no gate, on a base, unequal widths"], biased=True),
}


@pytest.mark.usefixtures("large_tiles")
@pytest.mark.parametrize("name", MERGED)
def test_where_rows_are_many_a_base_is_added_to_deltas_before_one_product(
    backend: Backend, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In gate and up, and in down where its inputs are the same for all; experts without deltas have the base alone."""
    launch, few = backend.modules.launch, MERGED[name]
    added = []

    def noted(kernel: str, run: Any) -> Any:
        def note(*args: Any, **options: Any) -> Any:
            added.append((kernel, options.get("base") is not None))
            return run(*args, **options)

        return note

    for kernel in ("expand_and_activate", "factor_product"):
        monkeypatch.setattr(launch.Batch, kernel, noted(kernel, getattr(launch.Batch, kernel)))
    monkeypatch.setattr(launch, "MANY_ROWS", 16)
    equals_the_oracle(backend, few)
    down = [("factor_product", False)] * 2 if few.widths else [("factor_product", True)]
    assert added == [("expand_and_activate", True), *down]


@pytest.mark.usefixtures("large_tiles")
@pytest.mark.parametrize("name", ["4 and 2 bits", "unequal widths", "on a base, unequal widths"])
def test_experts_that_are_nowhere_or_keep_nothing(backend: Backend, name: str) -> None:
    """Ids out of range, and experts without channels, add nothing; no token at all is none."""
    made = make(LAYERS[name])
    arguments = list(made.arguments)
    arguments[2] = torch.full_like(arguments[2], 2 if LAYERS[name].widths else 8)
    assert not run(backend, arguments, made.spec).any()
    assert run(backend, [t[:0] for t in arguments[:3]] + arguments[3:], made.spec).shape == (0, 72)


@pytest.mark.usefixtures("large_tiles")
def test_experts_none_of_which_keeps_anything(backend: Backend) -> None:
    made = make(replace(SMALL, storages=((3, 64), (4, 32)), widths=(0,) * 5, skipped=(0,) * 5))
    assert not run(backend, made.arguments, made.spec).any()


@pytest.mark.parametrize(
    "name",
    ["on a base, unequal widths", "on a base of columns", "factors, unequal widths", "unequal widths, not packed"],
)
@pytest.mark.usefixtures("large_tiles")
def test_no_shape_depends_on_data_and_nothing_is_waited_for(backend: Backend, name: str) -> None:
    scope = "batch" if LAYERS[name].base == "columns" else "off"
    made = make(replace(LAYERS[name], tokens=3, scope=scope))
    arguments, spec = packed(backend, made)
    seen = shapes_seen(backend, arguments, spec, [[-1, 7], [4, 4], [2, 3]])
    # What is copied to the device when a layer is first called is there from then on.
    assert seen[0][-8:] == seen[1][-8:]
    assert seen[1] == [one for one in seen[0] if one in seen[1]]


def test_a_code_that_no_compressor_writes_is_the_number_it_stands_for(backend: Backend) -> None:
    for arguments, spec, expected in lowest_codes():
        torch.testing.assert_close(run(backend, arguments, spec), expected, rtol=1e-3, atol=5e-3)


PACKED_BASES: dict[str, tuple[tuple[int, int], dict[str, Any]]] = {
    "8 bits": ((8, 64), {"bases": 1, "hidden": 72}),
    "4 bits, more bases than are mixed at once": ((4, 32), {"bases": 37, "hidden": 40, "function": "tanh"}),
    "3 bits, a last group that is short": ((3, 64), {"bases": 5, "groups": 5, "hidden": 100, "num_experts": 20}),
    "2 bits": ((2, 128), {"bases": 3, "hidden": 140, "absent": 0.3}),
}
"""Of MoBE; in sizes that are multiples of nothing, in several blocks of rows of V and steps of its inputs."""


@pytest.mark.usefixtures("large_tiles")
@pytest.mark.parametrize("name", PACKED_BASES)
def test_packed_bases_that_vs_are_mixed_from(backend: Backend, name: str) -> None:
    """No worse than the reference, which opens all bases; a row's bits in other company are the same."""
    storage, sizes = PACKED_BASES[name]
    for dtype in backend.dtypes:
        arguments, spec, expected = mixed_few(6, dtype, storage, tokens=7, intermediate=40, rank=(19, 9), **sizes)
        exact = torch.from_numpy(expected)
        outputs = (run(backend, arguments, spec), fused_experts(*arguments, spec))
        errors = [float((y.double() - exact).norm() / exact.norm()) for y in outputs]
        assert errors[0] <= 1.3 * errors[1] + 3e-7, dtype
    spec = spec._replace(batch_invariant=True)
    with products_by_rows():
        together = run(backend, arguments, spec)
        some = torch.tensor([5, 2])
        assert torch.equal(run(backend, [*(t[some] for t in arguments[:3]), *arguments[3:]], spec), together[some])


@pytest.mark.usefixtures("large_tiles")
def test_a_packed_down_of_mobe(backend: Backend) -> None:
    """Beside bases that are not."""
    few = Few(6, hidden=40)
    arguments, spec = mixed_case(6, tokens=3, hidden=40, intermediate=48, bases=2)
    down = [few.matrix(40, 48, (3, 64)) for _ in range(4)]
    exact = arguments[4]._replace(dense=torch.stack([one[2] for one in down]))
    expected = mixed_forward([*arguments[:4], exact, None], spec)
    spec = spec._replace(w2=spec.w2._replace(delta=packing((3, 64))))
    dense = {"dense": torch.stack([one[0] for one in down]), "dense_scales": torch.stack([one[1] for one in down])}
    arguments[4] = arguments[4]._replace(**dense)
    found = run(backend, arguments, spec).double().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


# How matrices are laid


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("widths", [(), (256, 64, 0, 128, 32, 224)])
def test_packing_takes_no_more_memory_where_sizes_are_multiples(bits: int, widths: tuple[int, ...]) -> None:
    """Neither codes nor scales are widened, and both lie where they lay."""
    few = Few(2, hidden=128, intermediate=256, experts=6, storages=((bits, 64), (bits, 32)), widths=widths)
    few = replace(few, base="full", base_storage=(bits, 64), skipped=(0,) * len(widths))
    made = make(few)
    for before, after in zip(made.arguments[3:5], triton.pack(*made.arguments[3:5], made.spec), strict=True):
        for name, old, new in zip(Weights._fields, before, after, strict=True):
            if name != "channels":
                assert old is None or (new.data_ptr() == old.data_ptr() and new.nbytes == old.nbytes)


@pytest.mark.parametrize(("bits", "group", "first"), [(8, 32, 0), (4, 64, 5), (3, 64, 0), (3, 128, 77), (2, 32, 40)])
def test_words_hold_codes_by_units_of_inputs(bits: int, group: int, first: int) -> None:
    """By the layout's definition, code by code; what is no input of this rank is 0."""
    how = Packing(bits, {8: 128.0, 4: 8.0, 3: 3.5, 2: 1.5}[bits], group)
    made = make(Few(1, hidden=6, intermediate=50, experts=2, storages=((8, 32), (bits, group)), delta_first=first))
    w2 = made.arguments[4]
    codes = opened(w2.dense, torch.ones_like(w2.dense_scales), how, (50,), first) + how.zero
    laid = triton.pack(*cloned(made.arguments[3:5]), made.spec)[1]
    words = laid.dense.view(2, units(50, first), bits, 16).long() & 0xFFFFFFFF
    scales = laid.dense_scales.view(2, -1, 16)
    assert torch.equal(scales[:, :, :6], w2.dense_scales.transpose(1, 2))
    assert not scales[:, :, 6:].any()
    for place in range(units(50, first) * 32):
        unit, within = words[:, place // 32], place % 32
        if bits == 3:
            low, high = unit[:, within // 16] >> 2 * (within % 16) & 3, unit[:, 2] >> within & 1
            found = low + 4 * high
        else:
            word, shift = divmod(within * bits, 32)
            found = unit[:, word] >> shift & (1 << bits) - 1
        own = place - first % 32
        expected = codes[:, :, own].long() if 0 <= own < 50 else torch.zeros(2, 6, dtype=torch.long)
        assert torch.equal(found[:, :6], expected), place


def test_channels_are_padded_to_whole_units() -> None:
    spec = make(LAYERS["unequal widths"]).spec
    assert padded_widths(spec) == [128, 32, 0, 64, 96]
    assert padded_widths(make(LAYERS["unequal widths, not packed"]).spec) == [128, 32, 0, 64, 96]


# What is chosen, checked and refused


@pytest.fixture
def check(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Loads a layer with this backend, packing as it does, or with something else; held against the reference."""
    monkeypatch.setattr(selfcheck, "_DONE", set())
    monkeypatch.setattr(selfcheck, "ROWS", (1, 5))

    def load(name: str, compute: Any = None, pack: Any = triton.pack) -> None:
        compute = compute or backend.modules.layer.fused_experts
        monkeypatch.setitem(ops.BACKENDS, "new", ops.Backend(compute, pack=pack, check=True))
        made = make(LAYERS[name])
        parameters = backend.to(ops.flat(*cloned(made.arguments[3:5])))
        with against_reference(lambda: parameters, "new", made.spec, hidden_size=72, top_k=2, dtype=torch.float32):
            if pack is not None:
                parameters = ops.flat(*pack(*ops.halves(parameters), made.spec))

    return load


@pytest.mark.usefixtures("large_tiles")
def test_such_layers_are_checked_when_a_model_is_loaded(check: Any) -> None:
    check("on a base, unequal widths")
    assert len(selfcheck._DONE) == 1


def with_scales_of_the_next_group(*inputs: Any) -> torch.Tensor:
    w13 = inputs[3]
    return reference.fused_experts(*inputs[:3], w13._replace(dense_scales=w13.dense_scales.roll(1, -1)), *inputs[4:])


@pytest.mark.usefixtures("large_tiles")
def test_what_computes_them_wrong_is_refused(check: Any) -> None:
    with pytest.raises(SelfCheckError, match="differ"):
        check("4 and 2 bits", with_scales_of_the_next_group, None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", LAYERS)
def test_cuda_graph(name: str) -> None:
    """A captured layer gives the result of whatever inputs are there when it is replayed."""
    backend = Backend("cuda")
    arguments, spec = packed(backend, make(replace(LAYERS[name], dtype=torch.bfloat16, tokens=67)))
    inputs = [t.clone() for t in arguments[:3]]
    layer = partial(backend.modules.layer.fused_experts, *inputs, *arguments[3:], spec)
    layer()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = layer()
    for order in (torch.arange(67), torch.arange(67).flip(0), torch.zeros(67, dtype=torch.long)):
        for tensor, original in zip(inputs, arguments[:3], strict=True):
            tensor.copy_(original[order.to("cuda")])
        graph.replay()
        assert torch.equal(output, layer())
