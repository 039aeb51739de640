"""Random layers of few bits and unequal widths, as backends are given them, and METHODS 1.5 and 1.6 again for them,
token by token in float64: codes by their definition, matrices whole, every product by itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from few_bits import HIGHEST, ZERO, Storage, _bytes
from hypothesis import strategies as st
from mixed_cases import forward as mixed_forward
from mixed_cases import mixed_case
from moe_cases import SWIGLU
from moe_oracle import gated, select
from torch import Tensor

from d2moe_vllm.ops.packing import Packing
from d2moe_vllm.ops.weights import HalfSpec, LayerSpec, Weights


@dataclass
class Few:
    """Sizes and kinds of a layer. ranks: of gate, up and down, where deltas are no dense matrices; base_ranks: of a
    low-rank base. base: "full", "columns", "low rank" or "". kept, used: columns of a base of columns, of gate and up,
    and of down, per group. widths: channels that each expert keeps here; skipped: and before them elsewhere; without:
    experts without deltas. gate: whether experts have one, whose ranks are not looked at otherwise. base_first,
    delta_first: where in whole rows of down the inputs begin that are here."""

    seed: int = 0
    dtype: torch.dtype = torch.float32
    tokens: int = 5
    hidden: int = 24
    intermediate: int = 40
    experts: int = 4
    top_k: int = 2
    delta: str = "dense"
    ranks: tuple[int, int, int] = (3, 5, 4)
    storages: tuple[Storage | None, Storage | None] = ((4, 32), (4, 32))
    base: str = ""
    base_storage: Storage | None = None
    base_ranks: tuple[int, int, int] = (3, 2, 4)
    kept: tuple[int, int] = (5, 7)
    used: tuple[int, int] = (3, 5)
    groups: int = 2
    scope: str = "off"
    widths: tuple[int, ...] = ()
    skipped: tuple[int, ...] = ()
    without: tuple[int, ...] = ()
    base_first: int = 0
    delta_first: int = 0
    absent: float = 0.2
    padding: int = 0
    biased: bool = False
    swiglu: tuple[float, ...] = ()
    gate: bool = True
    activation: str = "silu"
    generator: torch.Generator = field(init=False, repr=False)

    @property
    def halves(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The roles that read the layer's input, and those that read what these give."""
        return ("gate", "up")[not self.gate :], ("down",)

    def of_half(self, each: tuple[int, int, int], half: int) -> tuple[int, ...]:
        """Of numbers for gate, up and down those of a half."""
        return each[2:] if half else each[not self.gate : 2]

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def matrix(self, out: int, k: int, how: Storage | None, first: int = 0) -> tuple[Tensor, Tensor | None, Tensor]:
        """Numbers, or codes in bytes and scales, and what they stand for in float64; outputs are of about size 1."""
        size = max(k, 1) ** -0.5
        if how is None:
            values = (self.random(out, k) * size).to(self.dtype)
            return values, None, values.double()
        bits, group = how
        codes = torch.randint(0, HIGHEST[bits] + 1, (out, k), generator=self.generator)
        within = first % group
        count = -(-(within + k) // group) if k else 0
        scales = (self.random(out, count).abs() * size / HIGHEST[bits] * 2).bfloat16()
        scales[torch.rand(scales.shape, generator=self.generator) < 0.05] = 0
        of_input = scales.double()[:, (torch.arange(k) + within) // group]
        packed = _bytes(codes.int(), bits) if codes.numel() else torch.zeros(out, 0, dtype=torch.uint8)
        return packed, scales, (codes - ZERO[bits]) * of_input

    def side_by_side(
        self, out: int, ks: tuple[int, ...], how: Storage | None, first: int = 0
    ) -> tuple[Any, Any, Tensor]:
        parts = [self.matrix(out, k, how, first) for k in ks]
        scales = None if how is None else torch.cat([part[1] for part in parts], dim=1)  # type: ignore[misc]
        return torch.cat([part[0] for part in parts], dim=1), scales, torch.cat([part[2] for part in parts], dim=1)


class Matrix(NamedTuple):
    """float64 [out, in], how it is stored, and where in a whole row its inputs begin."""

    values: Tensor
    how: Storage | None = None
    first: int = 0

    def of(self, x: np.ndarray, int8: bool) -> np.ndarray:
        """x [..., in] times it; int8: of few bits, after the inputs of each of its groups were rounded to 8."""
        if int8 and self.how is not None and self.how[0] < 8:
            x = self._rounded(x)
        return x @ self.values.numpy().T

    def _rounded(self, x: np.ndarray) -> np.ndarray:
        assert self.how is not None
        rounded, group = np.zeros_like(x), self.how[1]
        begin = 0
        while begin < x.shape[-1]:
            end = min(x.shape[-1], (begin + self.first) // group * group + group - self.first)
            own = x[..., begin:end]
            step = np.abs(own).max(axis=-1, keepdims=True) / 127
            with np.errstate(invalid="ignore"):
                rounded[..., begin:end] = np.where(step > 0, np.rint(own / step) * step, 0)
            begin = end
        return rounded


Chain = tuple[Matrix, ...]
"""Matrices that something is multiplied with one after the other."""


@dataclass
class Made:
    """A layer: what backends are given, and per role its base, per expert and role its delta, or None."""

    arguments: list[Any]
    spec: LayerSpec
    base: dict[str, Chain | None]
    columns: dict[str, np.ndarray]
    norms: dict[str, np.ndarray]
    deltas: list[dict[str, Chain | None]]
    channels: list[np.ndarray]
    biases: list[dict[str, Tensor]]


def packing(how: Storage | None) -> Packing | None:
    return None if how is None else Packing(how[0], ZERO[how[0]], how[1])


def make(few: Few) -> Made:
    inner, hidden = few.intermediate, few.hidden
    widths = few.widths or (inner,) * few.experts
    channels = [np.arange(inner)] * few.experts
    if few.widths and few.base:
        channels = [torch.randperm(inner, generator=few.generator)[:w].sort().values.numpy() for w in widths]
    base: dict[str, Chain | None] = dict.fromkeys(few.halves[0] + few.halves[1])
    deltas: list[dict[str, Chain | None]] = [dict.fromkeys(base) for _ in widths]
    columns, norms, halves = {}, {}, []
    sizes = [{"gate": width, "up": width, "down": hidden} for width in widths if few.biased]
    biases = [{role: few.random(size).to(few.dtype) for role, size in of.items()} for of in sizes]
    for half, roles in enumerate(few.halves):
        found = _deltas(few, half, roles, widths, deltas)
        found |= _base(few, half, roles, base, columns, norms)
        if half and few.widths:
            bits = torch.zeros(few.experts, inner, dtype=torch.int)
            for one, own in zip(bits, channels, strict=True):
                one[own] = 1
            found["channels"] = _bytes(bits, 1) if few.base else torch.empty(0, dtype=torch.uint8)
        if few.biased:
            each = [torch.cat([of[role] for role in roles]) for of in biases]
            found["bias"] = torch.cat(each) if few.widths and not half else torch.stack(each)
        halves.append(Weights(**found))
    ids = torch.rand(few.tokens, few.experts, generator=few.generator).argsort(dim=1)[:, : few.top_k].int()
    ids = ids.masked_fill(torch.rand(ids.shape, generator=few.generator) < few.absent, -1)
    padding = torch.arange(few.tokens) >= few.tokens - few.padding if few.padding else None
    x, gates = few.random(few.tokens, hidden).to(few.dtype), torch.rand(ids.shape, generator=few.generator)
    low = few.base == "low rank"
    ranks = (0, 0, 0) if few.delta == "dense" else few.ranks
    specs = [
        HalfSpec(
            ranks=few.of_half(ranks, half),
            base_ranks=few.of_half(few.base_ranks, half) if low else (),
            groups=few.groups,
            used=few.used[half] * few.groups if few.base == "columns" else 0,
            base=packing(few.base_storage) if few.base else None,
            delta=packing(few.storages[half]),
            base_first=few.base_first * half,
            delta_first=few.delta_first * half,
        )
        for half in range(2)
    ]
    narrow: dict[str, Any] = (
        {"widths": few.widths, "skipped": few.skipped, "without": few.without} if few.widths else {}
    )
    spec = LayerSpec(
        few.experts, inner if few.base or not few.widths else 0, *specs, few.activation, few.scope, **narrow
    )
    spec = spec._replace(swiglu=few.swiglu)
    return Made([x, gates, ids, *halves, padding], spec, base, columns, norms, deltas, channels, biases)


def _deltas(few: Few, half: int, roles: Any, widths: tuple[int, ...], deltas: list[Any]) -> dict[str, Tensor]:
    """Parameters, and `deltas` filled."""
    how, down = few.storages[half], half == 1
    found: dict[str, list[tuple[Any, Any]]] = {}
    own = [e for e in range(few.experts) if e not in few.without]
    shared, columns = None, []
    ranks = few.of_half(few.ranks, half)
    for expert in own:
        width = widths[expert]
        out, k = (few.hidden, width) if down else (width, few.hidden)
        first = (few.skipped[expert] if few.widths else few.delta_first) if down else 0
        if few.delta == "dense":
            parts = [few.matrix(out, k, how, first) for _ in roles]
            scales = None if how is None else torch.cat([part[1] for part in parts])  # type: ignore[misc]
            found.setdefault("dense", []).append((torch.cat([part[0] for part in parts]), scales))
            deltas[expert] |= {role: (Matrix(part[2], how, first),) for role, part in zip(roles, parts, strict=True)}
            continue
        cut = first if few.delta == "columns" else 0
        *u, meaning = few.side_by_side(out, ranks, how, cut)
        found.setdefault("delta_u", []).append(tuple(u))
        if few.delta == "columns":
            places = [torch.randperm(k, generator=few.generator)[:rank].sort().values for rank in ranks]
            columns.append(torch.cat(places).int())
            chosen = torch.cat([torch.eye(k, dtype=torch.float64)[place] for place in places])
            vs = [Matrix(one) for one in chosen.split(ranks)]
        elif few.delta == "shared V":
            shared = few.matrix(sum(ranks), k, how, first) if shared is None else shared
            vs = [Matrix(one, how, first) for one in shared[2].split(ranks)]
        else:
            *v, whole = few.matrix(sum(ranks), k, how, first)
            vs = [Matrix(one, how, first) for one in whole.split(ranks)]
            found.setdefault("delta_v", []).append(tuple(v))
        us = [Matrix(one, how, cut) for one in meaning.split(ranks, dim=1)]
        deltas[expert] |= dict(zip(roles, zip(vs, us, strict=True), strict=True))
    result: dict[str, Tensor] = {}
    for name, each in found.items():
        flat = bool(few.widths) and name != ("delta_u" if down else "delta_v")
        for suffix, tensors in zip(("", "_scales"), zip(*each, strict=True), strict=True):
            if tensors[0] is not None:
                result[name + suffix] = torch.cat([t.flatten() for t in tensors]) if flat else torch.stack(tensors)
    if shared is not None:
        result |= {"shared_v": shared[0]} | ({} if shared[1] is None else {"shared_v_scales": shared[1]})
    if columns:
        result["delta_columns"] = torch.stack(columns)
    if few.without and not few.widths:
        places = torch.tensor([own.index(e) if e in own else -1 for e in range(few.experts)], dtype=torch.int32)
        result["u_index"] = places
        if few.delta in ("factors", "columns"):
            result["v_index"] = places.clone()
    return result


def _base(few: Few, half: int, roles: Any, base: dict[str, Any], columns: Any, norms: Any) -> dict[str, Tensor]:
    """Parameters, and base, columns and norms filled, these by the first role of a half."""
    down, how = half == 1, few.base_storage
    out, k = (few.hidden, few.intermediate) if down else (few.intermediate, few.hidden)
    first = few.base_first if down else 0
    if not few.base:
        return {}
    if few.base == "low rank":
        ranks = few.of_half(few.base_ranks, half)
        u, u_scales, us = few.side_by_side(out, ranks, how)
        v, v_scales, vs = few.matrix(sum(ranks), k, how, first)
        pairs = zip(vs.split(ranks), us.split(ranks, dim=1), strict=True)
        base |= {role: (Matrix(v, how, first), Matrix(u, how)) for role, (v, u) in zip(roles, pairs, strict=True)}
        scales = {} if how is None else {"base_u_scales": u_scales, "base_v_scales": v_scales}
        return {"base_u": u, "base_v": v, **scales}
    found: dict[str, Any] = {}
    chosen = torch.arange(k)
    if few.base == "columns":
        size, kept = k // few.groups, few.kept[half]
        own = [torch.randperm(size, generator=few.generator)[:kept].sort().values for _ in range(few.groups)]
        chosen = torch.cat([g * size + one for g, one in enumerate(own)])
    parts = [few.matrix(out, len(chosen), how, first) for _ in roles]
    if few.base == "columns":
        found["base_columns"] = chosen.int()
        norm = torch.cat([part[2] for part in parts]).norm(dim=0)
        found["base_norms"] = norm.float()
        norms[roles[0]], columns[roles[0]] = norm.float().double().numpy(), chosen.numpy()
    stacked = torch.cat([part[0] for part in parts])
    found["base"] = stacked if how else stacked.t().contiguous()
    if how:
        found["base_scales"] = torch.cat([part[1] for part in parts])  # type: ignore[misc]
    for role, part in zip(roles, parts, strict=True):
        base[role] = (Matrix(torch.eye(k, dtype=torch.float64)[chosen]), Matrix(part[2], how, first))
    return found


def forward(few: Few, made: Made, *, int8: bool = False) -> np.ndarray:
    """[tokens, hidden]. int8: what matrices of fewer than 8 bits are multiplied with is rounded to 8."""

    def product(chain: Chain, rows: np.ndarray) -> np.ndarray:
        for matrix in chain:
            rows = matrix.of(rows, int8)
        return rows

    x, gates, ids = (made.arguments[i].double().numpy() for i in range(3))
    padding = made.arguments[5]

    def based(roles: Any, rows: np.ndarray) -> dict[str, np.ndarray]:
        if made.base[roles[0]] is None:
            return {}
        masked = rows
        if roles[0] in made.columns and few.scope != "off":
            own, used = made.columns[roles[0]], few.used[roles[0] == "down"] * few.groups
            with np.errstate(all="ignore"):
                chosen = select(rows[:, own], made.norms[roles[0]], used, few.groups, few.scope, padding)
            masked = np.zeros_like(rows)
            masked[:, own] = np.where(chosen, rows[:, own], 0)
        return {role: product(made.base[role], masked) for role in roles}  # type: ignore[arg-type]

    z = based(few.halves[0], x)
    mix, output = np.zeros((few.tokens, few.intermediate)), np.zeros((few.tokens, few.hidden))
    for t in range(few.tokens):
        for gate_value, expert in zip(gates[t], ids[t].astype(int), strict=True):
            if not 0 <= expert < few.experts:
                continue
            own, delta = made.channels[expert], made.deltas[expert]
            if few.widths and not few.base:
                own = np.arange(few.widths[expert])
            parts = []
            for role in few.halves[0]:
                value = z[role][t, own] if role in z else np.zeros(len(own))
                value = value if (chain := delta[role]) is None else value + product(chain, x[t])
                parts.append(value + made.biases[expert][role].double().numpy() if few.biased else value)
            h = gated(parts, few.swiglu, few.activation)
            if few.biased:
                output[t] += gate_value * made.biases[expert]["down"].double().numpy()
            if few.base:
                mix[t, own] += gate_value * h
            if (chain := delta["down"]) is not None:
                output[t] += gate_value * product(chain, h)
    down = based(("down",), mix)
    return output + down["down"] if down else output


def mixed_few(seed: int, dtype: torch.dtype, storage: Storage, **sizes: Any) -> tuple[list[Any], LayerSpec, np.ndarray]:
    """Arguments and spec of a layer of MoBE whose bases and A are packed (sizes: of mixed_case), and what it gives."""
    few, (hidden, intermediate, rank) = Few(seed, dtype), (sizes[name] for name in ("hidden", "intermediate", "rank"))
    arguments, spec = mixed_case(seed, dtype, **sizes)
    bases = [few.matrix(sum(rank), hidden, storage) for _ in arguments[3].bases]
    a = [few.side_by_side(intermediate, rank, storage) for _ in arguments[3].a]
    exact = arguments[3]._replace(bases=torch.stack([one[2] for one in bases]), a=torch.stack([one[2] for one in a]))
    expected = mixed_forward([*arguments[:3], exact, *arguments[4:]], spec)
    packed = {
        name + suffix: torch.stack([one[i] for one in matrices])  # type: ignore[misc]
        for name, matrices in (("bases", bases), ("a", a))
        for i, suffix in enumerate(("", "_scales"))
    }
    arguments[3] = arguments[3]._replace(**packed)
    return arguments, spec._replace(w13=spec.w13._replace(delta=packing(storage))), expected


def lowest_codes() -> Iterator[tuple[list[Any], LayerSpec, torch.Tensor]]:
    """Arguments whose gate and up have code 0 everywhere, of 8 and 4 bits the lowest: -128 and -8 scales, which no
    compressor writes; and what a layer gives then."""
    for bits, lowest in ((8, -128.0), (4, -8.0)):
        made = make(Few(3, tokens=1, experts=1, top_k=1, absent=0, storages=((bits, 32), None)))
        weights = made.arguments[3]._replace(
            dense=torch.zeros_like(made.arguments[3].dense),
            dense_scales=torch.ones_like(made.arguments[3].dense_scales),
        )
        arguments = [*made.arguments[:3], weights, *made.arguments[4:]]
        h = torch.nn.functional.silu(arguments[0].sum() * lowest) * arguments[0].sum() * lowest
        expected = arguments[1] * h * arguments[4].dense[0].sum(dim=1)
        yield arguments, made.spec, expected


@st.composite
def few_cases(draw: st.DrawFn) -> Few:
    """Any such layer in float32: with a base or without, all bits and groups, widths that are multiples of nothing."""
    storage = st.tuples(st.sampled_from([8, 4, 3, 2]), st.sampled_from([32, 64, 128]))
    narrow = draw(st.booleans())
    base = draw(st.sampled_from(["", "full"] if narrow else ["", "full", "columns", "low rank"]))
    delta = draw(st.sampled_from(["dense", "factors"] if narrow else ["dense", "factors", "columns", "shared V"]))
    experts, inner = draw(st.integers(2, 5)), 2 * draw(st.integers(1, 90))
    gate = draw(st.booleans())
    widths = tuple(draw(st.integers(0, inner)) for _ in range(experts)) if narrow else ()
    return Few(
        draw(st.integers(0, 2**31)),
        tokens=(tokens := draw(st.integers(0, 8))),
        hidden=2 * draw(st.integers(1, 70)),
        intermediate=inner,
        experts=experts,
        delta=delta,
        ranks=(1, 1, 1) if delta == "columns" else tuple(draw(st.integers(1, 70)) for _ in range(3)),
        storages=(draw(st.none() | storage), draw(st.none() | storage)),
        base=base,
        base_storage=draw(st.none() | storage),
        base_ranks=tuple(draw(st.integers(1, 40)) for _ in range(3)),
        kept=(1, 1),
        used=(draw(st.integers(0, 1)), draw(st.integers(0, 1))),
        scope=draw(st.sampled_from(["off", "token", "batch"])),
        widths=widths,
        skipped=tuple(draw(st.integers(0, 150)) for _ in widths),
        without=tuple(sorted(draw(st.sets(st.integers(0, experts - 1), max_size=experts - 1)))) if base else (),
        base_first=draw(st.integers(0, 150)),
        delta_first=draw(st.integers(0, 150)),
        absent=draw(st.sampled_from([0.0, 0.3])),
        padding=draw(st.integers(0, tokens)),
        biased=draw(st.booleans()),
        swiglu=(swiglu := draw(st.sampled_from([(), SWIGLU])) if gate else ()),
        gate=gate,
        activation="silu" if swiglu else draw(st.sampled_from(["silu", "relu2"])),
    )
