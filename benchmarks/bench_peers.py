"""One MoE layer on this CPU, computed in every way a user might: ours and what they would run instead.

- `ours`: the cpu backend, weights packed once.
- `authors`: as the D2-MoE authors' code computes (METHODS 1.6): expert by expert, the base once for every expert, with
  a copy of the base's selected columns gathered in each call, and every factor a linear layer of its own. Written anew.
- `torch`: our reference backend.
- `decompress`: what one does with a compressed checkpoint and no kernel for it: the dense weights of the experts in
  use are rebuilt in every call.
- `dense`: vLLM's own fused MoE on the weights that the others have decomposed.

Random bfloat16 weights, scope off. All must agree with a float32 computation before any is timed. A table on stdout,
all rows in build/bench/peers.json; rows of other shapes, ratios and token counts that are there already stay.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bench_layer import interleaved, spread
from layer_shapes import GROUPS, SHAPES, SPARSITY, Shape, multiple
from torch import Tensor

from d2moe_vllm.ops import cpu, reference
from d2moe_vllm.ops.weights import HalfSpec, LayerSpec, Weights

OUT = Path(__file__).resolve().parent.parent / "build" / "bench" / "peers.json"
TOLERANCE = 0.02
"""Of the whole result's norm. bfloat16 rounds a weight, an input and a sum by up to 0.4 % each; a base or delta left
out, or a wrong expert, is tens of percent."""
Call = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x [T, H] bfloat16, gates float32 [T, K], experts int32 [T, K]) -> [T, H]."""


class Layer:
    """A random layer of a uniform checkpoint at this ratio (of the experts' bytes), as `bench_layer` has it.

    bases: of gate, up and down, [out, in], pruned columns being zero. Raises ValueError for a ratio out of reach.
    """

    def __init__(self, shape: Shape, ratio: float) -> None:
        hidden, inner, experts, _ = shape
        kept = [multiple(size * (1 - SPARSITY["off"] / 2), GROUPS * 16) for size in (hidden, inner)]
        base = 2 * kept[0] * inner + kept[1] * hidden
        room = (1 - ratio) * experts * 3 * hidden * inner - base
        if room < 0:
            raise ValueError(f"ratio {ratio:g} cannot be reached: the base alone is larger; choose a lower one")
        self.shape, self.rank = shape, multiple(room / (experts * 3 * (hidden + inner)), 16)
        self.w13 = self._half(hidden, inner, 2, kept[0])
        self.w2 = self._half(inner, hidden, 1, kept[1])
        w13 = HalfSpec((self.rank, self.rank), groups=GROUPS, used=kept[0])
        w2 = HalfSpec((self.rank,), groups=GROUPS, used=kept[1])
        self.spec = LayerSpec(experts, inner, w13, w2, activation="silu", scope="off")
        self.bases = [
            base.new_zeros(base.shape[1], v.shape[1]).index_copy_(1, columns.long(), base.t())
            for base, columns, _, v in self.factors(0)
        ]

    def _half(self, inputs: int, outputs: int, parts: int, kept: int) -> Weights:
        experts, rank = self.shape.experts, self.rank

        def random(deviation: float, *size: int) -> Tensor:
            return torch.randn(size, dtype=torch.bfloat16) * deviation

        # Base and delta have half of the variance each: neither can be left out unnoticed.
        half = (2 * inputs) ** -0.5
        return Weights(
            delta_u=random(rank**-0.5, experts, outputs, parts * rank),
            delta_v=random(half, experts, parts * rank, inputs),
            base=random(half, kept, parts * outputs),
            base_columns=spread(inputs, kept),
            base_norms=torch.ones(kept),
        )

    def factors(self, expert: int) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Of gate, up and down: base [kept, out], its columns, U [out, k] and V [k, in]; views."""
        rank, inner = self.rank, self.shape.intermediate
        for weights, parts in ((self.w13, 2), (self.w2, 1)):
            outputs = inner if parts == 2 else self.shape.hidden
            for part in range(parts):
                ranks = slice(part * rank, (part + 1) * rank)
                base = weights.base[:, part * outputs : (part + 1) * outputs]  # type: ignore[index]
                u, v = weights.delta_u[expert][:, ranks], weights.delta_v[expert][ranks]  # type: ignore[index]
                yield base, weights.base_columns, u, v  # type: ignore[misc]

    def dense(self, expert: int) -> list[Tensor]:
        """Gate's, up's and down's weight [out, in] of one expert, in bfloat16."""
        return [torch.addmm(base, u, v) for base, (_, _, u, v) in zip(self.bases, self.factors(expert), strict=True)]

    def expected(self, x: Tensor, gates: Tensor, ids: Tensor) -> Tensor:
        """The layer's output in float32, from the factors as they are stored."""
        result = torch.zeros(x.shape)

        def product(x: Tensor, base: Tensor, columns: Tensor, u: Tensor, v: Tensor) -> Tensor:
            return x[:, columns.long()] @ base.float() + x @ v.float().t() @ u.float().t()

        for expert, rows, weights in routed(gates, ids):
            gate, up, down = self.factors(expert)
            own = x[rows].float()
            hidden = F.silu(product(own, *gate)) * product(own, *up)
            result.index_add_(0, rows, weights * product(hidden, *down))
        return result


def routed(gates: Tensor, ids: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(expert, its rows, their gates [n, 1]) for every expert in use."""
    for expert in ids.unique().tolist():
        rows, slots = (ids == expert).nonzero(as_tuple=True)
        yield expert, rows, gates[rows, slots].unsqueeze(1)


def per_expert(compute: Callable[[int, Tensor], Tensor]) -> Call:
    """A layer of `compute(expert, its rows of x)`, summed in float32."""

    def call(x: Tensor, gates: Tensor, ids: Tensor) -> Tensor:
        result = torch.zeros(x.shape)
        for expert, rows, weights in routed(gates, ids):
            result.index_add_(0, rows, weights * compute(expert, x[rows]))
        return result.to(x.dtype)

    return call


def ours(layer: Layer) -> Call:
    # pack takes over the storage of what it packs where sizes are equal, and the others still need it.
    copies = [
        w._replace(base=w.base.clone(), delta_u=w.delta_u.clone(), delta_v=w.delta_v.clone())  # type: ignore[union-attr]
        for w in (layer.w13, layer.w2)
    ]
    halves = cpu.pack(*copies, layer.spec)
    return lambda x, gates, ids: cpu.fused_experts(x, gates, ids, *halves, None, layer.spec)


def plain_torch(layer: Layer) -> Call:
    return lambda x, gates, ids: reference.fused_experts(x, gates, ids, layer.w13, layer.w2, None, layer.spec)


def authors(layer: Layer) -> Call:
    """Their base keeps all of its columns; pruning only skips some. Kinder than a linear layer's layout: input-major,
    so that a column is gathered as one run of memory."""
    bases = [base.t().contiguous() for base in layer.bases]
    columns = [columns for _, columns, _, _ in layer.factors(0)]
    # Each factor contiguous, as the weight of a linear layer is.
    factors = [
        [(u.contiguous(), v.contiguous()) for _, _, u, v in layer.factors(e)] for e in range(layer.shape.experts)
    ]

    def linear(expert: int, role: int, x: Tensor) -> Tensor:
        (u, v), own = factors[expert][role], columns[role]
        base = x.index_select(1, own) @ bases[role].index_select(0, own)
        return base + F.linear(F.linear(x, v), u)

    return per_expert(lambda expert, x: linear(expert, 2, F.silu(linear(expert, 0, x)) * linear(expert, 1, x)))


def decompress(layer: Layer) -> Call:
    def expert_of(expert: int, x: Tensor) -> Tensor:
        gate, up, down = layer.dense(expert)
        return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)

    return per_expert(expert_of)


def vllm_dense(layer: Layer) -> Call:
    import vllm._custom_ops as ops

    isa = "amx" if torch.cpu._is_amx_tile_supported() else "vec"
    hidden, inner, experts, _ = layer.shape
    w13 = torch.empty(experts, 2 * inner, hidden, dtype=torch.bfloat16)
    w2 = torch.empty(experts, hidden, inner, dtype=torch.bfloat16)
    for expert in range(experts):
        w13[expert, :inner], w13[expert, inner:], w2[expert] = layer.dense(expert)
    # One after the other, so that originals and packed copies are not all in memory together.
    packed13 = ops.cpu_prepack_moe_weight(w13, isa)
    del w13
    packed2 = ops.cpu_prepack_moe_weight(w2, isa)

    def call(x: Tensor, gates: Tensor, ids: Tensor) -> Tensor:
        out = torch.empty_like(x)
        ops.cpu_fused_moe(out, x, packed13, packed2, None, None, gates, ids, "silu", isa)
        return out

    return call


WAYS: dict[str, Callable[[Layer], Call]] = {
    "dense": vllm_dense,
    "ours": ours,
    "authors": authors,
    "torch": plain_torch,
    "decompress": decompress,
}


def errors(layer: Layer, calls: dict[str, Call], x: Tensor, gates: Tensor, ids: Tensor) -> dict[str, float]:
    """Of each way, the error's norm over the result's."""
    expected = layer.expected(x, gates, ids)
    return {
        name: float((call(x, gates, ids).float() - expected).norm() / expected.norm()) for name, call in calls.items()
    }


def measure(layer: Layer, calls: dict[str, Call], tokens: int, seconds: float) -> dict[str, Any]:
    """Agreement, then times. Ends the program where a way computes something else than the layer."""
    shape = layer.shape
    x = torch.randn(tokens, shape.hidden, dtype=torch.bfloat16)
    ids = torch.stack([torch.randperm(shape.experts)[: shape.top_k] for _ in range(tokens)]).int()
    gates = torch.rand(tokens, shape.top_k)
    found = errors(layer, calls, x, gates, ids)
    if wrong := {name: round(error, 4) for name, error in found.items() if not error < TOLERANCE}:
        sys.exit(f"not timed: {tokens} tokens, relative errors {wrong} are above {TOLERANCE}")
    times = interleaved({name: lambda call=call: call(x, gates, ids) for name, call in calls.items()}, seconds)  # type: ignore[misc]
    return {
        "tokens": tokens,
        "experts_in_use": ids.unique().numel(),
        "ms": {name: statistics.median(values) for name, values in times.items()},
        "ms_min_max": {name: [min(values), max(values)] for name, values in times.items()},
        "runs": len(times["ours"]),
        "relative_errors": found,
    }


def merged(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All rows, a newer one in place of an older of the same shape, ratio and tokens; in that order."""
    rows = {(row["shape"], row["ratio"], row["tokens"]): row for row in [*old, *new]}
    return [rows[key] for key in sorted(rows)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="Mixtral-8x7B", help=f"{', '.join(SHAPES)}, or HIDDEN,INNER,EXPERTS,TOP_K")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 4, 16, 64])
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.4, 0.6, 0.8])
    parser.add_argument("--seconds", type=float, default=4, help="per row; at least three turns are taken")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    try:
        shape = SHAPES.get(arguments.shape) or Shape(*map(int, arguments.shape.split(",")))
    except (TypeError, ValueError):
        parser.error(f"--shape {arguments.shape}: none of {', '.join(SHAPES)}, nor four numbers like 4096,14336,8,2")
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = json.loads(arguments.out.read_text()) if arguments.out.exists() else []
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    print(f"{'ratio':>5} {'tokens':>6}", *(f"{name + ' ms':>13}" for name in WAYS), "(times of ours)")
    for ratio in arguments.ratios:
        try:
            layer = Layer(shape, ratio)
        except ValueError as error:
            parser.error(str(error))
        calls = {name: way(layer) for name, way in WAYS.items()}
        for tokens in arguments.tokens:
            row = {"shape": arguments.shape, "ratio": ratio, **measure(layer, calls, tokens, arguments.seconds)}
            rows = merged(rows, [row])
            arguments.out.write_text(json.dumps(rows, indent=1))
            figures = (f"{ms:7.1f} {ms / row['ms']['ours']:5.2f}" for ms in row["ms"].values())
            print(f"{ratio:5.0%} {tokens:6}", *figures, flush=True)


if __name__ == "__main__":
    main()
