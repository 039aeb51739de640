"""Ratio <-> ranks: the paper's figures, exactness to the byte, and what cannot be reached."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2moe_vllm.format.config import CheckpointConfig, Pruning, Source
from d2moe_vllm.format.kinds import TensorSpec
from offline.errors import InputError
from offline.methods.options import base_columns
from offline.plan.budget import Problem, paper_kept_share, solve_stored
from offline.plan.recipe import Recipe
from offline.source.families import FAMILIES, MoEShape

MIXTRAL_8X7B = MoEShape(8, 2, 4096, 14336, tuple(range(32)))
MIXTRAL_8X7B_PARAMETERS = 46_702_792_704


@pytest.mark.parametrize(
    ("sparsity", "ratio", "expected"),
    [
        (0.1, 0.2, 68.05), (0.1, 0.4, 47.34), (0.1, 0.6, 26.62), (0.1, 0.7, 16.26), (0.1, 0.8, 5.93),
        (0.6, 0.2, 74.30), (0.6, 0.4, 53.58), (0.6, 0.6, 32.86), (0.6, 0.7, 22.54), (0.6, 0.8, 12.18),
    ],
)  # fmt: skip
def test_kept_share_is_table_12s(sparsity: float, ratio: float, expected: float) -> None:
    share = paper_kept_share(MIXTRAL_8X7B, MIXTRAL_8X7B_PARAMETERS, ratio, sparsity)
    assert 100 * share == pytest.approx(expected, abs=0.05)


def test_paper_ratio_of_60_percent_keeps_the_papers_parameters() -> None:
    assert pytest.approx(18.68e9, rel=1e-3) == (1 - 0.6) * MIXTRAL_8X7B_PARAMETERS


def test_paper_ratio_out_of_reach_says_what_is() -> None:
    with pytest.raises(InputError, match=r"even without deltas it is 0\.\d+"):
        paper_kept_share(MIXTRAL_8X7B, MIXTRAL_8X7B_PARAMETERS, 0.95, 0.1)


@pytest.mark.parametrize(
    ("arguments", "kept", "used"),
    [
        ((128, 0.1, 8, 1), 120, 112),
        ((4096, 0.1, 8, 16), 8 * 480, 8 * 448),
        ((14336, 0.6, 8, 16), 8 * 1248, 8 * 704),
        ((128, 0.0, 8, 1), 128, 128),
        ((80, 0.9, 8, 1), 40, 8),
    ],
)
def test_base_columns(arguments: tuple[int, float, int, int], kept: int, used: int) -> None:
    columns = base_columns(*arguments)
    assert (columns.kept, columns.used) == (kept, used)


@pytest.mark.parametrize("arguments", [(128, 0.99, 8, 1), (128, 0.5, 8, 16), (130, 0.1, 8, 1)])
def test_columns_that_do_not_work_out_are_refused(arguments: tuple[int, float, int, int]) -> None:
    with pytest.raises(InputError):
        base_columns(*arguments)


def problem(
    shape: MoEShape,
    sparsity: float | None,
    multiple: int,
    dtype: str = "bfloat16",
    delta: dict | None = None,
    bits: int = 16,
) -> Problem:
    family = FAMILIES["mixtral"]
    other = {"model.embed_tokens.weight": TensorSpec("BF16", (64, shape.hidden_size))}
    experts = shape.num_experts * shape.expert_parameters * len(shape.layers)
    width = 4 if dtype == "float32" else 2
    source = Source(name="x", parameters=experts + other["model.embed_tokens.weight"].numel, bytes=experts * width)
    draft = CheckpointConfig.model_construct(
        family="mixtral", experts=family.experts, projections=dict(family.projections), num_experts=shape.num_experts,
        hidden_size=shape.hidden_size, intermediate_size=shape.intermediate_size, dtype=dtype,
        pruning=Pruning(groups=4), layers={}, source=source,
    )  # fmt: skip
    base = {"groups": 4, "column_multiple": 1}
    base |= {"kind": "none"} if sparsity is None else {"sparsity": sparsity}
    delta = {"method": "whitened", "rank_multiple": multiple, **(delta or {})}
    recipe = Recipe(ratio=0.5, bits=bits, group_size=32, base=base, delta=delta)
    trimmed = dict.fromkeys(shape.layers, tuple(range(recipe.delta.trim)))
    return Problem(draft, shape, other, recipe, trimmed, shard_bytes=100_000)


DELTAS = [
    {}, {"method": "prune"}, {"share_v": True}, {"distinct_u": 2}, {"share_v": True, "distinct_u": 1}, {"trim": 1},
]  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    ratio=st.floats(0.02, 0.85),
    experts=st.integers(2, 9),
    hidden=st.sampled_from([64, 128]),
    middle=st.sampled_from([64, 96, 192]),
    layers=st.integers(1, 3),
    sparsity=st.sampled_from([None, 0.0, 0.1, 0.5]),
    multiple=st.sampled_from([1, 4]),
    dtype=st.sampled_from(["bfloat16", "float32"]),
    delta=st.sampled_from(DELTAS),
    bits=st.sampled_from([16, 8, 4, 3, 2]),
)
def test_budget_is_kept_and_used_up(
    ratio: float,
    experts: int,
    hidden: int,
    middle: int,
    layers: int,
    sparsity: float | None,
    multiple: int,
    dtype: str,
    delta: dict,
    bits: int,
) -> None:
    if delta.get("trim") and sparsity is None:
        return
    shape = MoEShape(experts, 2, hidden, middle, tuple(range(layers)))
    asked = problem(shape, sparsity, multiple, dtype, delta, bits)
    target = (1 - ratio) * asked.draft.source.bytes
    try:
        budget = solve_stored(asked, ratio)
    except InputError:
        assert asked.solve(asked.same(asked.options[0]), asked.uniform(0)).nbytes > target
        return
    assert budget.nbytes <= target
    assert budget.stored_ratio >= ratio
    ranks = {(n, role): budget.config.layers[n][role].rank for n in shape.layers for role in ("gate", "up", "down")}
    step = asked.rank_multiple
    assert all(rank % step == 0 and rank >= 1 for rank in ranks.values())
    # Nothing of the size of a step is left over, unless everything is at full rank.
    steps = [asked.step_bytes(role, rank) for (_, role), rank in ranks.items() if rank < asked.limit(role)]
    if steps:
        headers = sum(len(shard.header) for shard in budget.shards)
        assert target - budget.nbytes < min(steps) + 0.05 * headers


def test_higher_ratios_never_give_higher_ranks() -> None:
    shape = MoEShape(8, 2, 128, 256, (0, 1))
    asked = problem(shape, 0.1, 1)
    totals = [sum(layer[r].rank for layer in solve_stored(asked, ratio / 100).config.layers.values()
                  for r in ("gate", "up", "down")) for ratio in range(10, 70, 5)]  # fmt: skip
    assert totals == sorted(totals, reverse=True)
