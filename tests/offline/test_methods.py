"""MoE-SVD and MoBE through every command: on the bundled model in detail, on every family in the slow tier."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from compression import ROOT, TINY, d2moe_here
from families import CONFIGS, write_family
from pydantic import Field
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from d2moe_vllm.format.files import read_config
from d2moe_vllm.format.kinds import ROLES, Role
from offline.io.shards import Reader
from offline.methods import METHODS
from offline.methods.base import WITHOUT_BASE, Method
from offline.methods.factors import Factors
from offline.methods.layer import LayerJob
from offline.methods.options import Option
from offline.methods.settings import Section
from offline.methods.storing import Matrix
from offline.source.families import FAMILIES

WINDOWS = ("--windows", "8", "--seq-len", "64")
SMALL = ("--windows", "4", "--seq-len", "32")
FEW_STEPS = {"max_steps": 30}
P = "model.layers.{}.block_sparse_moe.experts"


def command(*arguments: object) -> dict[str, Any]:
    """Runs a command that must succeed; what it prints as JSON."""
    done = d2moe_here(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def command_fails(*arguments: object) -> str:
    """Runs a command that must refuse in one line; the line."""
    done = d2moe_here(*arguments)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    return done.stderr


def write_recipe(folder: Path, **content: Any) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def short_text(tmp_path_factory: pytest.TempPathFactory, texts: tuple[Path, Path]) -> Path:
    path = tmp_path_factory.mktemp("text") / "short.txt"
    path.write_text(texts[1].read_text()[:3000])
    return path


@pytest.fixture(scope="module")
def svd(tmp_path_factory: pytest.TempPathFactory, texts: tuple[Path, Path]) -> Path:
    """The bundled model at 20 % with two layers that stay dense and five U's for eight experts. Not to be changed."""
    folder = tmp_path_factory.mktemp("svd")
    recipe = write_recipe(folder, moe_svd={"layer_ratio": 0.6}, delta={"distinct_u": 5})
    arguments = ("--ratio", "0.2", "--method", "moe-svd", "--recipe", recipe, *WINDOWS)
    planned = command("plan", TINY, *arguments[:-2])
    done = command("compress", TINY, folder / "out", *arguments, "--calibration", texts[0])
    assert planned["result"]["bytes"] == pytest.approx(done["result"]["bytes"], rel=1e-3)
    assert (planned["result"]["layers"], planned["result"]["dense_layers"]) == (2, 2)
    assert sorted(path.name for path in folder.iterdir()) == ["out", "recipe.yaml"]
    return folder / "out"


@pytest.fixture(scope="module")
def mobe(tmp_path_factory: pytest.TempPathFactory, texts: tuple[Path, Path]) -> Path:
    """The bundled model at 30 %, a short fit. Not to be changed."""
    folder = tmp_path_factory.mktemp("mobe")
    recipe = write_recipe(folder, mobe=FEW_STEPS)
    arguments = ("--ratio", "0.3", "--method", "mobe", "--recipe", recipe, *WINDOWS)
    planned = command("plan", TINY, *arguments)
    done = command("compress", TINY, folder / "out", *arguments, "--calibration", texts[0])
    assert planned["result"]["final"]
    assert planned["result"] == done["result"]
    return folder / "out"


@pytest.mark.parametrize("method", ["moe-svd", "mobe"])
def test_every_command_knows_the_method(
    method: str, request: pytest.FixtureRequest, short_text: Path, tmp_path: Path
) -> None:
    ours: Path = request.getfixturevalue(method.removeprefix("moe-"))
    found = command("verify", ours, "--source", TINY)
    assert (found["sound"], found["problems"], found["notes"]) == (True, [], [])
    seen = command("inspect", ours, "--analyses")
    assert seen["method"] == method
    assert seen["bytes"] == sum(path.stat().st_size for path in ours.glob("*.safetensors"))
    assert 0 <= seen["stored_ratio"] - {"moe-svd": 0.2, "mobe": 0.3}[method] < 0.003
    assert seen["analyses"]["layers"].keys() == seen["layers"].keys()
    for arguments in (("inspect", ours), ("plan", TINY, "--method", method, "--ratio", "0.3")):
        assert d2moe_here(*arguments).returncode == 0
    assert {"moe-svd": "MoE-SVD", "mobe": "MoBE"}[method] in (ours / "README.md").read_text()
    recipe = yaml.safe_load((ours / "d2moe_recipe.yaml").read_text())
    assert (recipe["method"], "moe_svd" in recipe, "mobe" in recipe) == (method, method == "moe-svd", method == "mobe")
    command("export", ours, tmp_path / "dense")
    measure = ("--text", short_text, "--seq-len", "64")
    compressed, exported = (command("eval", folder, *measure) for folder in (ours, tmp_path / "dense"))
    assert compressed["negative_log_likelihood"] == pytest.approx(exported["negative_log_likelihood"], rel=2e-3)
    assert compressed["perplexity"] < 1000


@pytest.mark.parametrize("method", ["moe-svd", "mobe"])
@torch.no_grad()
def test_plain_transformers_loads_it(method: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """By the code that travels in the checkpoint; beside the export, whose experts were rounded once more."""
    ours: Path = request.getfixturevalue(method.removeprefix("moe-"))
    command("export", ours, tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(ours, dtype=torch.float32, trust_remote_code=True).eval()
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32).eval()
    assert type(model).__name__ == "D2MixtralForCausalLM"
    tokens = torch.arange(5, 45)[None]
    first, second = (one(tokens).logits for one in (model, dense))
    assert float((first - second).abs().max()) < 0.1 * float(second.std())


def test_dense_layers_are_the_sources_to_the_bit_and_the_least_sensitive_are_decomposed(svd: Path) -> None:
    config, source, result = read_config(svd), Reader(TINY), Reader(svd)
    selection = json.loads((svd / "d2moe_stats.json").read_text())["selection"]
    dense = [layer for layer in range(4) if layer not in config.layers]
    assert selection["dense"] == dense
    assert len(dense) == 2
    figures = {int(layer): value for layer, value in selection["sensitivity"].items()}
    assert min(figures[layer] for layer in dense) >= max(figures[layer] for layer in config.layers)
    for layer in dense:
        for expert in range(8):
            for name in (f"{P.format(layer)}.{expert}.{projection}.weight" for projection in ("w1", "w2", "w3")):
                assert torch.equal(*(reader.tensor(name).view(torch.uint8) for reader in (source, result)))


def test_what_is_stored_is_one_v_and_the_most_used_us(svd: Path) -> None:
    config, result = read_config(svd), Reader(svd)
    tokens = json.loads((svd / "d2moe_stats.json").read_text())["layers"]
    for layer, content in config.layers.items():
        used = tokens[str(layer)]["tokens"]
        best = sorted(range(8), key=lambda expert: (-used[expert], expert))[:5]
        for role, projection in config.projections.items():
            one = content[role]
            assert (one.shared_v, one.distinct_u, one.has_base, one.delta) == (True, 5, False, "factors")
            index = result.tensor(f"{P.format(layer)}.0.{projection}.u_index").tolist()
            assert [index[expert] for expert in sorted(best)] == list(range(5))
    assert not [name for name in result.specs if name.endswith("delta_v")]


def test_the_share_that_mobe_stores_is_the_formulas(mobe: Path) -> None:
    """gamma = (E I r + m r H + E m) / (E I H), counted from the files (METHODS 3)."""
    config, result = read_config(mobe), Reader(mobe)
    for layer, content in config.layers.items():
        for role in ("gate", "up"):
            names = [name for name in result.specs if name.startswith(f"{P.format(layer)}.")]
            names = [name for name in names if f".{config.projections[role]}." in name]
            stored = sum(result.specs[name].numel for name in names)
            r, m = content[role].rank, content[role].bases
            assert m == 2
            assert stored == 8 * 256 * r + m * r * 128 + 8 * m
    planned = command("plan", TINY, "--ratio", "0.3", "--method", "mobe")
    r = sum(layer.gate.rank for layer in config.layers.values()) / 4
    gamma = (8 * 256 * r + 2 * r * 128 + 8 * 2) / (8 * 256 * 128)
    assert planned["kept_share_of_deltas"]["gate"] == pytest.approx(gamma)
    assert planned["kept_share_of_deltas"]["down"] == 1


def test_mobe_leaves_down_as_it_is_and_ends_below_its_start(mobe: Path) -> None:
    source, result = load_file(TINY / "model.safetensors"), Reader(mobe)
    for layer in range(4):
        for expert in range(8):
            prefix = f"{P.format(layer)}.{expert}.w2"
            assert torch.equal(result.tensor(f"{prefix}.dense"), source[f"{prefix}.weight"])
    for layer in json.loads((mobe / "d2moe_stats.json").read_text())["layers"].values():
        assert layer["relative_error"]["down"] == [0.0] * 8
        for role in ("gate", "up"):
            fit = layer["fit"][role]
            assert fit["error"] < fit["start_error"]
            assert (fit["steps"], fit["ended"]) == (30, "max_steps")
            mean = sum(layer["relative_error"][role]) / 8
            assert mean == pytest.approx(fit["error"], rel=0.1)


def test_without_a_step_mobe_is_the_grouped_decomposition(texts: tuple[Path, Path], tmp_path: Path) -> None:
    """The first expert's group, unweighted: the error is that of torch's SVD of the four stacked matrices."""
    recipe = write_recipe(tmp_path, mobe={"max_steps": 0, "weighting": "none"})
    arguments = ("--ratio", "0.3", "--method", "mobe", "--recipe", recipe, *SMALL, "--calibration", texts[0])
    command("compress", TINY, tmp_path / "out", *arguments)
    source, layers = load_file(TINY / "model.safetensors"), read_config(tmp_path / "out").layers
    stats = json.loads((tmp_path / "out" / "d2moe_stats.json").read_text())["layers"]
    for layer in range(4):
        for role, projection in (("gate", "w1"), ("up", "w3")):
            weights = [source[f"{P.format(layer)}.{e}.{projection}.weight"].double() for e in range(8)]
            left = total = 0.0
            for group in (weights[:4], weights[4:]):
                values = torch.linalg.svdvals(torch.cat(group)).square()
                left, total = left + float(values[layers[layer][role].rank :].sum()), total + float(values.sum())
            fit = stats[str(layer)]["fit"][role]
            assert fit["start_error"] == pytest.approx((left / total) ** 0.5, rel=1e-3)
            assert fit["error"] == fit["start_error"]


def test_a_fit_that_diverges_keeps_its_start_and_says_so(texts: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, mobe={"learning_rate": 1e30, "window": 1})
    arguments = ("--ratio", "0.3", "--method", "mobe", "--recipe", recipe, *SMALL, "--calibration", texts[0])
    command("compress", TINY, tmp_path / "out", *arguments)
    for layer in json.loads((tmp_path / "out" / "d2moe_stats.json").read_text())["layers"].values():
        for fit in layer["fit"].values():
            assert (fit["ended"], fit["learning_rate_halved"]) == ("diverged", 6)
            assert fit["error"] == fit["start_error"] < 1
    shown = d2moe_here("inspect", tmp_path / "out").stdout
    assert shown.count("the fit gained nothing over its start (diverged)") == 8


SOURCES = ("joint", "refit", "most_routed")


def test_fitted_us_beat_each_experts_own(texts: tuple[Path, Path], tmp_path: Path) -> None:
    """For one V no U is better than the fitted one, and a V for all experts beats that of one of them."""
    errors = {}
    for share_v in SOURCES:
        recipe = write_recipe(tmp_path, moe_svd={"share_v": share_v})
        arguments = ("--ratio", "0.4", "--method", "moe-svd", "--recipe", recipe, *SMALL, "--calibration", texts[0])
        out = tmp_path / share_v
        command("compress", TINY, out, *arguments)
        layers = json.loads((out / "d2moe_stats.json").read_text())["layers"].values()
        errors[share_v] = [sum(layer["relative_error"][role]) for layer in layers for role in ROLES]
    joint, refit, most_routed = (errors[share_v] for share_v in SOURCES)
    assert all(a < b for a, b in zip(refit, most_routed, strict=True))
    assert sum(joint) < sum(refit)


REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"method": "mobe", "ratio": 0.9}, "even at rank 1 the ratio is 0.47"),
    ({"method": "mobe", "ratio": 0.9}, "MoBE leaves `down` whole"),
    ({"method": "moe-svd", "ratio": 0.9}, "even at rank 1 the ratio is 0.70"),
    ({"method": "mobe", "ratio": 0.3, "mobe": {"bases": 9}}, "mobe.bases 9 exceeds the 8 experts"),
    ({"method": "mobe", "ratio": 0.3, "mobe": {"bases": 0}}, "mobe.bases"),
    ({"method": "mobe", "ratio": 0.3, "mobe": {"bases": 4, "groups": 3}}, "mobe.groups 3 does not divide mobe.bases 4"),
    ({"method": "mobe", "ratio": 0.3, "mobe": {"function": "relu"}}, "mobe.function"),
    ({"method": "mobe", "ratio": 0.3, "mobe": {"learning_rate": 0}}, "mobe.learning_rate"),
    ({"method": "mobe", "ratio": 0.3, "mobe": {"step": 1}}, "unknown key 'mobe.step'; did you mean 'max_steps'"),
    ({"method": "mobe", "ratio": 0.3, "delta": {"share_v": True}}, "method mobe needs delta.share_v False, not True"),
    ({"method": "mobe", "ratio": 0.3, "delta": {"distinct_u": 2}}, "method mobe needs delta.distinct_u 0, not 2"),
    ({"method": "mobe", "ratio": 0.3, "base": {"kind": "static"}}, "method mobe needs base.kind none, not static"),
    ({"method": "mobe", "ratio": 0.3, "allocation": "adaptive"}, "method mobe needs allocation uniform"),
    ({"method": "moe-svd", "ratio": 0.3, "accounting": "paper"}, "method moe-svd needs accounting stored"),
    ({"method": "moe-svd", "ratio": 0.3, "calibration": {"inputs": "compressed"}}, "needs calibration.inputs dense"),
    ({"method": "moe-svd", "ratio": 0.3, "delta": {"method": "svd", "share_v": False}}, "delta.method whitened"),
    ({"method": "moe-svd", "ratio": 0.3, "delta": {"trim": 1}}, "delta.trim needs a base"),
    ({"method": "moe-svd", "ratio": 0.3, "delta": {"distinct_u": 9}}, "distinct_u 9 exceeds the 8 experts"),
    ({"method": "moe-svd", "ratio": 0.3, "moe_svd": {"share_v": "own"}}, "moe_svd.share_v"),
    ({"method": "moe-svd", "ratio": 0.3, "moe_svd": {"layer_ratio": 1}}, "moe_svd.layer_ratio"),
]


@pytest.mark.parametrize(("recipe", "words"), REFUSALS, ids=[str(number) for number in range(len(REFUSALS))])
def test_what_cannot_be_done_is_refused_in_one_line(recipe: dict[str, Any], words: str, tmp_path: Path) -> None:
    done = d2moe_here("plan", TINY, "--recipe", write_recipe(tmp_path, **recipe))
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
    assert words in done.stderr


class Plain(Section):
    """split: of the singular values' logarithm, U's share."""

    split: float = Field(default=0.5, ge=0, le=1)


@dataclass(frozen=True)
class PlainFactors:
    job: LayerJob
    share = 0.0
    kept = ("u", "v")

    def measure(self, advance: Callable[[float], None]) -> None:
        """Ranks are uniform."""

    def write(self, advance: Callable[[float], None]) -> None:
        """Nothing is shared."""

    def factors(self, option: Option, role: Role, expert: int, delta: Tensor, gram: Tensor) -> dict[str, Matrix]:
        rank, split = self.job.cap(role), self.job.plan.recipe.own(Plain).split
        u, values, v = (part.to(delta.dtype) for part in torch.linalg.svd(delta.double(), full_matrices=False))
        u, v = u * values.pow(split), v * values.pow(1 - split)[:, None]
        u, v = self.job.storing.factors(delta, gram, u[:, :rank], v[:rank])
        return {"u": u, "v": v}


class PlainSVD(Method):
    def factors(self, job: LayerJob) -> Factors:
        return PlainFactors(job)

    def report(self, work: Any, layer: int) -> dict[str, Any]:
        return {"note": layer}


def test_a_method_is_an_object_and_a_row(
    texts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that the project does not know: its settings, its factors, its words reach everything."""
    asked = write_recipe(tmp_path, ratio=0.3, method="plain-svd", plain_svd={"split": 1})
    unknown = "method: 'plain-svd' is not one of d2, moe-svd, mobe"
    assert unknown in command_fails("plan", TINY, "--recipe", asked)
    fixed = {**WITHOUT_BASE, "delta.share_v": False, "delta.distinct_u": 0}
    plain = PlainSVD("plain-svd", "Plain SVD", "every expert is cut.", Plain, fixed, hint=", or less")
    monkeypatch.setitem(METHODS, plain.name, plain)
    out = tmp_path / "out"
    command("compress", TINY, out, "--recipe", asked, *SMALL, "--calibration", texts[0])
    found = command("verify", out, "--source", TINY)
    assert (found["sound"], found["problems"], found["notes"]) == (True, [], [])
    config, source, result = read_config(out), load_file(TINY / "model.safetensors"), Reader(out)
    for layer, content in config.layers.items():
        for role, projection in config.projections.items():
            for expert in range(8):
                prefix = f"{P.format(layer)}.{expert}.{projection}"
                u, v = (result.tensor(f"{prefix}.delta_{kind}").double() for kind in "uv")
                values = torch.linalg.svdvals(source[f"{prefix}.weight"].double())
                left = (source[f"{prefix}.weight"].double() - u @ v).norm()
                assert float(left) == pytest.approx(float(values[content[role].rank :].norm()), rel=0.02)
                assert torch.allclose(v.norm(dim=1), torch.ones(len(v)).double(), atol=0.01)  # U carries it all
    stats = json.loads((out / "d2moe_stats.json").read_text())["layers"]
    assert [layer["note"] for layer in stats.values()] == list(range(4))
    card, recipe = (out / "README.md").read_text(), yaml.safe_load((out / "d2moe_recipe.yaml").read_text())
    assert "compressed by Plain SVD" in card
    assert "every expert is cut." in card
    assert (recipe["method"], recipe["plain_svd"], "mobe" in recipe) == ("plain-svd", {"split": 1.0}, False)
    for content, words in (
        ({"plain_svd": {"spilt": 1}}, "unknown key 'plain_svd.spilt'; did you mean 'split'"),
        ({"plain_svd": {"split": 2}}, "plain_svd.split: Input should be less than or equal to 1"),
        ({"base": {"kind": "auto"}}, "method plain-svd needs base.kind none, not auto"),
        ({"ratio": 0.99}, "choose a lower ratio, or less"),
    ):
        again = write_recipe(tmp_path, **{"ratio": 0.3, "method": "plain-svd", **content})
        assert words in command_fails("plan", TINY, "--recipe", again)
    monkeypatch.delitem(METHODS, plain.name)
    problems = json.loads(d2moe_here("verify", out, "--json").stdout)["problems"]
    newer = "method 'plain-svd' is not one of d2, moe-svd, mobe; install a newer d2moe-vllm"
    assert problems == [f"recipe {out / 'd2moe_recipe.yaml'}: {unknown}", newer]
    assert newer in command_fails("export", out, tmp_path / "dense")
    assert newer in command_fails("report", out, tmp_path / "page.html")
    assert not (tmp_path / "dense").exists()


ASKED = {"moe-svd": {"moe_svd": {"layer_ratio": 0.6}}, "mobe": {"mobe": FEW_STEPS}}
POINTS = [
    ("moe-svd", "out.d2moe-work/layers/00001/judged-done.safetensors"),
    ("moe-svd", "out.d2moe-work/layers/*/00003.safetensors"),
    ("mobe", "out.d2moe-work/layers/00001/fit-gate.safetensors"),
    ("mobe", "out.d2moe-work/layers/00002/00003.safetensors"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "point"), POINTS)
def test_a_killed_run_ends_in_the_same_bytes(method: str, point: str, texts: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, ratio=0.2, method=method, **ASKED[method])
    arguments = ["--recipe", str(recipe), *WINDOWS, "--calibration", str(texts[0])]
    program = [sys.executable, "-m", "offline.cli", "compress", str(TINY), str(tmp_path / "out"), *arguments]
    process = subprocess.Popen(program, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not list(tmp_path.glob(point)):
        assert process.poll() is None, f"the run ended before {point} appeared"
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for out in ("out", "whole"):
        done = subprocess.run(
            [*program[:5], str(tmp_path / out), *program[6:]], cwd=ROOT, check=False, capture_output=True
        )
        assert done.returncode == 0, done.stderr
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


Source = Callable[[str], Path]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tmp_path_factory.mktemp("families")
    return lambda family: folder / family if (folder / family).exists() else write_family(folder / family, family)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["moe-svd", "mobe"])
@pytest.mark.parametrize("family", CONFIGS)
def test_every_family(
    family: str, method: str, source: Source, texts: tuple[Path, Path], short_text: Path, tmp_path: Path
) -> None:
    """One layer dense where there are several; random experts share nothing, but a fit never ends above its start."""
    original, ours = source(family), tmp_path / "ours"
    recipe = write_recipe(tmp_path, ratio=0.05, method=method, moe_svd={"layer_ratio": 0.7}, mobe=FEW_STEPS)
    if method == "mobe" and "gate" not in FAMILIES[family].projections:
        done = d2moe_here("plan", original, "--recipe", recipe, *SMALL)
        words = (
            f"d2moe: method mobe mixes gate and up from bases, and the experts of {family} have no gate; use another"
        )
        assert (done.returncode, done.stderr.startswith(words)) == (2, True), done.stderr
        return
    command("compress", original, ours, "--recipe", recipe, *SMALL, "--calibration", texts[0])
    found = command("verify", ours, "--source", original)
    assert (found["sound"], found["problems"], found["notes"]) == (True, [], [])
    assert command("inspect", ours)["stored_ratio"] >= 0.05
    stats = json.loads((ours / "d2moe_stats.json").read_text())
    for layer in stats["layers"].values():
        assert all(fit["error"] <= fit["start_error"] for fit in layer.get("fit", {}).values())
    assert ("selection" in stats) == (method == "moe-svd")
    command("export", ours, tmp_path / "dense")
    measure = ("--text", short_text, "--seq-len", "32")
    compressed, exported = (command("eval", folder, *measure) for folder in (ours, tmp_path / "dense"))
    assert compressed["negative_log_likelihood"] == pytest.approx(exported["negative_log_likelihood"], rel=2e-3)
