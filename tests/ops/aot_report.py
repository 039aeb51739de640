"""Compiles the Triton kernels that layers launch for GPUs: `aot_report.py TARGETS DTYPES [all | KERNEL [rotated]]`, in
a process of its own, where nothing is interpreted or found in a cache. One line of JSON per kernel on stdout; "odd": it
is launched for sizes only that no real model has, whose rows do not begin at multiples of 16 bytes. rotated: each for
one of the targets, the next for the next.

Layers are on the meta device, in the sizes of real models and in odd ones, of every variant of the format.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import aot
from layer_shapes import SHAPES, Shape

from d2moe_vllm.ops.packing import Packing
from d2moe_vllm.ops.triton import layer, tiles
from d2moe_vllm.ops.triton.launch import Matrices
from d2moe_vllm.ops.weights import HalfSpec, LayerSpec, Weights

PROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148}
"""Of A100, H100, B200: how sums are split depends on them."""
ODD = Shape(200, 328, 6, 2)
"""Multiples of 8 and of no 16."""
ZERO = {8: 128.0, 4: 8.0, 3: 3.5, 2: 1.5}
MANY = Shape(7168, 2048, 256, 8)
"""DeepSeek-V3's experts: 64 bases, more than are mixed at once."""
VARIANTS = (
    "base", "low-rank base", "no base", "shared V", "columns", "trimmed", "no deltas", "bases", "biases", "no gate",
    "no gate, low-rank base",
)  # fmt: skip
FEW: dict[str, dict[str, Any]] = {
    **{f"{bits} bits": {"bits": bits} for bits in (8, 4, 3, 2)},
    "2 bits on a base": {"bits": 2, "base_bits": 4, "base": "full"},
    "3 bits on a base of 8": {"bits": 3, "base_bits": 8, "base": "full"},
    "3 bits on a base of 3": {"bits": 3, "base_bits": 3, "base": "full"},
    "2 bits, unequal": {"bits": 2, "unequal": True},
    "3 bits, unequal, on a base": {"bits": 3, "base_bits": 4, "base": "full", "unequal": True, "biased": True},
    "16 bits, unequal, on a base": {"bits": 16, "base": "full", "unequal": True},
    "factors": {"bits": 4, "base_bits": 4, "base": "columns", "delta": "factors"},
    "factors, unequal": {"bits": 4, "delta": "factors", "unequal": True},
    "factors of 16 bits, unequal": {"bits": 16, "delta": "factors", "unequal": True},
    "shared V of few bits": {"bits": 2, "delta": "shared V", "base_bits": 4, "base": "low rank"},
    "columns of few bits": {"bits": 4, "delta": "columns"},
    "cut": {"bits": 4, "first": 16, "base_bits": 4, "base": "full"},
    "8 bits of MoBE": {"bits": 8, "delta": "bases"},
    "3 bits of MoBE": {"bits": 3, "delta": "bases"},
    "trimmed, whole": {"bits": 4, "base_bits": 4, "base": "full", "trimmed": True},
    "no gate, 4 bits": {"bits": 4, "gate": False},
    "no gate, 16 bits": {"bits": 16, "gate": False},
    "no gate, 2 bits on a base": {"bits": 2, "base_bits": 4, "base": "full", "gate": False},
    "no gate, 3 bits, unequal, on a base": {
        "bits": 3,
        "base_bits": 4,
        "base": "full",
        "unequal": True,
        "biased": True,
        "gate": False,
    },
    "no gate, 16 bits, unequal": {"bits": 16, "unequal": True, "biased": True, "gate": False},
    "no gate, factors": {"bits": 4, "base_bits": 4, "base": "columns", "delta": "factors", "gate": False},
}
"""Layers of few bits and of unequal widths, by what `few_half` makes of them."""
MAIN = ("4 bits", "2 bits on a base", "3 bits, unequal, on a base")
"""What `compress` makes most: in the sizes of every real model."""


def half(shape: Shape, dtype: torch.dtype, variant: str, name: str) -> tuple[Weights, HalfSpec]:
    """The weights of "w13" or "w2", and what is constant of them."""
    inputs, out, parts = (
        (shape.hidden, shape.intermediate, 1 if variant.startswith("no gate") else 2)
        if name == "w13"
        else (shape.intermediate, shape.hidden, 1)
    )
    odd = shape is ODD
    rank, stored = 33 if odd else 512, shape.experts - (variant in ("trimmed", "biases"))
    new = partial(torch.empty, dtype=dtype, device="meta")
    integers = partial(torch.empty, dtype=torch.int32, device="meta")
    fields: dict[str, Tensor] = {}
    base_rank = 0
    if variant == "bases":
        if name == "w2":
            return Weights(dense=new(stored, out, inputs)), HalfSpec((0,))
        count = max(shape.experts // 4, 2)
        bases = new(count, parts * rank, inputs)
        a = new(stored, out, parts * rank)
        return Weights(bases=bases, alpha=new(stored, parts * count), a=a), HalfSpec((rank, rank))
    if variant != "no deltas":
        fields["delta_u"] = new(stored, out, parts * rank)
        if variant == "columns":
            fields["delta_columns"] = integers(stored, parts * rank)
        elif variant == "shared V":
            fields |= {"shared_v": new(parts * rank, inputs), "u_index": integers(shape.experts)}
        else:
            fields["delta_v"] = new(stored, parts * rank, inputs)
        if variant in ("trimmed", "biases"):
            fields |= {"u_index": integers(shape.experts), "v_index": integers(shape.experts)}
    if variant in ("biases", "no gate, low-rank base"):
        fields["bias"] = new(shape.experts, parts * out)
    if variant.endswith("low-rank base"):
        base_rank = 40 if odd else 512
        fields |= {"base_u": new(out, parts * base_rank), "base_v": new(parts * base_rank, inputs)}
    elif variant != "no base":
        kept = inputs // 8 * 7 if variant in ("base", "no gate") else inputs
        fields |= {"base": new(kept, parts * out), "base_columns": integers(kept)}
        fields["base_norms"] = torch.empty(kept, dtype=torch.float32, device="meta")
    ranks = (0 if variant == "no deltas" else rank,) * parts
    return Weights(**fields), HalfSpec(ranks, (base_rank,) * parts, groups=8, used=inputs // 16 * 8)


def few_half(shape: Shape, dtype: torch.dtype, name: str, what: dict[str, Any]) -> tuple[Weights, HalfSpec]:
    """The weights of "w13" or "w2" of a layer of FEW, as `layout.pack` leaves them: but that what is flat is as long as
    it were without unequal widths, which nobody asks."""
    gated = what.get("gate", True)
    inputs, out, parts = (
        (shape.hidden, shape.intermediate, 1 + gated) if name == "w13" else (shape.intermediate, shape.hidden, 1)
    )
    rank = 33 if shape is ODD else 512
    first = what.get("first", 0) if name == "w2" else 0
    kind, ranks = what.get("delta", "dense"), (rank,) * parts
    fields: dict[str, Tensor] = {}
    integers = partial(torch.empty, dtype=torch.int32, device="meta")

    def put(field: str, how: Packing | None, lead: int, *sizes: tuple[int, int], as_base: bool = False) -> None:
        """Matrices of (outputs, inputs)."""
        if how is not None:
            matrices = [
                Matrices(integers(0), *size, how=how, first=first if size[1] == inputs else 0) for size in sizes
            ]
            words = sum(one.places // 32 * how.bits * one.stride for one in matrices)
            fields[field] = integers(lead * words)
            groups = sum(one.groups * one.stride for one in matrices)
            fields[f"{field}_scales"] = torch.empty(lead * groups, dtype=torch.bfloat16, device="meta")
        elif as_base:
            fields[field] = torch.empty(sizes[0][1], sizes[0][0], dtype=dtype, device="meta")
        elif what.get("unequal"):
            fields[field] = torch.empty(lead * sum(a * b for a, b in sizes), dtype=dtype, device="meta")
        else:
            fields[field] = torch.empty(lead, sizes[0][0], sum(b for _, b in sizes), dtype=dtype, device="meta")

    how = None if what["bits"] == 16 else Packing(what["bits"], ZERO[what["bits"]], 64)
    stored = shape.experts - bool(what.get("trimmed"))
    if kind == "dense" or (kind == "bases" and name == "w2"):
        put("dense", how, stored, *[(out, inputs)] * parts)
        ranks = (0,) * parts
        if how is None and parts == 2 and not what.get("unequal"):
            raise ValueError("gate's rows and up's are one matrix")
    elif kind == "bases":
        count = max(shape.experts // 4, 2)
        put("bases", how, count, (parts * rank, inputs))
        fields["alpha"] = torch.empty(stored, parts * count, dtype=dtype, device="meta")
        put("a", how, stored, *[(out, rank)] * parts)
    else:
        put("delta_u", how, stored, *[(out, rank)] * parts)
        if kind == "columns":
            fields["delta_columns"] = integers(stored, parts * rank)
        elif kind == "shared V":
            put("shared_v", how, 1, (parts * rank, inputs))
        elif how is None and name == "w13":
            fields["delta_v"] = torch.empty(stored, parts * rank, inputs, dtype=dtype, device="meta")
        else:
            put("delta_v", how, stored, (parts * rank, inputs))
        if how is None and name == "w2":
            fields["delta_u"] = torch.empty(stored, out, rank, dtype=dtype, device="meta")
    if what.get("trimmed"):
        fields |= {"u_index": integers(shape.experts)}
    base_bits, base_rank = what.get("base_bits"), ()
    base = None if base_bits is None else Packing(base_bits, ZERO[base_bits], 64)
    if what.get("base") == "low rank":
        base_rank = (40 if shape is ODD else 512,) * parts
        put("base_u", base, 1, *[(out, own) for own in base_rank])
        put("base_v", base, 1, (sum(base_rank), inputs))
    elif "base" in what:
        kept = inputs // 64 * 56 if what["base"] == "columns" else inputs
        put("base", base, 1, (parts * out, kept), as_base=True)
        if what["base"] == "columns":
            fields["base_columns"] = integers(kept)
            fields["base_norms"] = torch.empty(kept, dtype=torch.float32, device="meta")
    if what.get("biased"):
        size = shape.experts * parts * out
        fields["bias"] = torch.empty(size, dtype=dtype, device="meta")
        if name == "w2":
            fields["bias"] = fields["bias"].view(shape.experts, out)
    if what.get("unequal") and name == "w2":
        fields["channels"] = integers(2 * shape.experts * inputs)
    half = HalfSpec(
        ranks, base_rank, groups=8, used=inputs // 16 * 8, base=base, delta=how, base_first=first, delta_first=first
    )
    return Weights(**fields), half


def call(
    shape: Shape,
    dtype: torch.dtype,
    variant: str,
    scope: str,
    rows: int,
    activation: str,
    invariant: bool = False,
    function: str = "silu",
) -> None:
    if variant in FEW:
        (w13, half13), (w2, half2) = (few_half(shape, dtype, name, FEW[variant]) for name in ("w13", "w2"))
    else:
        (w13, half13), (w2, half2) = (half(shape, dtype, variant, name) for name in ("w13", "w2"))
    unequal = variant in FEW and FEW[variant].get("unequal", False)
    spec = LayerSpec(
        shape.experts,
        # Without a base nobody has channels that an expert has not.
        shape.intermediate if not unequal or "base" in FEW[variant] else 0,
        half13,
        half2,
        activation,
        scope,
        function,
        batch_invariant=invariant,
        widths=(shape.intermediate,) * shape.experts if unequal else (),
        skipped=(0,) * shape.experts if unequal else (),
        swiglu=(7.0, 1.702, 1.0) if variant == "biases" else (),
    )
    new = partial(torch.empty, device="meta")
    layer.fused_experts(
        new(rows, shape.hidden, dtype=dtype), new(rows, shape.top_k), new(rows, shape.top_k, dtype=torch.int32),
        w13, w2,
        new(rows, dtype=torch.bool) if scope == "batch" else None,
        spec,
    )  # fmt: skip


def _activation(variant: str) -> str:
    return "relu2" if variant.startswith("no gate") else "silu"


def calls(dtype: torch.dtype, everything: bool) -> Iterator[Any]:
    """Layers whose launches are compiled. Not everything: Mixtral's at one number of rows, each kernel a few times."""
    if not everything:
        for scope, rows in (("off", 16), ("batch", 16), ("batch", 128), ("token", 1)):
            yield partial(call, SHAPES["Mixtral-8x7B"], dtype, "base", scope, rows, "silu")
        yield partial(call, SHAPES["Qwen3-30B-A3B"], dtype, "bases", "off", 128, "silu")
        for variant, rows in itertools.product(("3 bits, unequal, on a base", "2 bits"), (16, 1024)):
            yield partial(call, SHAPES["DeepSeekMoE-16B"], dtype, variant, "off", rows, "silu")
        yield partial(call, SHAPES["DeepSeekMoE-16B"], dtype, "3 bits of MoBE", "off", 16, "silu")
        for variant in ("no gate, 4 bits", "no gate, 3 bits, unequal, on a base"):
            yield partial(call, SHAPES["DeepSeekMoE-16B"], dtype, variant, "off", 16, "relu2")
        for variant in ("no gate", "no gate, low-rank base"):
            yield partial(call, SHAPES["Mixtral-8x7B"], dtype, variant, "off", 16, "relu2")
        return
    # Every bucket of rows, twice the tables' last one for kernels whose rows are those of one expert of many.
    every = sorted(
        {rows for entries in tiles.table("default").values() for rows in entries} | {1, 2, 8, 300, 1024, 4096}
    )
    for shape, scope, rows in itertools.product((*SHAPES.values(), ODD), ("off", "token", "batch"), every):
        yield partial(call, shape, dtype, "base", scope, rows, "silu")
        yield partial(call, shape, dtype, "base", scope, rows, "silu", True)
    for shape, variant, rows in itertools.product((SHAPES["Mixtral-8x7B"], ODD), VARIANTS, every):
        yield partial(call, shape, dtype, variant, "off", rows, _activation(variant))
    for shape, invariant, rows in itertools.product((*list(SHAPES.values())[1:], MANY), (False, True), every):
        yield partial(call, shape, dtype, "bases", "off", rows, "silu", invariant)
    for rows, function in itertools.product((1, 1024), ("silu", "tanh")):
        yield partial(call, SHAPES["Qwen3-30B-A3B"], dtype, "bases", "off", rows, "silu", function=function)
    for variant, shape, rows in itertools.product(FEW, (SHAPES["DeepSeekMoE-16B"], ODD), every):
        yield partial(call, shape, dtype, variant, "off", rows, _activation(variant))
    for variant, rows, invariant in itertools.product(("8 bits of MoBE", "3 bits of MoBE"), every, (False, True)):
        yield partial(call, MANY, dtype, variant, "off", rows, "silu", invariant)
    for variant, shape, rows in itertools.product(MAIN, SHAPES.values(), every):
        yield partial(call, shape, dtype, variant, "off", rows, "silu")
    for shape, rows in itertools.product((SHAPES["DeepSeekMoE-16B"], ODD), (1, 64)):
        yield partial(call, shape, dtype, "2 bits on a base", "token", rows, "silu", True)
        yield from (partial(call, shape, dtype, "factors", scope, rows, "silu") for scope in ("token", "batch"))
    for activation in ("gelu", "gelu_tanh"):
        yield partial(call, SHAPES["Mixtral-8x7B"], dtype, "base", "off", 128, activation)


def launches(name: str, dtype: str, what: str) -> Iterator[tuple[dict[str, Any], aot.Launch]]:
    """What is known of a launch without compiling it, and the launch."""
    tiles.processors = lambda device: PROCESSORS[name]
    found: dict[str, aot.Launch] = {}
    real: set[str] = set()
    for one in calls(getattr(torch, dtype), what == "all"):
        for launch in aot.record(one, aot.TARGETS[name]):
            found[key := f"{launch} {launch.attributes}"] = launch
            real |= {key} if one.args[0] is not ODD else set()
    for key, launch in found.items():
        if what in ("all", "", launch.name):
            about = {"target": name, "kernel": launch.name, "dtype": dtype, "launch": str(launch)}
            yield {**about, "odd": key not in real}, launch


def described(item: tuple[dict[str, Any], aot.Launch]) -> str:
    about, launch = item
    target = aot.TARGETS[about["target"]]
    try:
        compiled = aot.compile_launch(launch, target)
    except Exception as error:  # a compiler's, of any kind: one kernel's failure is a line of the report
        return json.dumps({**about, "refused": f"{type(error).__name__}: {error}"[:2000]})
    figures = {**compiled._asdict(), "cubin": len(compiled.cubin), "elf": compiled.cubin[:4] == b"\x7fELF"}
    return json.dumps({**about, "refused": compiled.refused_by(target), **figures})


def refused(rows: list[dict[str, Any]]) -> list[str]:
    """Which kernels of a report are not good, and why. Spilled registers are allowed in sizes that no real model has:
    elements are loaded one by one there."""
    return [
        f"{row['target']} {row['dtype']}: {row['refused']}: {row['launch']}"
        for row in rows
        if row["refused"] and not (row["odd"] and "spilled" in row["refused"])
    ]


def main() -> None:
    names, dtypes, what, rotated = (*sys.argv[1:], "", "")[:4]
    pairs = itertools.product(names.split(","), dtypes.split(","))
    found = [list(launches(name, dtype, what)) for name, dtype in pairs]
    items = [item for place, own in enumerate(found) for item in (own[place :: len(found)] if rotated else own)]
    sys.stderr.write(f"{len(items)} kernels\n")
    with ThreadPoolExecutor(2) as pool:
        for line in pool.map(described, items):
            print(line, flush=True)


if __name__ == "__main__":
    main()
