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


class Scorer:
    """Loglikelihoods (natural logarithm) by plain transformers, one text at a time."""

    def __init__(self, checkpoint: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)

    def tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    @torch.no_grad()
    def score(self, tokens: list[int], start: int) -> float:
        """Of the tokens from `start` on, after those before."""
        assert len(tokens) < harness.MAX_LENGTH
        scores = self.model(torch.tensor([tokens[:-1]])).logits[0].log_softmax(-1)
        return float(scores.gather(1, torch.tensor(tokens)[1:, None])[start - 1 :].sum())

    def text(self, text: str) -> float:
        """Of a whole text, after the token that begins or else ends texts."""
        first = self.tokenizer.bos_token_id
        return self.score([self.tokenizer.eos_token_id if first is None else first, *self.tokens(text)], 1)

    def choice(self, beginning: str, choice: str) -> float:
        return self.score(self.tokens(f"{beginning} {choice}"), len(self.tokens(beginning)))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"trust_remote_code": True}], ids=["quantizer", "both"])
def test_lm_eval_gives_the_figures_of_plain_transformers(
    compressed: Path, texts: tuple[Path, Path], tmp_path: Path, options: dict[str, bool]
) -> None:
    paragraphs, questions = harness.write_documents(tmp_path, texts[1])
    done = harness.lm_eval(
        tmp_path, "hf", command=harness.REGISTERED, pretrained=compressed, dtype="float32", **options
    )
    assert done.returncode == 0, done.stderr
    results, scorer = harness.read(tmp_path), Scorer(compressed)
    expected = [scorer.text(paragraph) for paragraph in paragraphs]
    assert [value for (value,) in results.loglikelihoods["d2moe_text"]] == pytest.approx(expected, rel=1e-5)
    words = sum(len(re.split(r"\s+", paragraph)) for paragraph in paragraphs)
    perplexity = results.metrics["d2moe_text"]["word_perplexity,none"]
    assert perplexity == pytest.approx(math.exp(-sum(expected) / words), rel=1e-3)
    scores = [
        [scorer.choice(question["beginning"], choice) for choice in question["choices"]] for question in questions
    ]
    for found, wanted in zip(results.loglikelihoods["d2moe_continue"], scores, strict=True):
        assert found == pytest.approx(wanted, rel=1e-5)
    right = [row.index(max(row)) == question["answer"] for row, question in zip(scores, questions, strict=True)]
    assert results.metrics["d2moe_continue"]["acc,none"] == pytest.approx(sum(right) / len(right))


@pytest.mark.slow
def test_without_the_import_lm_eval_stops(compressed: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
    """As docs/serving.md says: trust_remote_code=True comes too late for lm-eval, and nothing is evaluated."""
    harness.write_documents(tmp_path, texts[1])
    for options in ({"trust_remote_code": True}, {}):
        done = harness.lm_eval(tmp_path, "hf", pretrained=compressed, dtype="float32", **options)
        assert done.returncode != 0
        assert "Unknown quantization type, got d2moe" in done.stderr
        assert not (tmp_path / "out").exists()
