"""`lm-eval --model hf` on a compressed checkpoint."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")

import harness
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import d2moe_vllm.hf  # noqa: F401 - registers


@torch.no_grad()
def loglikelihoods(checkpoint: Path, paragraphs: list[str]) -> list[float]:
    """What plain transformers says of each paragraph, natural logarithm, after the tokenizer's first token."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    found = []
    for paragraph in paragraphs:
        tokens = torch.tensor([[first, *tokenizer(paragraph, add_special_tokens=False).input_ids]])
        assert tokens.shape[1] < harness.MAX_LENGTH
        scores = model(tokens[:, :-1]).logits[0].log_softmax(-1)
        found.append(float(scores.gather(1, tokens[0, 1:, None]).sum()))
    return found


@pytest.mark.parametrize(
    "options", [{}, pytest.param({"trust_remote_code": True}, marks=pytest.mark.slow)], ids=["quantizer", "both"]
)
def test_lm_eval_gives_the_figures_of_plain_transformers(
    compressed: Path, texts: tuple[Path, Path], tmp_path: Path, options: dict[str, bool]
) -> None:
    paragraphs = harness.write_documents(tmp_path, texts[1])
    done = harness.lm_eval(
        tmp_path, "hf", command=harness.REGISTERED, pretrained=compressed, dtype="float32", **options
    )
    assert done.returncode == 0, done.stderr
    results = harness.read(tmp_path)
    expected = loglikelihoods(compressed, paragraphs)
    found = [value for (value,) in results.loglikelihoods["d2moe_text"]]
    assert found == pytest.approx(expected, rel=1e-5)
    words = sum(len(re.split(r"\s+", paragraph)) for paragraph in paragraphs)
    perplexity = results.metrics["d2moe_text"]["word_perplexity,none"]
    assert perplexity == pytest.approx(math.exp(-sum(expected) / words), rel=1e-3)
    # Random experts answer one question in four; this model has seen such text.
    assert results.metrics["d2moe_continue"]["acc,none"] > 0.4


@pytest.mark.slow
def test_without_the_import_lm_eval_stops(compressed: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
    """As docs/serving.md says: trust_remote_code=True comes too late for lm-eval, and nothing is evaluated."""
    harness.write_documents(tmp_path, texts[1])
    for options in ({"trust_remote_code": True}, {}):
        done = harness.lm_eval(tmp_path, "hf", pretrained=compressed, dtype="float32", **options)
        assert done.returncode != 0
        assert "Unknown quantization type, got d2moe" in done.stderr
        assert not (tmp_path / "out").exists()
