"""CKA and energy retention against independent float64 computations; `inspect --analyses` on the bundled model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from compression import TINY, d2moe_here
from edits import add_records
from safetensors.torch import load_file
from synthetic import NAMES, dense_expert, write_checkpoint
from torch import Tensor

from offline.algebra.analysis import (
    SHARES,
    cka_matrix,
    energy_curve,
    gram_count,
    spectrum,
    unit_gram,
    unrelated_cka,
)


def linear_cka(first: torch.Tensor, second: torch.Tensor) -> float:
    return float(unit_gram(first) @ unit_gram(second))


def by_definition(first: torch.Tensor, second: torch.Tensor) -> float:
    """tr(HKHL) / sqrt(tr(HKHK) tr(HLHL)) with H written out."""
    first, second = first.double(), second.double()
    n = len(first)
    h = torch.eye(n, dtype=torch.float64) - torch.ones(n, n, dtype=torch.float64) / n
    k, m = first @ first.T, second @ second.T
    return float((h @ k @ h @ m).trace() / ((h @ k @ h @ k).trace() * (h @ m @ h @ m).trace()).sqrt())


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_cka_is_the_papers_formula() -> None:
    first, second = random(20, 30), random(20, 7, seed=1) + 3
    assert linear_cka(first, second) == pytest.approx(by_definition(first, second), abs=1e-12)
    assert linear_cka(second, first) == pytest.approx(by_definition(first, second), abs=1e-12)
    mixed = first + 0.5 * random(20, 30, seed=2)
    assert linear_cka(first, mixed) == pytest.approx(by_definition(first, mixed), abs=1e-12)


def test_cka_sees_through_rotation_scale_and_offset_and_no_more() -> None:
    first = random(20, 12)
    rotation = torch.linalg.qr(random(12, 12, seed=1)).Q
    assert linear_cka(first, first) == pytest.approx(1, abs=1e-12)
    assert linear_cka(first, 7 * first @ rotation + random(12, seed=2)) == pytest.approx(1, abs=1e-12)
    assert linear_cka(first, first @ random(12, 12, seed=3)) < 0.99
    # Half of the samples vary here, the other half there.
    left, right = torch.zeros(20, 1, dtype=torch.float64), torch.zeros(20, 1, dtype=torch.float64)
    left[:4, 0], right[4:8, 0] = (torch.tensor([1.0, -1.0, 1.0, -1.0]).double(),) * 2
    assert linear_cka(left, right) == pytest.approx(0, abs=1e-12)
    assert linear_cka(first, torch.ones(20, 3, dtype=torch.float64)) == 0


@pytest.mark.parametrize("block", [1, 2, 5, 100])
def test_blocks_do_not_change_the_matrix(block: int) -> None:
    experts = [random(16, 9 + e, seed=e) for e in range(5)]
    asked: list[int] = []

    def matrix(index: int) -> torch.Tensor:
        asked.append(index)
        return experts[index]

    found = cka_matrix(matrix, 5, block)
    expected = torch.tensor([[by_definition(a, b) for b in experts] for a in experts], dtype=torch.float64)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    assert len(asked) == gram_count(5, block)


def test_unrelated_matrices_have_the_predicted_cka() -> None:
    for n, p in ((40, 80), (80, 20)):
        found = [linear_cka(random(n, p, seed=2 * s), random(n, p, seed=2 * s + 1)) for s in range(30)]
        assert sum(found) / len(found) == pytest.approx(unrelated_cka(n, p), rel=0.02)


@pytest.mark.parametrize("shape", [(30, 12), (12, 30), (200, 200)])
def test_energy_is_the_share_of_squared_singular_values(shape: tuple[int, int]) -> None:
    matrix = random(*shape)
    energies = torch.linalg.svdvals(matrix).square()
    torch.testing.assert_close(spectrum(matrix), energies, rtol=1e-9, atol=1e-9)
    rank = min(shape)
    expected = [float(energies[: -(-share * rank // 100)].sum() / energies.sum()) for share in SHARES]
    assert energy_curve(spectrum(matrix)) == pytest.approx(expected, abs=1e-12)
    assert energy_curve(spectrum(matrix))[-1] == pytest.approx(1, abs=1e-12)


def test_energy_of_low_rank_and_of_nothing() -> None:
    low = random(50, 5) @ random(5, 80, seed=1)
    curve = dict(zip(SHARES, energy_curve(spectrum(low)), strict=True))
    assert curve[10] == pytest.approx(1)
    assert curve[5] < 1
    assert energy_curve(spectrum(torch.zeros(4, 6))) == [1.0] * len(SHARES)


@pytest.fixture(scope="module")
def analysed(compressed: Path) -> dict:
    done = d2moe_here("inspect", compressed, "--analyses", "--json")
    assert done.returncode == 0, done.stderr
    assert "layer 3" in done.stderr
    return json.loads(done.stdout)["analyses"]


def stored_and_source(compressed: Path) -> tuple[dict, dict]:
    tensors: dict[str, torch.Tensor] = {}
    for file in compressed.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors, load_file(TINY / "model.safetensors")


def hidden_first(weight: torch.Tensor, role: str) -> torch.Tensor:
    return weight if role == "down" else weight.T


def kept(tensors: Mapping[str, Tensor], prefix: str) -> Tensor:
    """The input columns of a stored base, whichever kind the budget chose."""
    found = tensors.get(f"{prefix}.base_columns")
    return torch.arange(tensors[f"{prefix}.base"].shape[1]) if found is None else found.long()


@pytest.mark.parametrize("role", ["gate", "down"])
def test_analyses_of_the_reconstruction(compressed: Path, analysed: dict, role: str) -> None:
    tensors, _ = stored_and_source(compressed)
    found = analysed["layers"]["2"][role]
    experts = [dense_expert(tensors, 2, e, role) for e in range(8)]
    assert found["cka"][3][5] == pytest.approx(
        by_definition(hidden_first(experts[3], role), hidden_first(experts[5], role)), abs=1e-4
    )
    assert found["cka"][3][5] == found["cka"][5][3]
    curves = [energy_curve(torch.linalg.svdvals(e).square()) for e in experts]
    assert found["energy"]["experts"] == pytest.approx([sum(c) / 8 for c in zip(*curves, strict=True)], abs=1e-5)
    prefix = f"model.layers.2.block_sparse_moe.experts.0.{NAMES[role]}"
    base = torch.zeros(experts[0].shape, dtype=torch.float64)
    base[:, kept(tensors, prefix)] = tensors[f"{prefix}.base"].double()
    assert found["energy"]["base"] == pytest.approx(energy_curve(torch.linalg.svdvals(base).square()), abs=1e-5)
    rank = tensors[f"{prefix}.delta_u"].shape[1]
    full = next(n for n, share in enumerate(analysed["shares_of_rank"]) if share * 128 >= rank * 100)
    assert found["energy"]["deltas"][full] == pytest.approx(1, abs=1e-5)
    statistics = json.loads((compressed / "d2moe_stats.json").read_text())["layers"]["2"]["sensitivity"][role]
    sensitivity = analysed["layers"]["2"]["sensitivity"]
    assert (sensitivity["from"], analysed["experts_from"]) == ("sensitivity", "reconstruction")
    assert sensitivity[role] == pytest.approx(sum(statistics) / 8)


def test_with_a_source_it_is_the_source_that_is_analysed(compressed: Path, analysed: dict) -> None:
    done = d2moe_here("inspect", compressed, "--analyses", "--source", TINY, "--json")
    content = json.loads(done.stdout)["analyses"]
    assert (content["experts_from"], content["deltas_from"]) == ("source", "source minus base")
    tensors, source = stored_and_source(compressed)
    prefix = "model.layers.1.block_sparse_moe.experts"
    experts = [source[f"{prefix}.{e}.w1.weight"].double() for e in range(8)]
    found = content["layers"]["1"]["gate"]
    assert found["cka"][0][7] == pytest.approx(by_definition(experts[0].T, experts[7].T), abs=1e-4)
    base = torch.zeros(256, 128, dtype=torch.float64)
    base[:, kept(tensors, f"{prefix}.0.w1")] = tensors[f"{prefix}.0.w1.base"].double()
    curves = [energy_curve(torch.linalg.svdvals(e - base).square()) for e in experts]
    assert found["energy"]["deltas"] == pytest.approx([sum(c) / 8 for c in zip(*curves, strict=True)], abs=1e-5)
    assert found["energy"]["base"] == analysed["layers"]["1"]["gate"]["energy"]["base"]


def test_sensitivity_is_taken_from_the_statistics_where_they_have_it(tmp_path: Path) -> None:
    folder = tmp_path / "ours"
    write_checkpoint(folder)
    add_records(folder)
    path = folder / "d2moe_stats.json"
    content = json.loads(path.read_text())
    for number, report in content["layers"].items():
        report["sensitivity"] = {role: [int(number) + 0.25] * 6 + [int(number)] * 2 for role in NAMES}
    path.write_text(json.dumps(content))
    done = d2moe_here("inspect", folder, "--analyses", "--json")
    found = json.loads(done.stdout)["analyses"]["layers"]["3"]["sensitivity"]
    assert (found["from"], found["up"]) == ("sensitivity", pytest.approx(3.1875))
    for broken in ({"gate": [1.0]}, {role: [None] * 8 for role in NAMES}, {role: [float("nan")] for role in NAMES}):
        content["layers"]["2"]["sensitivity"] = broken
        path.write_text(json.dumps(content))
        done = d2moe_here("inspect", folder, "--analyses")
        assert (done.returncode, "statistics" in done.stderr) == (2, True)


def test_the_table_and_a_misplaced_source(compressed: Path) -> None:
    done = d2moe_here("inspect", compressed, "--analyses")
    assert "CKA mean" in done.stdout
    assert "unrelated" in done.stdout
    refused = d2moe_here("inspect", compressed, "--source", TINY)
    assert refused.returncode == 2
    assert "--analyses" in refused.stderr
