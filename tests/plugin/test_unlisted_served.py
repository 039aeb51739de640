"""A family that d2moe has no row of, compressed with the row that `d2moe plan` proposes, and served by vLLM's own class
of it: against stock vLLM on the dense export, and that against plain transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from compression import d2moe_here
from engine import assert_same, generate
from transformers import AutoModelForCausalLM
from unlisted import write_unlisted

pytest.importorskip("vllm")

JOB = {"prompts": ("A class definition", "Lists are", "for"), "max_tokens": 24}
EAGER = {"dtype": "float32", "enforce_eager": True}
LATENT = {"block_size": 16, "enable_chunked_prefill": False, "compilation_config": {"custom_ops": ["none"]}}
"""What vLLM's latent attention on CPUs needs (test_families_served.py)."""
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    # vLLM's class of it wants a norm of a dense layer that no checkpoint of transformers' class has.
    "axk1": ("AXK1ForCausalLM", {"first_k_dense_replace": 0}, LATENT),
    "granitemoeshared": ("GraniteMoeSharedForCausalLM", {}, {}),
}
"""Experts with tensors of their own, behind latent attention, and stacks of them."""


@pytest.mark.slow
@pytest.mark.parametrize("family", CASES)
def test_served_without_the_file(family: str, tmp_path: Path, texts: tuple[Path, Path]) -> None:
    if family == "axk1" and torch.cpu._is_amx_tile_supported():
        pytest.skip("vLLM's MLA on CPUs with AMX takes no float32, whatever the model")
    architecture, changes, options = CASES[family]
    options = {**EAGER, **options}
    source = write_unlisted(tmp_path / "source", family, torch.float32, **changes)
    proposed = d2moe_here("plan", source)
    assert "vLLM 0." in proposed.stdout
    assert f"has a class {architecture}" in proposed.stdout
    file = tmp_path / "row.yaml"
    file.write_text(proposed.stdout)
    given = ("--ratio", "0.08", "--windows", "4", "--seq-len", "32", "--calibration", texts[0])
    for command in (
        ("compress", source, tmp_path / "ours", *given, "--family-file", file),
        ("export", tmp_path / "ours", tmp_path / "dense"),
    ):
        done = d2moe_here(*command)
        assert done.returncode == 0, done.stderr
    file.unlink()
    stock = generate(tmp_path / "stock", tmp_path / "dense", {"VLLM_PLUGINS": ""}, job=JOB, **options)
    assert_same(generate(tmp_path / "found", tmp_path / "ours", {}, job=JOB, **options), stock)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32).eval()
    for result in stock:
        tokens = torch.tensor([result["prompt_ids"] + result["ids"]])
        with torch.no_grad():
            told = model(tokens).logits[0, :-1].log_softmax(-1).gather(-1, tokens[0, 1:, None])[:, 0]
        expected = torch.tensor(result["prompt_logprobs"] + result["logprobs"])
        torch.testing.assert_close(told, expected, rtol=0, atol=1e-3)
