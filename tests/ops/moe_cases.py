"""Random layers and batches for the operator's tests."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st
from moe_oracle import Case


def random_case(
    seed: int,
    *,
    tokens: int = 5,
    hidden: int = 8,
    intermediate: int = 16,
    num_experts: int = 4,
    top_k: int = 2,
    groups: int = 2,
    rank: tuple[int, int, int] = (3, 2, 4),
    kept: tuple[int, int] = (3, 5),
    used: tuple[int, int] = (2, 3),
    scope: str = "off",
    absent: float = 0.0,
    padding: int = 0,
    base_rank: tuple[int, int, int] = (0, 0, 0),
    delta: tuple[str, str] = ("factors", "factors"),
    distinct_u: tuple[int, int] = (0, 0),
    trimmed: tuple[int, ...] = (),
    biased: bool = False,
    swiglu: tuple[float, ...] = (),
    gate: bool = True,
    activation: str = "silu",
) -> Case:
    """rank: of gate, up, down. kept, used: per group, of gate/up and of down; kept 0 means no such base.
    absent: share of routed experts that are -1. padding: rows at the end that are no tokens. delta: of gate/up and
    of down, "factors", "columns" or "shared V". distinct_u: of gate/up and of down. biased: whether experts have
    biases; gate: whether they have a gate, whose numbers are not looked at otherwise."""
    rng = np.random.default_rng(seed)
    sizes = {"gate": (intermediate, hidden), "up": (intermediate, hidden), "down": (hidden, intermediate)}
    each = list(zip(sizes, rank, base_rank, strict=True))[0 if gate else 1 :]
    sizes = {role: sizes[role] for role, _, _ in each}
    case = Case(
        x=rng.standard_normal((tokens, hidden)),
        topk_ids=np.array([rng.permutation(num_experts)[:top_k] for _ in range(tokens)]).reshape(tokens, top_k),
        topk_weights=rng.random((tokens, top_k)),
        delta_u={},
        delta_v={},
        base={},
        columns={},
        used={},
        groups=groups,
        num_experts=num_experts,
        intermediate_size=intermediate,
        scope=scope,
        padding=np.arange(tokens) >= tokens - padding if padding else None,
        trimmed=trimmed,
        swiglu=swiglu,
        activation=activation,
    )
    index = {half: rng.integers(0, max(distinct, 1), num_experts) for half, distinct in enumerate(distinct_u)}
    case.topk_ids[rng.random(case.topk_ids.shape) < absent] = -1
    for role, k, base_k in each:
        out, inputs = sizes[role]
        half = int(role == "down")
        us = [rng.standard_normal((out, k)) * k**-0.5 for _ in range(distinct_u[half] or num_experts)] if k else None
        vs = [rng.standard_normal((k, inputs)) * inputs**-0.5 for _ in range(num_experts)] if k else None
        case.delta_u[role], case.delta_v[role] = us, vs
        if k and distinct_u[half]:
            case.u_index[role] = index[half]
        if k and delta[half] == "shared V":
            case.shared_v[role] = vs[0]
        if k and delta[half] == "columns":
            case.delta_columns[role] = [np.sort(rng.permutation(inputs)[:k]) for _ in range(num_experts)]
        if base_k:
            case.base_u[role] = rng.standard_normal((out, base_k)) * base_k**-0.5
            case.base_v[role] = rng.standard_normal((base_k, inputs)) * inputs**-0.5
        per_group, used_per_group = (kept[1], used[1]) if role == "down" else (kept[0], used[0])
        case.used[role] = used_per_group * groups
        if not per_group:
            case.base[role] = None
            continue
        if role == "up" and gate:
            case.columns[role] = case.columns["gate"]
        else:
            size = inputs // groups
            case.columns[role] = np.concatenate(
                [g * size + np.sort(rng.permutation(size)[:per_group]) for g in range(groups)]
            )
        case.base[role] = rng.standard_normal((out, per_group * groups)) * inputs**-0.5
        case.norms[role] = np.linalg.norm(case.base[role], axis=0).astype(np.float32).astype(np.float64)
    if biased:
        case.bias = {role: list(rng.standard_normal((num_experts, out))) for role, (out, _) in sizes.items()}
    return case


SWIGLU = (0.9, 1.702, 1.0)
"""As gpt-oss's, of a limit that many numbers exceed."""


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any layer whose projections each have a base or deltas; trimmed experts where all have a base."""
    groups = draw(st.sampled_from([1, 2, 4]))
    base_kinds = draw(st.tuples(*[st.sampled_from(["columns", "low rank", "none"])] * 2))
    some = [draw(st.integers(1, inputs // groups)) for inputs in (8, 16)]
    kept = tuple(some[half] if kind == "columns" else 0 for half, kind in enumerate(base_kinds))
    used = (draw(st.integers(0, kept[0])), draw(st.integers(0, kept[1])))
    of_role = (*base_kinds[:1], *base_kinds)
    base_rank = tuple(draw(st.integers(0, 5)) if kind == "low rank" else 0 for kind in of_role)
    based = [bool(base_rank[role] or kept[role == 2]) for role in range(3)]
    rank = tuple(draw(st.integers(0 if based[role] else 1, 5)) for role in range(3))
    num_experts = draw(st.integers(2, 6))
    experts = list(range(num_experts))
    trimmed = draw(st.lists(st.sampled_from(experts), unique=True, max_size=num_experts - 1)) if all(based) else []
    delta = draw(st.tuples(*[st.sampled_from(["factors", "columns", "shared V"])] * 2))
    untrimmed = num_experts - len(trimmed)
    distinct_u = tuple(0 if kind == "columns" else draw(st.integers(0, untrimmed)) for kind in delta)
    tokens = draw(st.integers(0, 6))
    gate = draw(st.booleans())
    return random_case(
        draw(st.integers(0, 2**31)),
        tokens=tokens,
        groups=groups,
        kept=kept,
        used=used,
        rank=rank,
        num_experts=num_experts,
        top_k=draw(st.integers(1, 2)),
        scope=draw(st.sampled_from(["batch", "token", "off"])),
        absent=draw(st.sampled_from([0.0, 0.3, 1.0])),
        padding=draw(st.integers(0, tokens)),
        base_rank=base_rank,
        delta=delta,
        distinct_u=distinct_u,
        trimmed=tuple(sorted(trimmed)),
        biased=draw(st.booleans()),
        swiglu=(swiglu := draw(st.sampled_from([(), SWIGLU, (0.5, 1.0, 0.0)])) if gate else ()),
        gate=gate,
        activation="silu" if swiglu else draw(st.sampled_from(["silu", "relu2"])),
    )


NO_GATE = {"gate": False, "activation": "relu2"}
"""As Nemotron-H's."""
BIG = {"hidden": 192, "intermediate": 320, "num_experts": 8, "groups": 4, "rank": (48, 33, 40)}
CROWDED = {
    "pruned base": {"kept": (40, 60), "used": (20, 31)},
    "full base": {"kept": (48, 80), "used": (48, 80)},
    "low-rank base": {"base_rank": (40, 40, 24), "kept": (0, 0), "used": (0, 0)},
    "shared V": {"delta": ("shared V", "shared V"), "kept": (0, 0), "used": (0, 0)},
    "column deltas": {"delta": ("columns", "columns"), "kept": (12, 16), "used": (5, 8)},
    "trimmed": {"trimmed": (1, 5), "kept": (48, 80), "used": (24, 40)},
    "biases": {"biased": True, "swiglu": SWIGLU, "trimmed": (1, 5), "kept": (48, 80), "used": (48, 80)},
    "no gate": {**NO_GATE, "kept": (40, 60), "used": (20, 31)},
    "no gate, low-rank base": {**NO_GATE, "base_rank": (0, 40, 24), "kept": (0, 0), "used": (0, 0), "biased": True},
    "no gate, shared V": {**NO_GATE, "delta": ("shared V", "columns"), "kept": (0, 0), "used": (0, 0)},
}


def crowd(variant: str, scope: str) -> Case:
    """67 tokens in a layer whose sizes are multiples of nothing."""
    return random_case(11, tokens=67, scope=scope, **BIG, **CROWDED[variant])
