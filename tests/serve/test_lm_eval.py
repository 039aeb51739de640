"""lm-eval against the server, through OpenAI's completions API, beside lm-eval in plain transformers."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("lm_eval")

import harness
from openai import OpenAI

from offline.compare.server import Server


def test_local_completions_gives_the_figures_of_plain_transformers(
    server: Server,
    client: OpenAI,
    compressed: Path,
    texts: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every loglikelihood to 1e-4 of itself, the perplexity likewise, and the same answers."""
    monkeypatch.setenv("OPENAI_API_KEY", client.api_key)
    served, plain = tmp_path / "served", tmp_path / "plain"
    for folder in (served, plain):
        folder.mkdir()
        harness.write_documents(folder, texts[1])
    runs = [
        harness.lm_eval(
            served, "local-completions", model="tiny", base_url=f"{server.base_url}/completions",
            tokenizer_backend="huggingface", tokenizer=compressed, num_concurrent=4, max_retries=1,
        ),
        harness.lm_eval(
            plain, "hf", command=harness.REGISTERED, pretrained=compressed, dtype="float32"
        ),
    ]  # fmt: skip
    assert [run.returncode for run in runs] == [0, 0], "\n".join(run.stderr[-3000:] for run in runs)
    ours, expected = harness.read(served), harness.read(plain)
    for task, documents in expected.loglikelihoods.items():
        for found, wanted in zip(ours.loglikelihoods[task], documents, strict=True):
            assert found == pytest.approx(wanted, rel=1e-4, abs=1e-3)
    for metric in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        name = f"{metric},none"
        assert ours.metrics["d2moe_text"][name] == pytest.approx(expected.metrics["d2moe_text"][name], rel=1e-4)
    for metric in ("acc,none", "acc_norm,none"):
        assert ours.metrics["d2moe_continue"][metric] == expected.metrics["d2moe_continue"][metric]
