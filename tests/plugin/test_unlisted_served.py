"""A family that d2moe has no row of, compressed with the row that `d2moe plan` proposes, and served by vLLM's own class
of it: against stock vLLM on the dense export, and that against plain transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from compression import d2moe_here
from engine import assert_same, generate
from transformers import AutoModelForCausalLM
from unlisted import write_unlisted

pytest.importorskip("vllm")

JOB = {"prompts": ("A class definition", "Lists are", "for"), "max_tokens": 24}
EAGER = {"dtype": "float32", "enforce_eager": True}


@pytest.mark.slow
def test_served_without_the_file(tmp_path: Path, texts: tuple[Path, Path]) -> None:
    source = write_unlisted(tmp_path / "source", "afmoe", torch.float32)
    proposed = d2moe_here("plan", source)
    assert "vLLM 0." in proposed.stdout
    assert "has a class AfmoeForCausalLM" in proposed.stdout
    (tmp_path / "afmoe.yaml").write_text(proposed.stdout)
    given = ("--ratio", "0.08", "--windows", "4", "--seq-len", "32", "--calibration", texts[0])
    for command in (
        ("compress", source, tmp_path / "ours", *given, "--family-file", tmp_path / "afmoe.yaml"),
        ("export", tmp_path / "ours", tmp_path / "dense"),
    ):
        done = d2moe_here(*command)
        assert done.returncode == 0, done.stderr
    (tmp_path / "afmoe.yaml").unlink()
    stock = generate(tmp_path / "stock", tmp_path / "dense", {"VLLM_PLUGINS": ""}, job=JOB, **EAGER)
    assert_same(generate(tmp_path / "found", tmp_path / "ours", {}, job=JOB, **EAGER), stock)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32).eval()
    for result in stock:
        tokens = torch.tensor([result["prompt_ids"] + result["ids"]])
        with torch.no_grad():
            told = model(tokens).logits[0, :-1].log_softmax(-1).gather(-1, tokens[0, 1:, None])[:, 0]
        expected = torch.tensor(result["prompt_logprobs"] + result["logprobs"])
        torch.testing.assert_close(told, expected, rtol=0, atol=1e-3)
