"""What a layer's operator is given: its weights, what is constant of it, and matrices of few bits opened.

Travels inside checkpoints, with reference.py: it imports torch, and of ours only packing.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from d2moe_vllm.ops.packing import Packing, StoredMatrices, opened


class Weights(NamedTuple):
    """What one layer has of gate and up together ("w13") or of down ("w2"); what it does not have is None.

    [out, in] is [2 I, H] for w13, gate's outputs before up's, and [H, I] for w2. Experts without a gate have up's
    alone, wherever gate's and up's are spoken of: [I, H]. Their ranks k and r are gate's plus up's; U's of gate and up
    lie side by side in [I, k], gate's columns first, so that one product of theirs with the input serves both. D and D'
    count the U's and V's that are stored here.

    delta_u: [D, I, k] for w13, [D, H, k] for w2. One of the next three says what it is multiplied with:
    delta_v: [D', k, in]; delta_columns: int [D', k], the inputs themselves (U is the delta at these columns);
    shared_v: [k, in], for all experts. Deltas may also be sequences of matrices.
    u_index, v_index: int [E], each expert's place in delta_u, and in delta_v or delta_columns; where u_index
    is -1 the expert has no delta (METHODS 1.7). None: expert e is at place e.

    In place of delta_u and what goes with it, for w13: bases: [m, k, H], gate's rows before up's; alpha: [D, 2 m],
    gate's before up's: an expert's V is f(sum_j alpha_j bases_j), part by part (METHODS 3); a: [D, I, k], its U. For
    both: dense: [D, out, in], the whole of an expert's delta.

    base: [kept, out], input-major. base_columns: int [kept], ascending, the inputs these rows belong to, evenly
    spread over the groups; None: all inputs. base_norms: float32 [kept], ||W_b[:, j]||_2; for w13 joint,
    sqrt(gate^2 + up^2). base_u, base_v: a low-rank base instead, [I, r] or [H, r], and [r, in].

    Where matrices are packed (HalfSpec.base, .delta), their last dimension is the bytes of a row of codes, of gate's
    and then of up's where both lie side by side along it, and `..._scales` has the scales in the same way; the base is
    [out, in] then. Where experts keep some channels only (LayerSpec.widths), a matrix whose size depends on it is
    flat: one expert's after the other, row by row. channels (down's): uint8 [E, ceil(I / 8)], then, beside a base:
    which of its channels an expert has, least significant bits first. bias: [E, 2 I], gate's before up's, or [E, H].
    """

    delta_u: Tensor | Sequence[Tensor] | None = None
    delta_v: Tensor | Sequence[Tensor] | None = None
    delta_columns: Tensor | Sequence[Tensor] | None = None
    shared_v: Tensor | None = None
    u_index: Tensor | None = None
    v_index: Tensor | None = None
    base: Tensor | None = None
    base_columns: Tensor | None = None
    base_norms: Tensor | None = None
    base_u: Tensor | None = None
    base_v: Tensor | None = None
    bases: Tensor | None = None
    alpha: Tensor | Sequence[Tensor] | None = None
    a: Tensor | Sequence[Tensor] | None = None
    dense: Tensor | Sequence[Tensor] | None = None
    channels: Tensor | None = None
    bias: Tensor | Sequence[Tensor] | None = None
    base_scales: Tensor | None = None
    base_u_scales: Tensor | None = None
    base_v_scales: Tensor | None = None
    delta_u_scales: Tensor | None = None
    delta_v_scales: Tensor | None = None
    shared_v_scales: Tensor | None = None
    bases_scales: Tensor | None = None
    a_scales: Tensor | None = None
    dense_scales: Tensor | None = None


class HalfSpec(NamedTuple):
    """What is constant of one half on one rank: of gate and up ("w13", in this order), of up alone where experts have
    no gate, or of down ("w2").

    ranks: of each projection's deltas. base_ranks: of each one's low-rank base, () without one. groups: of consecutive
    kept columns of the base. used: how many of these columns are used in all; a low-rank base has none to choose from.
    base, delta: how matrices of base and deltas are packed, None where they are not. base_first, delta_first: where in
    a whole row of theirs the inputs begin that are here.
    """

    ranks: tuple[int, ...]
    base_ranks: tuple[int, ...] = ()
    groups: int = 1
    used: int = 0
    base: Packing | None = None
    delta: Packing | None = None
    base_first: int = 0
    delta_first: int = 0


class LayerSpec(NamedTuple):
    """What is constant of a layer on one rank: all that a backend is told beside tensors. Hashable.

    num_experts, intermediate_size: I and the number of experts as they are here; where experts keep some channels only,
    I counts the base's. activation: of ACTIVATIONS, or, for
    this backend alone, any function. scope: "batch", "token" or "off", see select_columns. function: of FUNCTIONS,
    where there are bases. batch_invariant: with scope "off" or "token", every bit of a row of the result depends on
    that row alone; on a GPU only where torch.matmul is so itself (vLLM makes it so under VLLM_BATCH_INVARIANT=1).
    static_shapes: visit every expert with all rows instead of its own rows: more work, but no shape and no control flow
    depends on data (CUDA graphs, tracing).
    widths, skipped: how many channels each expert keeps here, and how many before them elsewhere; () where all keep I.
    without: which experts have no deltas, there. swiglu: limit, alpha and beta of a clamped SwiGLU (config.Swiglu),
    which stands in place of activation(gate) * up; () without one. w13 of one projection: experts have no gate, and
    activation(up) stands there.
    """

    num_experts: int
    intermediate_size: int
    w13: HalfSpec
    w2: HalfSpec
    activation: str | Callable[[Tensor], Tensor]
    scope: str
    function: str = ""
    batch_invariant: bool = False
    static_shapes: bool = False
    widths: tuple[int, ...] = ()
    skipped: tuple[int, ...] = ()
    without: tuple[int, ...] = ()
    swiglu: tuple[float, ...] = ()

    @property
    def gate(self) -> bool:
        """Whether experts have a gate."""
        return len(self.w13.ranks) == 2


UNGATED_SWIGLU = "a clamped SwiGLU needs a gate, and these experts have none"
UNGATED_BASES = "bases are mixed for gate and up, and these experts have no gate"


def opened_half(
    weights: Weights, half: HalfSpec, spec: LayerSpec, hidden: int, dtype: torch.dtype, *, down: bool = False
) -> Weights:
    """With matrices as they are computed with: what is packed or flat is opened, an expert's when it is asked for.

    hidden: H. down: the half is w2. What is packed is rounded to `dtype`, as a dense checkpoint would hold it; in
    float64 it is exact. Raises ValueError for bases of experts without a gate.
    """
    parts = len(half.ranks)
    if weights.bases is not None and not spec.gate:
        raise ValueError(UNGATED_BASES)
    inputs = spec.intermediate_size if down else hidden
    base_inputs = inputs if weights.base_columns is None else len(weights.base_columns)
    found: dict[str, Any] = {}

    def layer(name: str, how: Packing | None, each: tuple[int, ...], first: int) -> None:
        if how is not None and (values := getattr(weights, name)) is not None:
            found[name] = opened(values, getattr(weights, f"{name}_scales"), how, each, first).to(dtype)

    layer("base", half.base, (base_inputs,), half.base_first)
    if "base" in found:
        found["base"] = found["base"].t()
    layer("base_u", half.base, half.base_ranks, 0)
    layer("base_v", half.base, (inputs,), half.base_first)
    layer("shared_v", half.delta, (inputs,), half.delta_first)
    layer("bases", half.delta, (inputs,), 0)

    own = [expert for expert in range(len(spec.widths)) if expert not in spec.without]
    widths, skipped = [spec.widths[expert] for expert in own], [spec.skipped[expert] for expert in own]

    def experts(name: str, rows: int, each: tuple[int, ...], *, tall: bool = False, wide: bool = False) -> None:
        """tall: gate's and up's rows, or one's, are channels, `rows` times each; wide: inputs are."""
        values = getattr(weights, name)
        ragged = bool(spec.widths) and (tall or wide)
        if not isinstance(values, Tensor) or (half.delta is None and not ragged):
            return
        count = len(own) if ragged else len(values)
        heights = [rows * width for width in widths] if ragged and tall else [rows] * count
        every = [(width,) for width in widths] if ragged and wide else [each] * count
        # Ranks share out the inputs of a whole delta and of a V, and of a U only where these are a delta's columns.
        cut = wide or (name == "delta_u" and weights.delta_columns is not None)
        first = skipped if ragged and wide else [half.delta_first if cut else 0] * count
        scales = getattr(weights, f"{name}_scales")
        found[name] = StoredMatrices(values, scales, half.delta, heights, every, first, dtype)

    if isinstance(weights.bias, Tensor) and spec.widths and not down:
        found["bias"] = weights.bias.split([parts * width for width in spec.widths])
    channels = spec.intermediate_size
    if not down:
        experts("delta_u", 1 if spec.widths else channels, half.ranks, tall=True)
        experts("delta_v", sum(half.ranks), (hidden,))
        experts("dense", parts if spec.widths else parts * channels, (hidden,), tall=True)
        experts("a", channels, half.ranks)
    else:
        experts("delta_u", hidden, half.ranks)
        experts("delta_v", half.ranks[0], (channels,), wide=True)
        experts("dense", hidden, (channels,), wide=True)
    return weights._replace(**found)
