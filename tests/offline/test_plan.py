"""Plans for real shapes, and that memory does not grow with the number of layers."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from compression import TINY, d2moe, d2moe_here
from real_models import deepseek_v3, mixtral_8x7b
from transformers import MixtralConfig, MixtralForCausalLM

from offline.plan.duration import layer_seconds, sweep_seconds
from offline.plan.make import make_plan
from offline.plan.rates import measured
from offline.plan.recipe import Recipe
from offline.source.dense import open_dense


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mixtral_8x7b(tmp_path_factory.mktemp("mixtral") / "mixtral")


def plan(source: Path, *arguments: str, bits: str | None = "16") -> dict[str, Any]:
    """bits: the paper's world by default; what the price chooses has tests of its own."""
    done = d2moe_here("plan", source, *arguments, *(("--bits", bits) if bits else ()), "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("ratio", [0.2, 0.4, 0.6])
def test_mixtral_8x7b(mixtral: Path, ratio: float) -> None:
    started = time.monotonic()
    content = plan(mixtral, "--ratio", str(ratio))
    assert time.monotonic() - started < 30
    assert content["source"]["parameters"] == 46_702_792_704
    assert content["source"]["bytes"] - 2 * 46_702_792_704 < 1_000_000
    assert ratio <= content["result"]["stored_ratio"] < ratio + 0.001
    for role in ("gate", "up", "down"):
        assert content["first_layer"][role]["rank"] % 16 == 0
        assert content["first_layer"][role]["kept_columns"] % 128 == 0
    # One layer's experts are 2.8 GB; the whole model would be 93.
    assert 5e9 < content["peak_memory_bytes"] < 10e9
    assert content["disk_bytes"]["result"] == content["result"]["bytes"]
    # Final tensors included; what is compressed less leaves larger ones.
    assert content["disk_bytes"]["work"] <= 95e9


def test_a_smaller_disk_does_for_mixtral(mixtral: Path) -> None:
    """With fewer hidden states kept; what is written piles up all the same."""
    disk = plan(mixtral, "--ratio", "0.8", bits=None)["disk_bytes"]
    assert disk["result"] < disk["least_work"] < 0.5 * disk["work"] < 48e9


def test_mixtral_8x7b_in_factors_of_four_bits(mixtral: Path, tmp_path: Path) -> None:
    """What rounding takes is float64 moments of down's 14,336 inputs, two at a time."""
    (tmp_path / "recipe.yaml").write_text("delta: {method: whitened}")
    sixteen, four = (
        plan(mixtral, "--ratio", ratio, "--recipe", str(tmp_path / "recipe.yaml"), bits=bits)
        for ratio, bits in (("0.2", "16"), ("0.8", "4"))
    )
    assert 0.8 <= four["result"]["stored_ratio"] < 0.801
    assert "4-bit low-rank" in four["result"]["stores"]
    ranks = [four["first_layer"][role]["rank"] for role in ("gate", "up", "down")]
    assert all(rank % 16 == 0 and rank > 0 for rank in ranks)
    assert sixteen["peak_memory_bytes"] < 10e9
    assert four["peak_memory_bytes"] < 12e9
    assert four["disk_bytes"]["work"] < sixteen["disk_bytes"]["work"]
    assert four["estimated_seconds"] > 0


def test_mixtral_at_40_percent_has_ranks_of_about_1500(mixtral: Path) -> None:
    assert plan(mixtral, "--ratio", "0.4")["first_layer"]["down"]["rank"] == pytest.approx(1500, rel=0.03)


@pytest.mark.parametrize(
    "recipe",
    [
        "{delta: {share_v: true}}",
        "{delta: {distinct_u: 4}}",
        "{delta: {trim: 2}}",
        "{allocation: uniform, delta: {trim: 2}}",
        "{base: {merge: ties}}",
        "{accounting: paper, base: {sparsity: 0.6}}",
        "{calibration: {inputs: compressed}}",
        "{allocation: uniform, calibration: {inputs: compressed}}",
        "{method: moe-svd}",
        "{method: mobe}",
    ],
)
def test_no_recipe_needs_more_disk_than_mixtral(mixtral: Path, tmp_path: Path, recipe: str) -> None:
    (tmp_path / "recipe.yaml").write_text(recipe)
    content = plan(mixtral, "--ratio", "0.4", "--recipe", str(tmp_path / "recipe.yaml"), "--memory", "24GB")
    assert content["disk_bytes"]["work"] <= 95e9


@pytest.mark.parametrize("recipe", ["", "allocation: uniform", "{method: moe-svd}"])
def test_sweeps_take_little_more_than_twice_a_calibrating_pass(mixtral: Path, tmp_path: Path, recipe: str) -> None:
    """What runs over all windows: forwards and, where gradients are needed, back; measuring included."""
    made = make_plan(open_dense(str(mixtral)), Recipe.model_validate({"ratio": 0.4, **(yaml.safe_load(recipe) or {})}))
    costs, work, layers = layer_seconds(made), sweep_seconds(made), made.model.num_layers
    own = layers * ((costs.merge + costs.measure if made.measures else 0) + costs.write)
    own += layers * costs.merge if made.needs_fisher else 0
    # Of MoE-SVD's layers not all are chosen.
    own *= len(made.problem.shape.layers) / layers
    once = layers * (costs.forward + (costs.backward if made.needs_gradient else 0))
    assert (work.total - own) / once <= 2.2


TWO_LAYERS = 2 * 2 * (8 * 3 * 4096 * 14336 + 2 * 4096**2 + 2 * 4096 * 1024)
"""Bytes of two of Mixtral's decoder layers in bfloat16."""


@pytest.mark.parametrize("recipe", ["", "allocation: adaptive", "{allocation: adaptive, base: {kind: auto}}"])
def test_two_layers_of_memory_are_enough_for_mixtral(mixtral: Path, tmp_path: Path, recipe: str) -> None:
    (tmp_path / "recipe.yaml").write_text(recipe)
    arguments = ("--ratio", "0.4", "--recipe", str(tmp_path / "recipe.yaml"), "--memory", str(TWO_LAYERS))
    content = plan(mixtral, *arguments)
    assert content["peak_memory_bytes"] <= TWO_LAYERS
    assert max(content["memory_phases"].values()) == content["peak_memory_bytes"]
    assert plan(mixtral, *arguments[:4])["rows_at_once"] > content["rows_at_once"]  # more memory is made use of


def test_measuring_the_machine_leaves_the_callers_numbers_alone() -> None:
    """Whether or not it was measured before, what is drawn afterwards is the same."""
    measured.cache_clear()
    before = torch.get_rng_state()
    rates = measured()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(rate > 0 for rate in vars(rates).values())


def test_memory_is_shared_by_the_processes_of_a_machine(mixtral: Path) -> None:
    content = plan(mixtral, "--ratio", "0.4", "--memory", "14GB", "--processes", "2")
    assert content["peak_memory_bytes"] <= 7e9


@pytest.mark.parametrize(
    ("memory", "fragment"), [("2GB", "does not suffice"), ("lots", "is no size"), ("0", "is no size")]
)
def test_memory_that_does_not_work_out_is_refused(mixtral: Path, memory: str, fragment: str) -> None:
    done = d2moe_here("plan", mixtral, "--ratio", "0.4", "--memory", memory)
    assert done.returncode == 2
    assert fragment in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("layers", [5, pytest.param(61, marks=pytest.mark.slow)])
def test_deepseek_v3(tmp_path: Path, layers: int) -> None:
    """Its gate and up Gram matrices alone would be 53 GB a layer; its experts are 23 GB a layer in bfloat16."""
    source = deepseek_v3(tmp_path / "v3", layers)
    # So few layers have hardly any experts that could shrink: an fp8 original grows before it shrinks.
    ratio = "0.4" if layers == 61 else "0.2"
    content = plan(source, "--ratio", ratio, "--memory", "46GB", "--windows", "128")
    if layers == 61:
        assert content["source"]["parameters"] == 671_026_419_200
    assert content["source"]["bytes"] < 1.1 * content["source"]["parameters"]
    assert content["result"]["stored_ratio"] >= float(ratio)
    assert content["peak_memory_bytes"] < 46e9
    if layers == 61:
        assert content["disk_bytes"]["work"] < 0.7 * content["source"]["bytes"]
        # As many windows as are enough want more of it, and no more than the source has.
        enough = plan(source, "--ratio", ratio, "--memory", "46GB")
        assert enough["calibration"]["windows"] == 448
        assert enough["calibration"]["rows_for_each_input"] >= 4 > content["calibration"]["rows_for_each_input"]
        assert content["disk_bytes"]["work"] < enough["disk_bytes"]["work"] <= content["source"]["bytes"]
    # Its attention is not fused on a CPU: one window's scores of 128 heads are 2 GB, several times over.
    assert plan(source, "--ratio", ratio, "--memory", "26GB")["peak_memory_bytes"] < 26e9
    assert max(content["memory_phases"][phase] for phase in ("merge", "measure", "write")) < 3e9
    # By the paper's nominal accounting, which counts parameters, it would grow: bfloat16 is twice as wide.
    paper = ("plan", source, "--ratio", "0.2", "--accounting", "paper", "--json")
    refusal = d2moe_here(*paper)
    assert refusal.returncode == 2
    assert "--allow-larger" in refusal.stderr
    grown = json.loads(d2moe_here(*paper, "--allow-larger").stdout)
    assert grown["result"]["bytes"] > grown["source"]["bytes"]
    assert content["first_layer"]["gate"]["rank"] % 16 == 0


def test_paper_accounting(mixtral: Path) -> None:
    content = plan(mixtral, "--ratio", "0.6", "--accounting", "paper")
    assert 100 * content["kept_share_of_deltas"]["gate"] == pytest.approx(26.61, abs=0.6)  # ranks are multiples of 16
    # Dynamic pruning earns no storage credit, so a little less is really gone.
    assert 0.59 < content["result"]["stored_ratio"] < 0.6


def test_paper_accounting_without_a_base_charges_none(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("base: {kind: none}\n")
    content = plan(TINY, "--ratio", "0.4", "--accounting", "paper", "--recipe", str(recipe), "--seq-len", "64")
    assert content["result"]["parameters"] / content["source"]["parameters"] == pytest.approx(0.6, abs=0.01)
    assert content["first_layer"]["gate"]["kept_columns"] == 0


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_layers(tmp_path: Path, texts: tuple[Path, Path]) -> None:
    """24 bfloat16 layers against 4: the peaks differ by less than two layers in float32, each 25 MB, not by twenty."""
    peaks = {}
    for layers in (4, 24):
        torch.manual_seed(0)
        config = MixtralConfig(
            vocab_size=4096, hidden_size=256, intermediate_size=1024, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=8, max_position_embeddings=512, dtype=torch.bfloat16,
        )  # fmt: skip
        folder = tmp_path / f"layers-{layers}"
        MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).write_bytes((TINY / name).read_bytes())
        arguments = ["--calibration", texts[0], "--ratio", "0.4", "--windows", "8", "--seq-len", "128", "--json"]
        done = d2moe("compress", folder, tmp_path / f"out-{layers}", *arguments)
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout)
        peaks[layers] = result["peak_memory_bytes"]
        assert result["peak_memory_bytes"] < 1.2 * result["predicted"]["peak_memory_bytes"]
    assert peaks[24] - peaks[4] < 2 * 8 * 3 * 256 * 1024 * 4


def test_few_distinct_us_do_not_make_moe_svd_remove_more_than_asked(tmp_path: Path) -> None:
    """Three U's at full rank leave much of a layer's budget over: then three of four layers are enough."""
    (tmp_path / "recipe.yaml").write_text("{method: moe-svd, ratio: 0.3, delta: {distinct_u: 3}}")
    done = d2moe_here("plan", TINY, "--recipe", tmp_path / "recipe.yaml", "--json")
    kept = json.loads(done.stdout)["disk_bytes"]["result"] / sum(
        file.stat().st_size for file in TINY.glob("*.safetensors")
    )
    assert 0.68 < kept <= 0.7


def test_what_the_documents_say_of_mixtral_in_24_and_48_gb(mixtral: Path) -> None:
    """docs/performance.md's table has a column for each."""
    told = (Path(__file__).parents[2] / "docs" / "performance.md").read_text(encoding="utf-8")
    told = told.partition("## Mixtral in 24 and in 48 GB")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in told.splitlines() if line.startswith("|")]
    columns = {row[0].strip("*"): row[1:3] for row in rows}
    for place, device in enumerate(("24GB", "48GB")):
        fit = plan(mixtral, "--fit", device, bits="auto")["fit"]
        for line in fit["lines"]:
            assert columns[line["what"]][place] == f"{line['bytes']:,}"
        assert columns["ratio"][place] == f"{fit['ratio']:g}"
