"""Every family compressed for real and served by vLLM's own model class, against stock vLLM on the dense export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from compression import d2moe_here
from engine import TWO_RANKS, Results, assert_same, generate, run_engine
from families import CONFIGS, load_stock, write_exact, write_family
from small_families import SMALL

import d2moe_vllm.hf  # noqa: F401 - DeepSeek v1 and Kimi-K2
from offline.source.families import FAMILIES

pytest.importorskip("vllm")

PROMPTS = (
    "The assignment statement evaluates the expression list and",
    "A class definition",
    "The import statement combines two operations; it searches for the named module, then",
    "Lists are",
    "Returns the value of the named attribute of the object; the name must be a string",
    "for",
    "An integer literal is a sequence of digits, which may be separated by",
    "The following sections describe the standard types that are built into the interpreter.",
)
MAX_TOKENS = 64
IN_FAST_TIER = ("qwen2_moe",)
SERVED = tuple(name for name, small in SMALL.items() if not small.refused_here)
EXPERT_PARALLEL = tuple(name for name, small in SMALL.items() if small.expert_parallel)
CLOSE = 1e-3
"""Of log-probabilities in two programs."""
RECIPE = {"ratio": 0.08, "allocation": "uniform"}
"""A pruned base and deltas in every MoE layer; the ratio is of the whole model, most of which is vocabulary."""

Served = Callable[..., Results]


def settings(family: str) -> dict[str, Any]:
    """What vLLM's CPU backend needs: its MLA knows one block size, and its kernels misread the strides of some."""
    common: dict[str, Any] = {"dtype": "float32", "enforce_eager": True}
    if SMALL[family].outside:
        common["language_model_only"] = True  # without images it wants no processor of them
    if not SMALL[family].custom_ops:
        common["compilation_config"] = {"custom_ops": ["none"]}
    if FAMILIES[family].attention != "latent":
        return common
    if torch.cpu._is_amx_tile_supported():
        pytest.skip("vLLM's MLA on CPUs with AMX takes no float32, whatever the model")
    return {
        **common,
        "block_size": 16,
        "enable_chunked_prefill": False,
        "compilation_config": {"custom_ops": ["none"]},
    }


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory, texts: tuple[Path, Path]) -> Callable[[str], Path]:
    """Folder with a family's checkpoint `ours` and its dense reconstruction `dense`, both float32, made once."""
    root = tmp_path_factory.mktemp("served")
    (root / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))

    def make(family: str) -> Path:
        folder = root / family
        if not folder.exists():
            source = write_family(folder / "source", family, dtype=torch.float32, **SMALL[family].served)
            given = ("--recipe", root / "recipe.yaml", "--windows", "4", "--seq-len", "32", "--calibration", texts[0])
            for arguments in (
                ("compress", source, folder / "ours", *given),
                ("export", folder / "ours", folder / "dense"),
            ):
                done = d2moe_here(*arguments)
                assert done.returncode == 0, done.stderr
        return folder

    return make


@pytest.fixture(scope="session")
def dense(checkpoints: Callable[[str], Path]) -> Callable[[str], Results]:
    """What stock vLLM says of a family's dense reconstruction, asked once."""
    known: dict[str, Results] = {}

    def ask(family: str) -> Results:
        if family not in known:
            # vLLM serves DeepSeek v1 but cannot read its config.json, which the plugin teaches it.
            env = {} if family == "deepseek" else {"VLLM_PLUGINS": ""}
            folder = checkpoints(family)
            known[family] = run(folder / "stock", folder / "dense", env, family)
        return known[family]

    return ask


def run(folder: Path, model: Path, env: dict[str, str], family: str, **llm: Any) -> Results:
    job = {"prompts": PROMPTS, "max_tokens": MAX_TOKENS}
    return generate(folder, model, env, job=job, **settings(family), **llm)


def cases(names: tuple[str, ...], fast: tuple[str, ...]) -> list[Any]:
    return [pytest.param(name, marks=[] if name in fast else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("family", cases(SERVED, IN_FAST_TIER))
def test_served_as_the_dense_reconstruction(
    family: str, checkpoints: Callable[[str], Path], dense: Callable[[str], Results]
) -> None:
    folder = checkpoints(family)
    assert_same(run(folder / "tp1", folder / "ours", {}, family), dense(family))


@pytest.mark.parametrize("family", cases(SERVED, ()))
def test_stock_vllm_serves_what_transformers_computes(
    family: str, checkpoints: Callable[[str], Path], dense: Callable[[str], Results]
) -> None:
    """What is calibrated by one is served by the other: log-probabilities of prompt and completion."""
    model = load_stock(checkpoints(family) / "dense", dtype=torch.float32).eval()
    for result in dense(family):
        tokens = torch.tensor([result["prompt_ids"] + result["ids"]])
        with torch.no_grad():
            found = model(tokens).logits[0, :-1].log_softmax(-1).gather(-1, tokens[0, 1:, None])[:, 0]
        expected = torch.tensor(result["prompt_logprobs"] + result["logprobs"])
        torch.testing.assert_close(found, expected, rtol=0, atol=CLOSE)


@pytest.mark.parametrize("family", cases(SERVED, IN_FAST_TIER))
def test_on_two_tensor_parallel_ranks(
    family: str, checkpoints: Callable[[str], Path], dense: Callable[[str], Results]
) -> None:
    folder = checkpoints(family)
    assert_same(run(folder / "tp2", folder / "ours", TWO_RANKS, family, tensor_parallel_size=2), dense(family))


@pytest.mark.parametrize("family", cases(EXPERT_PARALLEL, ()))
def test_on_two_expert_parallel_ranks(
    family: str, checkpoints: Callable[[str], Path], dense: Callable[[str], Results]
) -> None:
    folder = checkpoints(family)
    parallel = {"tensor_parallel_size": 2, "enable_expert_parallel": True}
    assert_same(run(folder / "ep2", folder / "ours", TWO_RANKS, family, **parallel), dense(family))


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in SMALL if name not in SERVED])
def test_refused_where_vllms_cpu_backend_serves_nothing_or_another_model(family: str, tmp_path: Path) -> None:
    folder = write_exact(tmp_path / "ours", write_family(tmp_path / "source", family))
    latent = {"block_size": 16, "enable_chunked_prefill": False} if "kv_lora_rank" in CONFIGS[family] else {}
    code, log, _ = run_engine(tmp_path, folder, {}, llm={"enforce_eager": True, **latent})
    assert code != 0
    assert str(SMALL[family].refused_here) in log
