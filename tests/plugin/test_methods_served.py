"""MoE-SVD, MoBE, and few bits of unequal widths in every family, served by vLLM as what they stand for: stock vLLM on
the dense export says the same."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from compression import d2moe_here
from engine import TWO_RANKS, Results, assert_same, generate
from families import write_family
from small_families import SMALL
from test_families_served import PROMPTS, settings
from transformers import AutoModelForCausalLM

from d2moe_vllm.format.files import read_config
from d2moe_vllm.format.kinds import ROLES
from offline.source.dense import open_dense

pytest.importorskip("vllm")

RECIPES: dict[str, dict[str, Any]] = {
    # One dense layer at least, and fewer U's than experts.
    "moe-svd": {"ratio": 0.08, "method": "moe-svd", "delta": {"distinct_u": 3}, "moe_svd": {"layer_ratio": 0.7}},
    "mobe": {"ratio": 0.08, "method": "mobe", "mobe": {"max_steps": 5}},
    # Less than 4 bits for all channels.
    "few-bits": {"bits": 4, "group_size": 32},
    "moe-svd-everywhere": {"ratio": 0.08, "method": "moe-svd", "moe_svd": {"layer_ratio": 0.2}},
}
METHODS = ("moe-svd", "mobe")
SERVED = tuple(name for name, small in SMALL.items() if not small.refused_here and not small.ours_alone)
ALONE = tuple(name for name, small in SMALL.items() if small.ours_alone)
CASES = [pytest.param(family, method, id=f"{family}-{method}") for family in SERVED for method in METHODS]
TWO_RANK_CASES = list(zip(SERVED, itertools.cycle(METHODS), strict=False))
"""Every family with one of the methods: how ranks divide a method's tensors is not the families' affair."""
FAST = [
    *(pytest.param("mixtral", method) for method in METHODS),
    # Where stock vLLM is none to compare with. Layers that stay dense nobody has a kernel for there.
    *(
        pytest.param(name, method, marks=pytest.mark.slow)
        for name in ALONE
        for method in ("few-bits", "moe-svd-everywhere")
    ),
]
MAX_TOKENS = 16

Made = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, texts: tuple[Path, Path]) -> Made:
    """Folder with a family's checkpoint `ours` by a method and its dense export, both float32, made once."""
    root = tmp_path_factory.mktemp("methods")

    def make(family: str, method: str) -> Path:
        folder = root / f"{family}-{method}"
        if not folder.exists():
            source = write_family(folder / "source", family, dtype=torch.float32, **SMALL[family].served)
            model = open_dense(str(source))
            ratio = 0.95 * model.expert_bytes / model.reader.nbytes
            (folder / "recipe.yaml").write_text(yaml.safe_dump({"ratio": ratio, **RECIPES[method]}))
            given = ("--recipe", folder / "recipe.yaml", "--windows", "4", "--seq-len", "32")
            for arguments in (
                ("compress", source, folder / "ours", *given, "--calibration", texts[0]),
                ("export", folder / "ours", folder / "dense"),
            ):
                done = d2moe_here(*arguments)
                assert done.returncode == 0, done.stderr
        return folder

    return make


def run(folder: Path, model: Path, env: dict[str, str], family: str, **llm: Any) -> Results:
    job = {"prompts": PROMPTS[:4], "max_tokens": MAX_TOKENS}
    return generate(folder, model, env, job=job, **settings(family), **llm)


@pytest.fixture(scope="module")
def dense(made: Made) -> Callable[[str, str], Results]:
    """What stock vLLM says of the export, asked once."""
    known: dict[Path, Results] = {}

    def ask(family: str, method: str) -> Results:
        folder = made(family, method)
        if folder not in known:
            env = {} if family == "deepseek" else {"VLLM_PLUGINS": ""}
            known[folder] = run(folder / "stock", folder / "dense", env, family)
        return known[folder]

    return ask


@pytest.mark.parametrize(("family", "method"), FAST)
def test_served_as_transformers_computes_the_export(family: str, method: str, made: Made) -> None:
    """Every token is transformers' choice, too, and as likely; the CPU's own backend serves, as nothing is said."""
    folder = made(family, method)
    found = run(folder / "served", folder / "ours", {}, family)
    model = AutoModelForCausalLM.from_pretrained(folder / "dense", dtype=torch.float32).eval()
    for result in found:
        tokens = torch.tensor([result["prompt_ids"] + result["ids"]])
        with torch.no_grad():
            logprobs = model(tokens).logits[0, :-1].log_softmax(-1)
        likely = logprobs.gather(1, tokens[0, 1:, None])[:, 0]
        torch.testing.assert_close(
            torch.tensor(result["prompt_logprobs"] + result["logprobs"]), likely, rtol=0, atol=1e-3
        )
        assert logprobs.argmax(dim=-1)[-len(result["ids"]) :].tolist() == result["ids"]
    log = (folder / "served" / "log").read_text()
    assert "cannot be used" not in log
    assert "backend 'reference'" not in log


@pytest.mark.slow
@pytest.mark.parametrize(("family", "method"), CASES)
def test_served_as_the_dense_export(family: str, method: str, made: Made, dense: Callable[[str, str], Results]) -> None:
    folder = made(family, method)
    assert_same(run(folder / "tp1", folder / "ours", {}, family), dense(family, method))


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[] if name == "gpt_oss" else [pytest.mark.slow]) for name in SERVED]
)
def test_few_bits_and_unequal_widths_in_every_family(
    family: str, made: Made, dense: Callable[[str, str], Results]
) -> None:
    folder = made(family, "few-bits")
    layers = read_config(folder / "ours").layers.values()
    assert all(layer[role].delta_storage.type == "int4" for layer in layers for role in ROLES)
    assert any(layer.channels and len(set(map(sum, layer.channels.experts))) > 1 for layer in layers)
    assert_same(run(folder / "tp1", folder / "ours", {}, family), dense(family, "few-bits"))
    assert "the slow backend" not in (folder / "tp1" / "log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("family", "method"), TWO_RANK_CASES)
def test_on_two_tensor_parallel_ranks(
    family: str, method: str, made: Made, dense: Callable[[str, str], Results]
) -> None:
    folder = made(family, method)
    found = run(folder / "tp2", folder / "ours", TWO_RANKS, family, tensor_parallel_size=2)
    assert_same(found, dense(family, method))


EXPERT_PARALLEL = {"tensor_parallel_size": 2, "enable_expert_parallel": True}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["moe-svd-everywhere", "mobe"])
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_on_two_expert_parallel_ranks(
    family: str, method: str, made: Made, dense: Callable[[str, str], Results]
) -> None:
    folder = made(family, method)
    assert_same(run(folder / "ep2", folder / "ours", TWO_RANKS, family, **EXPERT_PARALLEL), dense(family, method))


@pytest.mark.slow
def test_layers_that_stay_dense_refuse_expert_parallelism_on_cpus(made: Made) -> None:
    """vLLM's own kernel for dense experts knows no expert map there: a stock worker ends by SIGSEGV."""
    folder = made("qwen3_moe", "moe-svd")
    with pytest.raises(AssertionError, match="was left dense, and vLLM's CPU backend does not serve dense experts"):
        run(folder / "refused", folder / "ours", TWO_RANKS, "qwen3_moe", **EXPERT_PARALLEL)
