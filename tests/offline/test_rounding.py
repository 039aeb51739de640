"""Rounding with feedback, against an independent float64 computation; and the baselines that are made of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from compression import TINY, d2moe_here
from safetensors.torch import load_file
from torch import Tensor

from offline.algebra.rounding import BLOCK, DAMPING, LEVELS, round_matrices, round_matrix

OUT, IN, GROUP = 24, 200, 64
STAND_FOR = {
    8: [float(n) for n in range(-127, 128)],
    4: [float(n) for n in range(-7, 8)],
    3: [n + 0.5 for n in range(-4, 4)],
    2: [-1.5, -0.5, 0.5, 1.5],
}
"""Bits -> levels, in scales (METHODS 4.1)."""


@pytest.fixture(scope="module")
def problem() -> tuple[Tensor, Tensor]:
    """A matrix, and the second moment of inputs that go together."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(IN, IN, generator=generator, dtype=torch.float64) * 0.3 + torch.eye(IN, dtype=torch.float64)
    x = torch.randn(4 * IN, IN, generator=generator, dtype=torch.float64) @ mix
    return torch.randn(OUT, IN, generator=generator), (x.T @ x / len(x)).float()


def error(weight: Tensor, rounded: Tensor, gram: Tensor) -> float:
    """tr(D G Dᵀ)."""
    d = weight.double() - rounded.double()
    return float(((d @ gram.double()) * d).sum())


def oracle(weight: Tensor, gram: Tensor, bits: int) -> Tensor:
    """Column by column by optimal brain surgery: the inverse of what is left, one row and column taken out each time.
    No Cholesky factor, no blocks; float64, but for scales, which are bfloat16."""
    levels = torch.tensor(STAND_FOR[bits], dtype=torch.float64)
    left, gram = weight.double().clone(), gram.double()
    moment = gram / gram.diagonal().mean() + DAMPING * torch.eye(IN, dtype=torch.float64)
    inverse = torch.linalg.inv(moment)
    result = torch.empty_like(left)

    def nearest(values: Tensor, scales: Tensor) -> Tensor:
        return levels[(values[..., None] - levels * scales[..., None]).abs().argmin(dim=-1)] * scales

    for column in range(IN):
        if column % GROUP == 0:
            group = slice(column, min(column + GROUP, IN))
            candidates = [
                (left[:, group].abs().amax(dim=1) / levels.max() * share).bfloat16().double()
                for share in torch.linspace(1, 0.3, 20).tolist()
            ]
            errors = torch.stack([
                (((left[:, group] - nearest(left[:, group], one[:, None])) ** 2) * moment.diagonal()[group]).sum(dim=1)
                for one in candidates
            ])  # fmt: skip
            scales = torch.stack(candidates).gather(0, errors.argmin(dim=0)[None])[0]
        result[:, column] = nearest(left[:, column], scales)
        lost = (left[:, column] - result[:, column]) / inverse[column, column]
        left -= lost[:, None] * inverse[column]
        inverse = inverse - torch.outer(inverse[column], inverse[column]) / inverse[column, column]
        inverse[column], inverse[:, column] = 0, 0
        inverse[column, column] = 1  # never used again
    return result


@pytest.mark.parametrize("bits", LEVELS)
def test_it_is_the_float64_computation(bits: int, problem: tuple[Tensor, Tensor]) -> None:
    """But for numbers halfway between two levels, which float32 may take for the other."""
    weight, gram = problem
    found, expected = round_matrix(weight, gram, bits).dense(), oracle(weight, gram, bits)
    scales = weight.abs().max() / max(STAND_FOR[bits])
    same = (found - expected).abs() < 0.01 * scales
    assert same.double().mean() > 0.995
    assert error(weight, found, gram) == pytest.approx(error(weight, expected, gram), rel=0.01)


@pytest.mark.parametrize("bits", LEVELS)
def test_feedback_pays(bits: int, problem: tuple[Tensor, Tensor]) -> None:
    weight, gram = problem
    errors = [error(weight, round_matrix(weight, one, bits).dense(), gram) for one in (gram, None)]
    assert errors[0] < 0.7 * errors[1]


@pytest.mark.parametrize("bits", LEVELS)
def test_codes_stand_for_levels(bits: int, problem: tuple[Tensor, Tensor]) -> None:
    """As METHODS 4.1 has them; every group has its scale, the last one is short."""
    rounded = round_matrix(problem[0], problem[1], bits)
    assert rounded.codes.dtype == torch.uint8
    assert int(rounded.codes.max()) < 2**bits
    assert rounded.scales.shape == (OUT, 4)
    assert rounded.scales.dtype == torch.bfloat16
    levels = torch.tensor(STAND_FOR[bits])
    for group in range(4):
        part = rounded.dense()[:, group * GROUP : (group + 1) * GROUP] / rounded.scales[:, [group]].float()
        assert (part[..., None] - levels).abs().amin(dim=-1).max() < 1e-5


def test_blocks_are_a_matter_of_speed(problem: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gram = problem
    blocked = round_matrix(weight, gram, 3).dense()
    monkeypatch.setattr("offline.algebra.rounding.BLOCK", 2 * BLOCK)
    assert (round_matrix(weight, gram, 3).dense() - blocked).abs().gt(1e-5).double().mean() < 0.01


def test_several_at_once_are_what_each_alone_is(problem: tuple[Tensor, Tensor]) -> None:
    """To the bit, whatever their rows and bits."""
    weight, gram = problem
    weights, bits = [weight, weight[:1] * 3, weight[5:12], weight, weight.flip(0)], [2, 8, 3, 4, 2]
    for moment in (gram, None):
        found = round_matrices(weights, moment, bits)
        for one, own, number in zip(found, weights, bits, strict=True):
            alone = round_matrix(own, moment, number)
            assert torch.equal(one.codes, alone.codes)
            assert torch.equal(one.scales, alone.scales)
            assert (one.bits, one.damping) == (number, alone.damping)
    with pytest.raises(ValueError, match="2 5 bits"):
        round_matrices([weight, weight], gram, [2, 5])


@pytest.mark.parametrize("bits", LEVELS)
def test_odd_matrices_and_moments(bits: int, problem: tuple[Tensor, Tensor]) -> None:
    """Zero rows, groups and inputs; weights that underflow a scale; a moment of zeros, and one of rank 1."""
    weight, gram = problem[0].clone(), problem[1]
    weight[0], weight[1, :GROUP], weight[2] = 0, 0, 1e-42
    rank_one = torch.outer(gram[0], gram[0])
    rank_one[5], rank_one[:, 5] = 0, 0
    for moment in (None, torch.zeros_like(gram), rank_one):
        found = round_matrix(weight, moment, bits)
        assert torch.isfinite(found.dense()).all()
        assert (found.dense()[0] == 0).all()
        if moment is None or not moment.any():
            assert (found.dense()[1, :GROUP] == 0).all()
            assert torch.equal(found.dense(), round_matrix(weight, None, bits).dense())
    assert round_matrix(weight, rank_one, bits).damping >= DAMPING
    with pytest.raises(ValueError, match="5 bits"):
        round_matrix(weight, None, 5)


def test_rounded_rows_of_a_comparison(few_words: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
    """Counted as codes and scales, to the byte; more bits are better, and so is feedback; each size once, whatever
    ratios are asked for. What was made holds a few numbers for each group of inputs."""
    names = ("rtn-2", "gptq-2", "rtn-8")
    short_text = tmp_path / "short.txt"
    short_text.write_text(texts[1].read_text()[:6000])
    given = ("--text", short_text, "--calibration", few_words, "--windows", "16", "--seq-len", "64")
    given = ("compare", TINY, *given, "--workdir", tmp_path / "work")
    done = d2moe_here(*given, "--ratio", "0.2", "0.4", "--baseline", *names, "--keep", "--json")
    assert done.returncode == 0, done.stderr
    source, *rows = json.loads(done.stdout)["rows"]
    assert [row["name"] for row in rows] == list(names)
    (text,) = source["perplexity"]
    by_name = {row["name"]: row["perplexity"][text] for row in rows}
    assert source["perplexity"][text] < by_name["gptq-2"] < by_name["rtn-2"]
    assert by_name["rtn-8"] == pytest.approx(source["perplexity"][text], rel=0.01)
    experts, parameters = 4 * 8, 3 * 128 * 256
    for row, bits in zip(rows, (2, 2, 8), strict=True):
        # 128 and 256 inputs are whole groups of 64.
        stored = experts * parameters * (bits / 8 + 2 / 64)
        assert row["counted"]["bytes"] == source["bytes"] - experts * parameters * 2 + stored
        assert row["counted"]["ratio"] == pytest.approx(row["ratio"], abs=1e-4)
    tensors = load_file(next(Path(rows[1]["path"]).glob("*.safetensors")))
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    groups = tensors[name].float().view(128, 4, 64)
    assert max(len(set(row.tolist())) for group in groups.transpose(0, 1) for row in group) <= 4
    original = load_file(TINY / "model.safetensors")
    assert torch.equal(tensors["lm_head.weight"], original["lm_head.weight"])
    table = d2moe_here(*given, "--ratio", "0.2", "--baseline", "rtn-8")
    assert "counted as codes with a 16-bit scale" in table.stdout
