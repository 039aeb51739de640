"""The model card: read back by the Hub's own parser, and measured figures put into it."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path

import pytest
from compression import TINY, d2moe_here
from huggingface_hub import ModelCard, ModelCardData

SOURCE_CARD = """\
---
license: other
license_name: tongyi-qianwen
license_link: LICENSE
language: [en, zh]
library_name: transformers
tags: [chat]
datasets: [not/ours]
---
# A model
"""
RELATIONS = ("adapter", "merge", "quantized", "finetune")
"""What the Hub knows as `base_model_relation`."""


def test_the_hub_reads_the_card(compressed: Path) -> None:
    """By huggingface_hub's own parser, in fields that it knows; the text has the measured errors and the recipe."""
    card = ModelCard.load(compressed / "README.md")
    data = card.data
    assert isinstance(data, ModelCardData)
    assert data.base_model is None  # a folder's name is no model of the Hub
    assert data.license == "apache-2.0"
    assert data.library_name == "vllm"
    assert data.pipeline_tag == "text-generation"
    assert {"d2moe", "moe"} <= set(data.tags)
    known = {
        *inspect.signature(ModelCardData.__init__).parameters,
        "base_model_relation",
        "license_name",
        "license_link",
    }
    assert set(data.to_dict()) <= known
    statistics = json.loads((compressed / "d2moe_stats.json").read_text())
    assert statistics["calibration"]["tokens_sha256"] in card.text
    for role in ("gate", "up", "down"):
        errors = [error for report in statistics["layers"].values() for error in report["relative_error"][role]]
        assert f"{sum(errors) / len(errors):.4f}" in card.text
        assert f"{max(errors):.4f}" in card.text
    assert "vllm serve" in card.text
    assert "AutoModelForCausalLM.from_pretrained" in card.text
    assert "Ratio 0.4 (stored), adaptive ranks, base auto" in card.text


def test_what_a_snapshot_of_the_hub_says_is_carried_over(texts: tuple[Path, Path], tmp_path: Path) -> None:
    """Its repository; a licence with a name and a file of its own, which comes along; a language; from a card with
    Windows' line ends."""
    source = tmp_path / "models--someone--small" / "snapshots" / ("3f1c" * 10)
    shutil.copytree(TINY, source)
    (source / "README.md").write_bytes(SOURCE_CARD.replace("\n", "\r\n").encode("utf-8-sig"))
    (source / "LICENSE").write_text("terms")
    few = ("--ratio", 0.4, "--windows", 8, "--seq-len", 64, "--calibration", texts[0])
    done = d2moe_here("compress", source, tmp_path / "out", *few)
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["source"]
    assert (written["name"], written["revision"]) == ("someone/small", "3f1c" * 10)
    found = ModelCard.load(tmp_path / "out" / "README.md").data.to_dict()
    assert found["base_model_relation"] in RELATIONS
    expected = {
        "base_model": "someone/small",
        "license": "other",
        "license_name": "tongyi-qianwen",
        "license_link": "LICENSE",
        "language": ["en", "zh"],
    }
    assert {key: found[key] for key in expected} == expected
    assert "datasets" not in found
    assert found["tags"] == ["d2moe", "moe", "compressed", "vllm"]
    assert (tmp_path / "out" / "LICENSE").read_text() == "terms"


@pytest.fixture
def copy(compressed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(compressed, tmp_path / "copy"))


def test_what_was_measured_is_recorded_and_nothing_else_changes(
    copy: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    """Twice: the second time in place of the first; the checkpoint stays sound and the Hub still reads its card."""
    before = (copy / "README.md").read_text()
    text = tmp_path / "held|out.txt"
    text.write_text(texts[1].read_text()[:2_000])
    for number, more in enumerate(((), ("--source", TINY))):
        page = tmp_path / f"{number}.html"
        done = d2moe_here("report", copy, page, "--quick", "--text", text, "--seq-len", 64, "--card", *more, "--json")
        assert done.returncode == 0, done.stderr
        (row,) = json.loads(done.stdout)["content"]["perplexity"]
        card = (copy / "README.md").read_text()
        original = f"{row['before']:.2f}" if more else "not measured"
        assert f"| held\\|out.txt | {row['tokens']:,} | {original} | {row['after']:.2f} |" in card
        assert card.count("held\\|out.txt") == 1
        assert "Perplexity: not measured" not in card
        assert card.split("<!-- measured -->")[0] == before.split("<!-- measured -->")[0]
    assert ModelCard.load(copy / "README.md").data.license == "apache-2.0"
    assert d2moe_here("verify", copy).returncode == 0


@pytest.mark.parametrize("content", ["# No place\n", "<!-- /measured -->\n<!-- measured -->\n", None])
def test_a_card_without_a_place_for_it_is_left_alone(
    copy: Path, texts: tuple[Path, Path], tmp_path: Path, content: str | None
) -> None:
    """Refused before anything is measured."""
    card = copy / "README.md"
    card.unlink() if content is None else card.write_text(content)
    done = d2moe_here("report", copy, tmp_path / "page.html", "--quick", "--text", texts[1], "--seq-len", 64, "--card")
    assert done.returncode == 2
    assert "leave --card out" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "page.html").exists()
    assert card.exists() is (content is not None)
