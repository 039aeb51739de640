"""Random layers whose V are mixed from bases (MoBE), and METHODS 3 again, token by token in float64 numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from moe_oracle import silu

from d2moe_vllm.ops.weights import HalfSpec, LayerSpec, Weights

FUNCTIONS = {"silu": silu, "tanh": np.tanh}


def mixed_case(
    seed: int,
    dtype: torch.dtype = torch.float32,
    *,
    tokens: int = 5,
    hidden: int = 8,
    intermediate: int = 16,
    num_experts: int = 4,
    top_k: int = 2,
    bases: int = 3,
    rank: tuple[int, int] = (3, 2),
    function: str = "silu",
    groups: int = 1,
    absent: float = 0.0,
    padding: int = 0,
    scale: float = 1.0,
) -> tuple[list[Any], LayerSpec]:
    """Positional arguments and spec of ops.reference.fused_experts.

    rank: of gate and up. groups: of experts with bases of their own; others' alphas are zero. absent: share of routed
    experts that are -1. padding: rows at the end that are no tokens. scale: of the bases.
    """
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, size: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * size).to(dtype)

    logits = torch.randn(num_experts, 2, bases, generator=generator)
    own_group = torch.arange(num_experts)[:, None] * groups // num_experts
    mine = own_group == torch.arange(bases)[None, :] * groups // bases
    alpha = logits.masked_fill(~mine[:, None], -torch.inf).softmax(-1).nan_to_num().flatten(1).to(dtype)
    w13 = Weights(
        bases=random(bases, sum(rank), hidden, size=scale),
        alpha=alpha,
        a=random(num_experts, intermediate, sum(rank), size=min(rank) ** -0.5),
    )
    w2 = Weights(dense=random(num_experts, hidden, intermediate, size=intermediate**-0.5))
    ids = torch.rand(tokens, num_experts, generator=generator).argsort(dim=1)[:, :top_k].int()
    ids = ids.masked_fill(torch.rand(ids.shape, generator=generator) < absent, -1)
    x, gates = random(tokens, hidden, size=hidden**-0.5), torch.rand(tokens, top_k, generator=generator)
    spec = LayerSpec(num_experts, intermediate, HalfSpec(rank), HalfSpec((0,)), "silu", "off", function)
    return [x, gates, ids, w13, w2, torch.arange(tokens) >= tokens - padding if padding else None], spec


def forward(arguments: list[Any], spec: LayerSpec) -> np.ndarray:
    """The layer's output for these arguments in float64; every V whole, every product by itself."""
    x, gates, ids = (tensor.double().numpy() for tensor in arguments[:3])
    bases, alpha, a = (arguments[3]._asdict()[name].double().numpy() for name in ("bases", "alpha", "a"))
    down, gate_rank = arguments[4].dense.double().numpy(), spec.w13.ranks[0]
    function, output = np.vectorize(FUNCTIONS[spec.function], otypes=[float]), np.zeros(x.shape)
    vs = {}
    for expert in range(spec.num_experts):
        parts = (slice(gate_rank), slice(gate_rank, None))
        vs[expert] = [
            function(sum(factor * basis[part] for factor, basis in zip(factors, bases, strict=True)))
            for part, factors in zip(parts, np.split(alpha[expert], 2), strict=True)
        ]
    for token, (row, own_gates, own_ids) in enumerate(zip(x, gates, ids.astype(int), strict=True)):
        for gate_value, expert in zip(own_gates, own_ids, strict=True):
            if not 0 <= expert < spec.num_experts:
                continue
            gate = a[expert][:, :gate_rank] @ (vs[expert][0] @ row)
            up = a[expert][:, gate_rank:] @ (vs[expert][1] @ row)
            output[token] += gate_value * (down[expert] @ (np.array([silu(g) for g in gate]) * up))
    return output


@st.composite
def mixed_cases(draw: st.DrawFn) -> tuple[list[Any], LayerSpec]:
    """Any such layer in float32: one basis, one group per basis, no token at all, nobody's tokens."""
    tokens, num_experts, bases = draw(st.integers(0, 6)), draw(st.integers(2, 6)), draw(st.integers(1, 5))
    return mixed_case(
        draw(st.integers(0, 2**31)),
        tokens=tokens,
        hidden=draw(st.integers(1, 20)),
        intermediate=draw(st.integers(1, 20)),
        num_experts=num_experts,
        top_k=draw(st.integers(1, 2)),
        bases=bases,
        rank=(draw(st.integers(1, 19)), draw(st.integers(1, 19))),
        function=draw(st.sampled_from(sorted(FUNCTIONS))),
        groups=draw(st.integers(1, bases)),
        absent=draw(st.sampled_from([0.0, 0.3, 1.0])),
        padding=draw(st.integers(0, tokens)),
    )


def variants(small: bool) -> dict[str, dict[str, Any]]:
    """By what they are about; sizes are multiples of nothing. small: as Triton's interpreter takes its time."""
    if small:
        big: dict[str, Any] = {"tokens": 37, "hidden": 72, "intermediate": 40, "rank": (19, 9)}
        many, crowded, wide = {"tokens": 5}, {"num_experts": 20}, {"tokens": 67}
    else:
        big = {"tokens": 67, "hidden": 192, "intermediate": 80, "num_experts": 8, "rank": (48, 33)}
        many, crowded, wide = {}, {"num_experts": 40, "top_k": 3}, {"rank": (17, 40)}
    return {
        "few bases": {**big, "bases": 2},
        "more bases than are mixed at once": {**big, **many, "bases": 67, "function": "tanh"},
        "more experts than pieces": {**big, **crowded, "bases": 10, "groups": 5},
        "blocks of several pieces": {**big, **wide, "num_experts": 2, "bases": 2},
    }


MIXED, MIXED_SMALL = variants(small=False), variants(small=True)
