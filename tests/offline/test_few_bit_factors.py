"""Factors and bases of every method in few bits (METHODS 4.1): what is stored, that it is within the ratio, and that
rounding with feedback loses no more than rounding to nearest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from compression import TINY, d2moe_here
from hostile import digests
from processes import Compression
from safetensors.torch import load_file
from synthetic import NAMES, dense_expert
from torch import Tensor
from transformers import AutoModelForCausalLM

from d2moe_vllm.format.config import CheckpointConfig
from d2moe_vllm.format.files import check_checkpoint
from d2moe_vllm.format.kinds import ROLES, STORAGES
from offline.algebra.factorization import whitened_energy, whitened_factors
from offline.algebra.sharing import fitted_v
from offline.checkpoint.reconstruction import Reconstruction
from offline.io.shards import Reader
from offline.methods.storing import Storing

FEW = ("--windows", "8", "--seq-len", "64")
ZERO = {"int8": 128, "int4": 8, "int3": 3.5, "int2": 1.5}
FACTORS = {"delta": {"method": "whitened"}}
CASES: dict[str, tuple[float, dict[str, Any]]] = {
    "d2": (0.57, {"bits": 4, **FACTORS}),
    "pruned": (0.6, {"bits": 3, "allocation": "uniform", **FACTORS, "base": {"kind": "semi-dynamic"}}),
    "shared": (0.6, {"bits": 4, "base": {"kind": "svd"}, "delta": {"method": "whitened", "share_v": True}}),
    "clusters": (0.55, {"bits": 8, "base": {"kind": "static"}, "delta": {"method": "whitened", "distinct_u": 3}}),
    "both": (
        0.64,
        {"bits": 2, "group_size": 32, "base": {"kind": "static"},
         "delta": {"method": "whitened", "share_v": True, "distinct_u": 5, "trim": 1}},
    ),
    "columns": (0.55, {"bits": 4, "delta": {"method": "prune"}}),
    "moe-svd": (0.6, {"method": "moe-svd", "bits": 4}),
    "trimmed moe-svd": (
        0.64,
        {"method": "moe-svd", "bits": 3, "moe_svd": {"share_v": "refit"}, "delta": {"distinct_u": 5}},
    ),
    "mobe": (0.56, {"method": "mobe", "bits": 4, "mobe": {"max_steps": 20}}),
}  # fmt: skip
"""Ratio and recipe."""
QUICK = ("pruned", "both", "moe-svd", "mobe")
"""The fast tier's, of which each stores and rounds what the others do not."""
NAMED = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES]


def command(*arguments: object) -> dict[str, Any]:
    done = d2moe_here(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, few_words: Path) -> Any:
    """A case's checkpoint, made once. Not to be changed."""
    folder = tmp_path_factory.mktemp("factors")

    def make(name: str) -> Path:
        ratio, recipe = CASES[name]
        out = folder / name.replace(" ", "-")
        if not out.exists():
            path = folder / f"{out.name}.yaml"
            path.write_text(yaml.safe_dump(recipe))
            command("compress", TINY, out, "--ratio", ratio, "--recipe", path, *FEW, "--calibration", few_words)
        return out

    return make


def meaning(folder: Path, config: CheckpointConfig) -> dict[str, Tensor]:
    """Every tensor by its name, packed ones as what they stand for, float64: read bit by bit, with none of our code."""
    tensors = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    found = {name: tensor for name, tensor in tensors.items() if not name.endswith("_scales")}
    for number in config.layers:
        for name, one in config.stored(number).items():
            storage = one.kind.storage(config.layers[number][one.role])
            if storage is None or not STORAGES[storage.type].bits or name.endswith("_scales"):
                continue
            bits, scales = STORAGES[storage.type].bits, tensors[f"{name}_scales"].double()
            inputs = one.numbers // tensors[name][..., 0].numel()
            rows = tensors[name].flatten(0, -2).tolist()
            codes = []
            for row in rows:
                word = int.from_bytes(bytes(row), "little")
                codes.append([word >> bits * place & 2**bits - 1 for place in range(inputs)])
            values = torch.tensor(codes, dtype=torch.float64) - ZERO[storage.type]
            wide = scales.flatten(0, -2).repeat_interleave(storage.group_size, dim=1)[:, :inputs]
            found[name] = (values * wide).view(*tensors[name].shape[:-1], inputs)
    return found


@pytest.mark.parametrize("name", NAMED)
def test_what_is_stored_is_what_codes_and_scales_say(name: str, made: Any, tmp_path: Path) -> None:
    ratio, recipe = CASES[name]
    folder: Path = made(name)
    config = check_checkpoint(folder)
    found = command("verify", folder, "--source", TINY)
    assert (found["sound"], found["problems"]) == (True, [])
    assert all(0 < layer[role]["mean"] < 1 for layer in found["layers"].values() for role in ROLES)
    seen = command("inspect", folder)
    assert seen["bytes"] == Reader(folder).nbytes
    assert ratio <= seen["stored_ratio"] < ratio + 0.005
    kinds = {storage.type for layer in config.layers.values() for role in ROLES
             for storage in (layer[role].base_storage, layer[role].delta_storage) if storage is not None}  # fmt: skip
    assert kinds == {f"int{recipe['bits']}"}
    matrices = [one for layer in config.layers for one in config.stored(layer).values() if one.kind.content == "matrix"]
    assert {one.spec.dtype for one in matrices} == {"U8", "BF16"}
    assert f"{recipe['bits']}-bit" in seen["stores"]
    assert seen["stores"] in (folder / "README.md").read_text()

    tensors = meaning(folder, config)
    reader = Reader(folder)
    reconstruction = Reconstruction(reader, config)
    for layer in config.layers:
        for role in ROLES:
            for expert in (0, 1, 5, 7):
                expected = dense_expert(tensors, layer, expert, role)
                torch.testing.assert_close(
                    reconstruction.weight(layer, expert, role).double(), expected, rtol=1e-4, atol=1e-5
                )
            shared = f"{config.experts_prefix(layer)}.0.{NAMES[role]}"
            if f"{shared}.base_norms" in tensors:  # of the base as stored
                torch.testing.assert_close(
                    tensors[f"{shared}.base_norms"].double(), tensors[f"{shared}.base"].norm(dim=0), rtol=1e-5, atol=0
                )


@pytest.mark.parametrize("name", ["moe-svd", "mobe", "pruned"])
@torch.no_grad()
def test_plain_transformers_loads_it(name: str, made: Any, tmp_path: Path) -> None:
    """By the code that travels in the checkpoint; beside the export, whose experts were rounded to bfloat16."""
    folder: Path = made(name)
    command("export", folder, tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True).eval()
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32).eval()
    tokens = torch.arange(5, 45)[None]
    first, second = (one(tokens).logits for one in (model, dense))
    assert float((first - second).abs().max()) < 0.1 * float(second.std())


def moment(size: int, seed: int) -> Tensor:
    """Of inputs that go together."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(size, size, generator=generator) * (0.02 + torch.rand(size, generator=generator) ** 4)
    rows = torch.randn(4 * size, size, generator=generator) @ (mix + 0.3 * torch.eye(size))
    return rows.T @ rows / len(rows)


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize(("rows", "inputs", "rank"), [(96, 64, 24), (48, 160, 40)])
def test_feedback_loses_no_more_than_nearest(bits: int, rows: int, inputs: int, rank: int) -> None:
    """Of the whole matrix, in the metric of its inputs: what factors leave besides is the same."""
    delta, gram = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(bits)), moment(inputs, rank)
    u, v = whitened_factors(delta, gram, rank)
    storing = Storing(bits, 64, torch.bfloat16)
    left, right = storing.factors(delta, gram, u, v)
    plain = [storing.store([one], None)[0].numbers for one in (u, v)]
    best = whitened_energy(delta - u @ v, gram)
    lost = whitened_energy(delta - left.numbers @ right.numbers, gram) - best
    nearest = whitened_energy(delta - plain[0] @ plain[1], gram) - best
    assert -1e-4 * best < lost < 0.9 * nearest


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("case", ["zero", "rank one", "tiny", "few inputs seen"])
def test_matrices_of_lower_rank_survive_rounding(bits: int, case: str) -> None:
    """Rows of V that hold nothing but noise must not be made use of: no worse than the one component alone."""
    generator = torch.Generator().manual_seed(1)
    delta, gram = torch.randn(20, 16, generator=generator), torch.eye(16)
    if case == "zero":
        delta = torch.zeros(20, 16)
    elif case == "rank one":
        delta = torch.outer(delta[:, 0], delta[0])
    elif case == "tiny":
        delta *= 1e-12
    else:
        gram = torch.diag(torch.tensor([1.0] * 3 + [0.0] * 13))
    u, v = whitened_factors(delta, gram, 6)
    storing = Storing(bits, 64, torch.bfloat16)
    left, right = storing.factors(delta, gram, u, v)
    assert torch.isfinite(left.numbers).all()
    assert torch.isfinite(right.numbers).all()
    plain = [storing.store([one], None)[0].numbers for one in (u, v)]
    lost = whitened_energy(delta - left.numbers @ right.numbers, gram)
    assert lost <= 1.05 * whitened_energy(delta - plain[0] @ plain[1], gram)


def test_a_fitted_v_is_the_best_there_is() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, u = (torch.randn(30, size, generator=generator, dtype=torch.float64) for size in (20, 7))
    expected = torch.linalg.lstsq(u, weight).solution
    torch.testing.assert_close(fitted_v(weight, u), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize(
    "asked", [{**FACTORS}, {"method": "moe-svd"}, {"method": "mobe"}, {"delta": {"method": "prune"}}],
    ids=["d2", "moe-svd", "mobe", "prune"],
)  # fmt: skip
def test_plans_keep_the_ratio_and_leave_half_a_point_at_most(bits: int, asked: dict[str, Any], tmp_path: Path) -> None:
    """Or say that every rank is full."""
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"bits": bits, **asked}))
    reached = 0
    for ratio in (0.3, 0.45, 0.5, 0.55, 0.6, 0.63):
        done = d2moe_here("plan", TINY, "--recipe", tmp_path / "recipe.yaml", "--ratio", ratio, "--json")
        if done.returncode:
            assert "cannot be reached" in done.stderr
            continue
        reached += 1
        result = json.loads(done.stdout)["result"]
        assert result["stored_ratio"] >= ratio
        assert result["stored_ratio"] < ratio + 0.005 or result["saves_nothing"]
    assert reached >= 2


def test_full_ranks_are_said_to_be_enough(few_words: Path, tmp_path: Path) -> None:
    given = ("--ratio", "0.3", "--method", "moe-svd", "--bits", "4", *FEW)
    done = d2moe_here("compress", TINY, tmp_path / "out", *given, "--calibration", few_words)
    assert done.returncode == 0, done.stderr
    assert "this is smaller than asked for" in done.stdout
    config = check_checkpoint(tmp_path / "out")
    assert all(layer[role].rank == 128 for layer in config.layers.values() for role in ROLES)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("bits: 4\nbase: {kind: static}", "base.kind static does not go with bits 4"),
        ("bits: 4\ndelta: {method: whitened}\naccounting: paper", "accounting paper counts numbers"),
        ("bits: auto\ndelta: {method: whitened}", "bits auto chooses among whole deltas of method d2"),
    ],
)
def test_what_does_not_go_together_is_one_line(content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(content)
    done = d2moe_here("plan", TINY, "--ratio", "0.5", "--recipe", tmp_path / "recipe.yaml")
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1


POINTS = [
    ("pruned", "layers/00002/base.safetensors"),
    pytest.param("d2", "layers/00003/measured-00004.safetensors", marks=pytest.mark.slow),
    pytest.param("d2", "layers/00002/00004.safetensors", marks=pytest.mark.slow),
    pytest.param("clusters", "layers/00002/00004.safetensors", marks=pytest.mark.slow),
    pytest.param("mobe", "layers/00001/fit-gate.safetensors", marks=pytest.mark.slow),
    pytest.param("moe-svd", "layers/00002/shared.safetensors", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "point"), POINTS)
def test_a_killed_run_ends_in_the_same_bytes(name: str, point: str, made: Any, few_words: Path, tmp_path: Path) -> None:
    ratio, recipe = CASES[name]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    arguments = (TINY, tmp_path / "out", "--ratio", ratio, "--recipe", tmp_path / "recipe.yaml", *FEW)
    killed = Compression(*arguments, "--calibration", few_words)
    assert killed.wait_for(lambda: list(tmp_path.glob(f"out.d2moe-work/{point}")))
    assert killed.kill()
    done = Compression(*arguments, "--calibration", few_words).end()
    assert done.returncode == 0, done.stderr
    ours = {name: digest for name, digest in digests(tmp_path / "out").items() if name.endswith(".safetensors")}
    assert ours.items() <= digests(made(name)).items()
