"""What a compression must be whatever the model: exact where nothing is left out, honest about its errors and
bytes, and blind to the order of windows and experts. Every figure is computed anew here, in float64."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from compression import COMPRESS, TINY
from families import CONFIGS, write_family
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import silu
from transformers import AutoModelForCausalLM

from d2moe_vllm.format.files import read_config
from d2moe_vllm.format.kinds import ROLES, Role
from offline.checkpoint.publish import publish
from offline.checkpoint.reconstruction import Reconstruction
from offline.io.progress import Steps
from offline.io.shards import Reader
from offline.plan.budget import FULL, Choices, solve_stored
from offline.plan.make import make_plan
from offline.plan.plan import Plan, Resources
from offline.plan.recipe import Recipe
from offline.plan.settling import error_curves, settle
from offline.run.calibration import compress_layers
from offline.source.dense import open_dense
from offline.source.sites import SITES
from offline.source.text import as_text
from offline.source.tokens import Windows, choose_windows, open_tokenizer
from offline.work.workdir import WorkDir

Matrices = dict[tuple[int, int, Role], Tensor]
"""Layer, expert and role -> float64 [out, in]."""
LENGTH = 32


def recipe(ratio: float = 0.08, windows: int = 8, **sections: Any) -> Recipe:
    calibration = {"windows": windows, "seq_len": LENGTH, **sections.pop("calibration", {})}
    asked = {"ratio": ratio, "bits": 16, "allocation": "uniform", "calibration": calibration, **sections}
    return Recipe.model_validate(asked)


@pytest.fixture(scope="module")
def windows(texts: tuple[Path, Path]) -> Windows:
    return choose_windows(open_tokenizer(TINY), as_text(texts[0]), 8, LENGTH, 0)


def run(plan: Plan, windows: Windows, folder: Path) -> tuple[Plan, WorkDir]:
    """Calibrates, settles and writes; the settled plan, and the working folder, which stays."""
    work = WorkDir(folder, {})
    with Steps(1, Console(file=StringIO())) as steps:
        return compress_layers(plan, windows.tokens, work, steps, torch.device("cpu")), work


def compress(plan: Plan, windows: Windows, folder: Path) -> Path:
    """As `d2moe compress` does, from a plan that may be one that the command would not make."""
    folder.mkdir(parents=True)
    settled, work = run(plan, windows, folder / "work")
    publish(settled, windows, work, folder / "out", lambda: None)
    work.close()
    return folder / "out"


def reconstructions(folder: Path) -> Matrices:
    config = read_config(folder)
    rebuilt = Reconstruction(Reader(folder), config, torch.float64)
    return {
        (layer, expert, role): rebuilt.weight(layer, expert, role)
        for layer in config.layers
        for expert in range(config.num_experts)
        for role in config.roles
    }


def distance(found: Tensor, expected: Tensor) -> float:
    """Relative, Frobenius."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


# Nothing left out


EXACT_IN_FAST_TIER = ("mixtral", "deepseek_v3", "granitemoe")
LOSSLESS: dict[str, dict[str, Any]] = {
    "default": {},
    "regmean": {"base": {"merge": "regmean"}},
    "svd": {"delta": {"method": "svd"}},
    "asvd": {"delta": {"method": "asvd"}},
    "prune": {"delta": {"method": "prune"}},
    "svd-base": {"base": {"kind": "svd"}},
    "no-base": {"base": {"kind": "none"}},
    "one-u-each": {"delta": {"distinct_u": 4}},
    "follows": {"calibration": {"inputs": "compressed"}},
}


@pytest.mark.parametrize(
    ("family", "method"),
    [
        pytest.param(family, "default", marks=[] if family in EXACT_IN_FAST_TIER else pytest.mark.slow)
        for family in CONFIGS
    ]
    + [("mixtral", method) for method in LOSSLESS if method != "default"],
)
def test_full_rank_and_no_pruning_are_the_original(family: str, method: str, windows: Windows, tmp_path: Path) -> None:
    """A base beside deltas of full rank is larger than the original, so no ratio asks for it: the plan is ours."""
    source = write_family(tmp_path / "source", family, dtype=torch.float32)
    asked = {**LOSSLESS[method], "base": {"sparsity": 0, **LOSSLESS[method].get("base", {})}}
    planned = make_plan(open_dense(str(source)), recipe(**asked))
    problem = planned.problem
    ranks = problem.uniform(FULL)
    budget = problem.solve(problem.same(problem.options[0]), ranks)
    found = reconstructions(compress(replace(planned, budget=budget, caps=ranks), windows, tmp_path / "run"))
    assert {layer for layer, _, _ in found} == set(planned.model.shape.layers)
    for (layer, expert, role), matrix in found.items():
        assert distance(matrix, planned.model.weight(layer, expert, role)) < 1e-6, (layer, expert, role)


# Errors


def hooked(folder: Path, tokens: Tensor, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """What the stock model hands to a layer's experts: inputs [tokens, hidden], choice and gates [tokens, k]."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    seen: list[Sequence[Tensor]] = []
    model.model.layers[layer].mlp.experts.register_forward_pre_hook(lambda _, arguments: seen.append(arguments))
    with torch.no_grad():
        for window in tokens:
            model(input_ids=window[None])
    inputs, choice, gates = (torch.cat(parts) for parts in zip(*seen, strict=True))
    return inputs.double(), choice, gates.double()


def shrunk(rows: Tensor, strength: float) -> Tensor:
    """The second moment of an expert's inputs, pulled to the identity as METHODS 1.3 says; rows: [tokens, n]."""
    tokens, size = rows.shape
    gram = rows.T @ rows / tokens
    share = strength * size / (strength * size + tokens)
    return (1 - share) * gram + share * gram.trace() / size * torch.eye(size, dtype=torch.float64)


def test_the_errors_reported_are_those_of_the_files(compressed: Path, texts: tuple[Path, Path]) -> None:
    layer, windows = 1, int(COMPRESS[COMPRESS.index("--windows") + 1])
    length = int(COMPRESS[COMPRESS.index("--seq-len") + 1])
    chosen = choose_windows(open_tokenizer(TINY), as_text(texts[0]), windows, length, 0)
    stats = json.loads((compressed / "d2moe_stats.json").read_text())
    assert stats["calibration"]["tokens_sha256"] == chosen.sha256
    inputs, choice, gates = hooked(TINY, chosen.tokens, layer)
    found, source = reconstructions(compressed), open_dense(str(TINY))
    report = stats["layers"][str(layer)]
    for expert in range(8):
        token, slot = (choice == expert).nonzero(as_tuple=True)
        assert report["tokens"][expert] == pytest.approx(len(token), abs=2)  # a tie may break the other way
        weights = {role: source.weight(layer, expert, role).double() for role in ROLES}
        rows, gate = inputs[token], gates[token, slot, None]
        middle = silu(rows @ weights["gate"].T) * (rows @ weights["up"].T)
        for role in ROLES:
            gram = shrunk((middle if role == "down" else rows) * gate, strength=0.1)
            lost = weights[role] - found[layer, expert, role]
            error = float((lost @ gram * lost).sum() / (weights[role] @ gram * weights[role]).sum()) ** 0.5
            assert report["relative_error"][role][expert] == pytest.approx(error, rel=1e-3), (expert, role)


def test_errors_fall_as_the_ratio_falls(windows: Windows, tmp_path: Path) -> None:
    model = open_dense(str(write_family(tmp_path / "source", "qwen3_moe")))
    errors: dict[Role, list[float]] = {role: [] for role in ROLES}
    for ratio in (0.16, 0.12, 0.08, 0.04):
        out = compress(make_plan(model, recipe(ratio)), windows, tmp_path / f"{ratio}")
        layers = json.loads((out / "d2moe_stats.json").read_text())["layers"].values()
        for role in ROLES:
            each = [error for layer in layers for error in layer["relative_error"][role]]
            errors[role].append(sum(each) / len(each))
    for role, curve in errors.items():
        assert curve == sorted(curve, reverse=True), role
        assert curve[-1] < 0.9 * curve[0], role


# Order


ORDERED: dict[str, dict[str, Any]] = {
    "default": {},
    "ties": {"base": {"merge": "ties"}},
    "shared": {"delta": {"share_v": True, "distinct_u": 2, "trim": 1}, "base": {"merge": "regmean"}},
    "adaptive": {"allocation": "adaptive", "base": {"kind": "auto"}},
    "follows": {"calibration": {"inputs": "compressed"}},
}


@pytest.mark.parametrize("method", ORDERED)
def test_the_order_of_windows_does_not_matter(method: str, windows: Windows, tmp_path: Path) -> None:
    model = open_dense(str(write_family(tmp_path / "source", "mixtral", dtype=torch.float32)))
    # Several batches, so that sums really are made in another order.
    plan = replace(make_plan(model, recipe(**ORDERED[method])), resources=Resources(batch_tokens=3 * LENGTH, rows=64))
    other = replace(windows, tokens=windows.tokens[torch.tensor([5, 2, 7, 0, 1, 6, 3, 4])])
    first, second = (
        reconstructions(compress(plan, chosen, tmp_path / name)) for name, chosen in (("a", windows), ("b", other))
    )
    for key, matrix in first.items():
        assert distance(second[key], matrix) < 1e-4, key


@pytest.mark.parametrize("method", ORDERED)
def test_what_is_in_memory_at_once_does_not_matter(method: str, windows: Windows, tmp_path: Path) -> None:
    model = open_dense(str(write_family(tmp_path / "source", "mixtral", dtype=torch.float32)))
    plan = make_plan(model, recipe(**ORDERED[method]))
    sizes = {"much": Resources(), "little": Resources(batch_tokens=LENGTH, rows=10, hold_layer=False)}
    first, second = (
        reconstructions(compress(replace(plan, resources=size), windows, tmp_path / name))
        for name, size in sizes.items()
    )
    for key, matrix in first.items():
        assert distance(second[key], matrix) < 1e-4, key


@pytest.mark.parametrize("hold", [True, False])
def test_a_base_is_read_once_where_there_is_room(hold: bool, windows: Windows, tmp_path: Path) -> None:
    model = open_dense(str(TINY))
    plan = replace(make_plan(model, recipe(0.3, allocation="adaptive")), resources=Resources(hold_layer=hold))
    read: Counter[tuple[Any, ...]] = Counter()
    load = WorkDir.load_part

    def counted(work: WorkDir, layer: int, part: str, *keys: str) -> dict[str, Tensor]:
        read[(layer, part, *keys)] += 1
        return load(work, layer, part, *keys)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WorkDir, "load_part", counted)
        settled, work = run(plan, replace(windows, tokens=windows.tokens[:2]), tmp_path / "work")
    work.close()
    times = [count for (_, part, *_), count in read.items() if part == "base"]
    based = sum(settled.budget.choices[layer, SITES[role]] != "none" for layer in range(4) for role in ROLES)
    assert based > 2
    assert times == [1 if hold else 8] * based  # of eight experts each; what is measured is never on disk


@pytest.mark.parametrize("method", ORDERED)
def test_the_order_of_experts_does_not_matter(method: str, windows: Windows, tmp_path: Path) -> None:
    folders, order = ("source", "permuted"), [2, 0, 3, 1]
    for folder in folders:
        write_family(tmp_path / folder, "mixtral", dtype=torch.float32)
    file = tmp_path / "permuted" / "model.safetensors"
    save_file(dict(_permute(load_file(file), order)), file, {"format": "pt"})
    plans = {name: make_plan(open_dense(str(tmp_path / name)), recipe(**ORDERED[method])) for name in folders}
    first, second = (reconstructions(compress(plan, windows, tmp_path / f"{name}-run")) for name, plan in plans.items())
    for (layer, place, role), matrix in second.items():
        assert distance(matrix, first[layer, order[place], role]) < 1e-4, (layer, place, role)


def _permute(tensors: Mapping[str, Tensor], order: list[int]) -> Mapping[str, Tensor]:
    """Expert `order[i]` becomes number i."""
    moved = {}
    for name, tensor in tensors.items():
        if ".experts." in name:
            head, _, tail = name.partition(".experts.")
            number, _, rest = tail.partition(".")
            moved[f"{head}.experts.{order.index(int(number))}.{rest}"] = tensor
        else:
            moved[name] = tensor[order].contiguous() if name.endswith("block_sparse_moe.gate.weight") else tensor
    return moved


# Budgets


@pytest.mark.parametrize("kind", ["semi-dynamic", "none", "auto"])
def test_adaptive_is_never_worse_than_uniform(kind: str, windows: Windows, tmp_path: Path) -> None:
    """By its own measure, which both are read from: what the error of every projection costs, summed."""
    model = open_dense(str(TINY))
    asked = {"allocation": "adaptive", "base": {"kind": kind}}
    plan = make_plan(model, recipe(0.2, **asked))
    _, work = run(plan, windows, tmp_path / "work")
    curves = error_curves(plan, work)

    def cost(choices: Choices, ranks: Mapping[tuple[int, Role], int]) -> float:
        return sum(
            float(curves[layer, choices[layer, "middle" if role == "down" else "input"], role][rank])
            for (layer, role), rank in ranks.items()
        )

    assert plan.problem.rank_multiple == 1
    for ratio in (0.2, 0.3, 0.4, 0.5, 0.6):
        adaptive = settle(replace(plan, recipe=plan.recipe.model_copy(update={"ratio": ratio})), work).budget
        target = int((1 - ratio) * model.reader.nbytes)
        assert adaptive.nbytes <= target
        for option in plan.problem.options:
            uniform = solve_stored(plan.problem, ratio, option)
            assert uniform.nbytes <= target
            better, worse = cost(adaptive.choices, adaptive.ranks), cost(uniform.choices, uniform.ranks)
            assert better <= worse * (1 + 1e-12), (ratio, option)
    work.close()


@pytest.mark.parametrize("method", ["default", "trim", "adaptive", "prune"])
def test_bytes_on_disk_are_what_was_planned(method: str, windows: Windows, tmp_path: Path) -> None:
    """Over several files, each with a header of its own."""
    asked = {
        "default": {},
        "trim": {"delta": {"trim": 2}},
        "adaptive": {"allocation": "adaptive"},
        "prune": {"delta": {"method": "prune"}},
    }[method]
    model = open_dense(str(write_family(tmp_path / "source", "olmoe")))
    for ratio in (0.06, 0.1003):
        plan = make_plan(model, recipe(ratio, **asked), shard_bytes=300_000)
        out = compress(plan, windows, tmp_path / f"{ratio}")
        on_disk = {path.name: path.stat().st_size for path in out.glob("*.safetensors")}
        if plan.settled:
            assert on_disk == {shard.file: shard.nbytes for shard in plan.budget.shards}
        assert len(on_disk) > 2
        assert sum(on_disk.values()) <= (1 - ratio) * model.reader.nbytes
