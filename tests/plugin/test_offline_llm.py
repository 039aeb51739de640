"""Checkpoints served by the real engine, against stock vLLM on the dense reconstruction and plain transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine import MAX_TOKENS, PROMPTS, TWO_RANKS, Results, assert_same, generate, run_engine
from synthetic import Synthetic, write_checkpoint, write_dense

from d2moe_vllm.hf.modeling_d2moe import D2MixtralForCausalLM

pytest.importorskip("vllm")


@torch.no_grad()
def by_transformers(model: Path, scope: str, prompts: Results) -> Results:
    """The same prompts one by one, the prompt in one forward pass and then token by token."""
    network = D2MixtralForCausalLM.from_pretrained(model, d2moe_scope=scope, dtype=torch.float32)
    results = []
    for prompt in prompts:
        ids = torch.tensor([prompt["prompt_ids"]])
        step = network(ids, use_cache=True)
        scores = step.logits[0].log_softmax(-1)
        result = {"ids": [], "logprobs": [], "prompt_logprobs": scores[:-1].gather(1, ids[0, 1:, None])[:, 0].tolist()}
        for _ in range(MAX_TOKENS):
            logprobs = step.logits[0, -1].log_softmax(-1)
            token = logprobs.argmax()
            result["ids"].append(int(token))
            result["logprobs"].append(float(logprobs[token]))
            step = network(token.view(1, 1), past_key_values=step.past_key_values, use_cache=True)
        results.append(result)
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engine")


@pytest.fixture(scope="module")
def dense(folder: Path, checkpoint: Path) -> Results:
    """Stock vLLM, which has none of our code in its way, on the dense reconstruction."""
    write_dense(checkpoint, folder / "dense", torch.float32)
    return generate(folder / "stock", folder / "dense", {"VLLM_PLUGINS": ""}, dtype="float32", enforce_eager=True)


def test_compiled_equals_stock_vllm_and_transformers(folder: Path, checkpoint: Path, dense: Results) -> None:
    ours = generate(folder / "compiled", checkpoint, dtype="float32")
    assert_same(ours, dense)
    assert_same(ours, by_transformers(checkpoint, "off", ours))


def test_eager_scope_batch_equals_transformers(folder: Path, checkpoint: Path) -> None:
    additional = {"d2moe": {"scope": "batch"}}
    ours = generate(
        folder / "batch", checkpoint, one_by_one=True, dtype="float32", enforce_eager=True, additional_config=additional
    )
    assert_same(ours, by_transformers(checkpoint, "batch", ours))


@pytest.fixture(scope="module")
def dense_variants(folder: Path, variants: Path) -> Results:
    write_dense(variants, folder / "dense-variants", torch.float32)
    stock = {"VLLM_PLUGINS": ""}
    return generate(folder / "stock-variants", folder / "dense-variants", stock, dtype="float32", enforce_eager=True)


def test_every_variant_equals_stock_vllm(folder: Path, variants: Path, dense_variants: Results) -> None:
    """Low-rank bases, column deltas, shared V's and U's, trimmed experts: each in a layer of one model. Traced as for
    compiling, so that a graph break ends it, but run as traced: vLLM's own tests on CPUs do so, too."""
    assert_same(generate(folder / "variants", variants, {"VLLM_CPU_CI_ENV": "1"}, dtype="float32"), dense_variants)


@pytest.mark.parametrize("experts", [False, True], ids=["tensor parallel", "expert parallel"])
def test_every_variant_on_two_ranks(folder: Path, variants: Path, dense_variants: Results, experts: bool) -> None:
    parallel = {"tensor_parallel_size": 2, "enable_expert_parallel": experts}
    llm = {"dtype": "float32", "enforce_eager": not experts, **parallel}
    assert_same(generate(folder / f"variants-{experts}", variants, TWO_RANKS, **llm), dense_variants)


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["off", "token", "batch"])
def test_tensor_parallel(folder: Path, checkpoint: Path, dense: Results, scope: str) -> None:
    ours = generate(
        folder / f"tp2-{scope}",
        checkpoint,
        TWO_RANKS,
        one_by_one=True,
        dtype="float32",
        tensor_parallel_size=2,
        enforce_eager=scope != "off",
        additional_config={"d2moe": {"scope": scope}},
    )
    assert_same(ours, dense if scope == "off" else by_transformers(checkpoint, scope, ours))


@pytest.mark.slow
@pytest.mark.parametrize("eager", [True, False])
def test_expert_parallel(folder: Path, checkpoint: Path, dense: Results, eager: bool) -> None:
    parallel = {"tensor_parallel_size": 2, "enable_expert_parallel": True}
    ours = generate(folder / f"ep2-{eager}", checkpoint, TWO_RANKS, dtype="float32", enforce_eager=eager, **parallel)
    assert_same(ours, dense)


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["token", "batch"])
def test_expert_parallel_selects_for_gate_and_up_only(folder: Path, checkpoint: Path, scope: str) -> None:
    """Equal to a checkpoint that uses all of down's columns, served without expert parallelism."""
    what = Synthetic(dtype=torch.float32)
    what.used["down"] = what.kept["down"]
    model = folder / f"all-of-down-{scope}"
    write_checkpoint(model, what)
    settings = {"dtype": "float32", "enforce_eager": True, "additional_config": {"d2moe": {"scope": scope}}}
    parallel = {"tensor_parallel_size": 2, "enable_expert_parallel": True}
    # In scope batch the requests of one forward pass would share their selection.
    ours = generate(folder / f"ep2-{scope}", checkpoint, TWO_RANKS, one_by_one=scope == "batch", **settings, **parallel)
    assert_same(ours, by_transformers(model, scope, ours))


@pytest.mark.slow
def test_layers_that_stay_dense_and_projections_without_base_or_deltas(folder: Path) -> None:
    none = {"gate": 0, "up": 0, "down": 192}
    what = Synthetic(dtype=torch.float32, dense=(1,), kept=none, used=none, rank={"gate": 24, "up": 16, "down": 0})
    write_checkpoint(folder / "mixed", what)
    write_dense(folder / "mixed", folder / "mixed-dense", torch.float32)
    settings = {"dtype": "float32", "enforce_eager": True}
    ours = generate(folder / "mixed-ours", folder / "mixed", **settings)
    assert_same(ours, generate(folder / "mixed-stock", folder / "mixed-dense", {"VLLM_PLUGINS": ""}, **settings))


@pytest.mark.slow
@pytest.mark.parametrize(("half", "eager"), [("bfloat16", False), ("float16", True)])
def test_half_precision_deviates_from_float32_no_more_than_stock_vllm(folder: Path, half: str, eager: bool) -> None:
    run = folder / half
    write_checkpoint(run / "checkpoint", Synthetic())
    write_dense(run / "checkpoint", run / "dense", torch.float32)
    deviation = {}
    for name, model in (("ours", run / "checkpoint"), ("stock", run / "dense")):
        scores = [
            torch.tensor([probability for answer in answers for probability in answer["prompt_logprobs"]])
            for dtype in ("float32", half)
            for answers in [generate(run / f"{name}-{dtype}", model, dtype=dtype, enforce_eager=eager)]
        ]
        deviation[name] = float((scores[1] - scores[0]).square().mean().sqrt())
    print(deviation)
    assert deviation["ours"] <= 2 * deviation["stock"]


@pytest.mark.slow
def test_dummy_weights_need_no_files(folder: Path, checkpoint: Path) -> None:
    model = folder / "dummy-model"
    model.mkdir()
    for file in checkpoint.iterdir():
        if file.suffix != ".safetensors":
            (model / file.name).write_bytes(file.read_bytes())
    generate(folder / "dummy", model, load_format="dummy", enforce_eager=True)


@pytest.mark.slow
def test_a_tensor_that_never_arrives_is_refused_by_name(folder: Path, checkpoint: Path) -> None:
    """Past the check of the files: a loader that loses a tensor on its way."""
    run = folder / "lost"
    run.mkdir()
    (run / "sitecustomize.py").write_text(
        "from d2moe_vllm.serving.loading import LayerLoader\n"
        "load = LayerLoader.load\n"
        "def lossy(self, param, tensor, kind, role, expert):\n"
        "    lost = (self.layer, kind, role, expert) == (2, 'delta_u', 'down', 5)\n"
        "    return False if lost else load(self, param, tensor, kind, role, expert)\n"
        "LayerLoader.load = lossy\n"
    )
    code, log, _ = run_engine(run, checkpoint, {"PYTHONPATH": str(run)}, llm={"enforce_eager": True})
    assert code != 0
    assert "1 tensors were not loaded: model.layers.2.block_sparse_moe.experts.5.w2.delta_u" in log


def alone_and_in_a_crowd(folder: Path, model: Path, env: dict[str, str], **llm: Any) -> tuple[Results, Results]:
    """The first of 32 prompts by itself, and as the engine answers it in one batch with all others."""
    crowd = [PROMPTS[0], *(f"{word} {number} " * (1 + number % 7) for number, word in enumerate(PROMPTS * 8))][:32]
    results = [
        generate(folder / name, model, env, job={"prompts": prompts}, max_num_seqs=32, **llm)
        for name, prompts in (("alone", crowd[:1]), ("crowd", crowd))
    ]
    return results[0][:1], results[1][:1]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scope_token_alone_and_among_31_others(folder: Path, checkpoint: Path, dtype: str) -> None:
    """The same bits wherever the rest of the model gives the same bits, which stock vLLM is asked about."""
    run = folder / f"crowd-{dtype}"
    run.mkdir()
    write_dense(checkpoint, run / "dense", torch.float32)
    (run / "stock").mkdir()
    (run / "ours").mkdir()
    settings = {"dtype": dtype, "enforce_eager": True}
    stock = alone_and_in_a_crowd(run / "stock", run / "dense", {"VLLM_PLUGINS": ""}, **settings)
    ours = alone_and_in_a_crowd(
        run / "ours", checkpoint, {}, additional_config={"d2moe": {"scope": "token"}}, **settings
    )
    print(f"same bits alone and in a crowd: stock vLLM {stock[0] == stock[1]}, ours {ours[0] == ours[1]}")
    if stock[0] != stock[1]:
        pytest.skip("stock vLLM's own layers do not give the same bits here")
    assert ours[0] == ours[1]
