"""Every family compressed for real and served by vLLM's own model class, against stock vLLM on the dense export."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from compression import d2moe_here
from engine import TWO_RANKS, Results, assert_same, generate, run_engine
from families import CONFIGS, load_stock, write_exact, write_family
from PIL import Image
from safetensors.torch import load_file, save_file
from small_families import SMALL
from transformers import AutoTokenizer

import d2moe_vllm.hf  # noqa: F401 - DeepSeek v1 and Kimi-K2
from offline.source.dense import open_dense
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
SERVED = tuple(name for name, small in SMALL.items() if not small.refused_here and not small.ours_alone)
ALONE = tuple(name for name, small in SMALL.items() if small.ours_alone)
EXPERT_PARALLEL = tuple(
    pytest.param(name, marks=[pytest.mark.slow] if SMALL[name].expert_parallel else [pytest.mark.families])
    for name in SERVED
)
"""Those that have something of their own there; the others for `make families` alone."""
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
def checkpoints(tmp_path_factory: pytest.TempPathFactory, texts: tuple[Path, Path]) -> Callable[..., Path]:
    """Folder with a family's checkpoint `ours` and its dense reconstruction `dense`, both float32, made once; of
    another config where changes to it are given."""
    root = tmp_path_factory.mktemp("served")
    (root / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))

    def make(family: str, **changes: Any) -> Path:
        folder = root / "-".join([family, *map(str, changes.values())])
        if not folder.exists():
            source = write_family(folder / "source", family, dtype=torch.float32, **SMALL[family].served, **changes)
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
    return generate(folder, model, env, job=job, **{**settings(family), **llm})


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


@pytest.mark.parametrize("family", EXPERT_PARALLEL)
def test_on_two_expert_parallel_ranks(
    family: str, checkpoints: Callable[[str], Path], dense: Callable[[str], Results]
) -> None:
    folder = checkpoints(family)
    parallel = {"tensor_parallel_size": 2, "enable_expert_parallel": True}
    assert_same(run(folder / "ep2", folder / "ours", TWO_RANKS, family, **parallel), dense(family))


RANKS: dict[str, dict[str, Any]] = {
    "one rank": {},
    "two tensor-parallel ranks": {"tensor_parallel_size": 2},
    "two expert-parallel ranks": {"tensor_parallel_size": 2, "enable_expert_parallel": True},
}
PROJECTED = {"moe_latent_size": 48}
"""Of Nemotron-H: what experts see is a projection of hidden states."""


@pytest.mark.parametrize(
    ("family", "changes", "ranks"),
    [
        pytest.param(
            family,
            changes,
            ranks,
            id=f"{family}-{'projected' if changes else 'plain'}-{ranks}",
            marks=[] if changes and ranks == "one rank" else [pytest.mark.slow],
        )
        for family in ALONE
        for changes in ({}, PROJECTED)
        for ranks in RANKS
    ],
)
def test_served_as_transformers_computes_where_stock_vllm_serves_nothing(
    family: str, changes: dict[str, Any], ranks: str, checkpoints: Callable[..., Path]
) -> None:
    """Every token is transformers' choice on the dense export, and as likely."""
    folder = checkpoints(family, **changes)
    env = TWO_RANKS if RANKS[ranks] else {}
    found = run(folder / ranks.replace(" ", "-"), folder / "ours", env, family, **RANKS[ranks])
    model = load_stock(folder / "dense", dtype=torch.float32).eval()
    for result in found:
        tokens = torch.tensor([result["prompt_ids"] + result["ids"]])
        with torch.no_grad():
            logprobs = model(tokens).logits[0, :-1].log_softmax(-1)
        likely = logprobs.gather(1, tokens[0, 1:, None])[:, 0]
        expected = torch.tensor(result["prompt_logprobs"] + result["logprobs"])
        torch.testing.assert_close(likely, expected, rtol=0, atol=1e-4)
        assert logprobs.argmax(dim=-1)[-len(result["ids"]) :].tolist() == result["ids"]
    log = (folder / ranks.replace(" ", "-") / "log").read_text()
    assert "the slow backend" not in log


@pytest.mark.slow
@pytest.mark.parametrize("family", ALONE)
def test_what_stock_vllm_has_no_kernel_for_on_cpus_stays_refused(family: str, tmp_path: Path) -> None:
    """The dense model, with the plugin and without, and a checkpoint with a layer that stays dense."""
    source = write_family(tmp_path / "source", family)
    dense = open_dense(str(source)).shape.layers[-1:]
    ours = write_exact(tmp_path / "ours", source, dense)
    stock = str(SMALL[family].ours_alone)
    left = f"layer {dense[0]} was left dense, and vLLM's CPU backend has no kernel for experts without a gate"
    for model, env, words in ((source, {"VLLM_PLUGINS": ""}, stock), (source, {}, stock), (ours, {}, left)):
        code, log, _ = run_engine(tmp_path, model, env, llm={"enforce_eager": True})
        assert code != 0
        assert words in log


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in SERVED if "linear_key_head_dim" in CONFIGS[name]])
def test_linear_attention_in_bfloat16(family: str, tmp_path: Path) -> None:
    """All that vLLM's CPU backend has of it, with heads of 128. The last digits differ, by them an expert now and then,
    and so what a random model goes on to say: the prompts' log-probabilities are compared on the whole, of a compressed
    form that loses nothing, and of one whose layers of linear attention have each other's experts."""
    source = write_family(tmp_path / "source", family, linear_key_head_dim=128, linear_value_head_dim=128)
    ours = write_exact(tmp_path / "ours", source)
    stock = run(tmp_path / "stock", source, {"VLLM_PLUGINS": ""}, family, dtype="bfloat16")
    found = run(tmp_path / "found", ours, {}, family, dtype="bfloat16")
    path = ours / "model-00001-of-00001.safetensors"
    tensors, last = load_file(path), CONFIGS[family]["layer_types"].index("linear_attention", 1)
    first = next(layer for layer in open_dense(str(source)).shape.layers if layer != last)
    here, there = (f"{FAMILIES[family].experts_prefix(layer)}." for layer in (first, last))
    other = {name: name.replace(here, there) if here in name else name.replace(there, here) for name in tensors}
    save_file({other[name]: tensor for name, tensor in tensors.items()}, path, {"format": "pt"})
    wrong = run(tmp_path / "wrong", ours, {}, family, dtype="bfloat16")

    def differ(results: Results) -> float:
        """On average, in the prompts' tokens."""
        pairs = zip(stock, results, strict=True)
        told = [torch.tensor(a["prompt_logprobs"]) - torch.tensor(b["prompt_logprobs"]) for a, b in pairs]
        return float(torch.cat(told).abs().mean())

    assert differ(found) < 0.1
    assert differ(wrong) > 0.5


PROCESSOR = {
    "patch_size": 4, "temporal_patch_size": 2, "merge_size": 2, "size": {"shortest_edge": 64, "longest_edge": 4096},
    "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
}  # fmt: skip
PLACES = {
    "vision_start_token_id": "<|vision_start|>", "image_token_id": "<|image_pad|>",
    "vision_end_token_id": "<|vision_end|>", "video_token_id": "<|video_pad|>",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in SERVED if name in ("qwen3_vl_moe", "qwen3_5_moe")])
def test_an_image_is_seen_as_by_the_dense_model(family: str, tmp_path: Path) -> None:
    """With the vision tower loaded, which is copied as it is; the language model loses nothing."""
    served = {"vocab_size": 4160, **SMALL[family].served}
    source = write_family(tmp_path / "source", family, dtype=torch.float32, **served)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_special_tokens({"additional_special_tokens": list(PLACES.values())})
    tokenizer.save_pretrained(source)
    config = json.loads((source / "config.json").read_text())
    config |= {key: tokenizer.convert_tokens_to_ids(token) for key, token in PLACES.items()}
    (source / "config.json").write_text(json.dumps(config))
    ours = write_exact(tmp_path / "ours", source)
    for folder in (source, ours):
        kinds = {"image_processor_type": "Qwen2VLImageProcessor", "video_processor_type": "Qwen3VLVideoProcessor"}
        (folder / "preprocessor_config.json").write_text(json.dumps({**PROCESSOR, **kinds}))
        (folder / "video_preprocessor_config.json").write_text(json.dumps({**PROCESSOR, **kinds}))
    place = "".join(list(PLACES.values())[:3])
    results = []
    for name, folder, env in (("stock", source, {"VLLM_PLUGINS": ""}), ("found", ours, {})):
        for image, colour in (("red.png", "red"), ("blue.png", "blue")):
            Image.new("RGB", (16, 16), colour).save(tmp_path / image)
            job = {"prompts": [f"{place} {prompt}" for prompt in PROMPTS[:2]], "max_tokens": 16}
            options = {**settings(family), "language_model_only": False}
            options["limit_mm_per_prompt"] = {"image": 1, "video": 0}
            job["image"] = str(tmp_path / image)
            results.append(generate(tmp_path / f"{name}-{colour}", folder, env, job=job, **options))
    red, blue, ours_red, ours_blue = results
    assert_same(ours_red, red)
    assert_same(ours_blue, blue)
    assert [one["ids"] for one in red] != [one["ids"] for one in blue]


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name, small in SMALL.items() if small.refused_here])
def test_refused_where_vllms_cpu_backend_serves_nothing_or_another_model(family: str, tmp_path: Path) -> None:
    folder = write_exact(tmp_path / "ours", write_family(tmp_path / "source", family))
    latent = {"block_size": 16, "enable_chunked_prefill": False} if "kv_lora_rank" in CONFIGS[family] else {}
    code, log, _ = run_engine(tmp_path, folder, {}, llm={"enforce_eager": True, **latent})
    assert code != 0
    assert str(SMALL[family].refused_here) in log
