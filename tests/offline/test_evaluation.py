"""`d2moe eval` against whole models in plain transformers, for dense and compressed checkpoints."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from compression import TINY, d2moe_here
from transformers import AutoModelForCausalLM, AutoTokenizer

LENGTH = 200


@torch.no_grad()
def by_transformers(folder: Path, text: Path, scope: str | None = None) -> float:
    """Perplexity of a whole model, one window at a time."""
    tokens = AutoTokenizer.from_pretrained(folder)(text.read_text(), add_special_tokens=False)["input_ids"]
    kwargs = {"trust_remote_code": True, **({"d2moe_scope": scope} if scope else {})}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **kwargs).eval()
    windows = torch.tensor(tokens[: len(tokens) // LENGTH * LENGTH]).view(-1, LENGTH)
    total = 0.0
    for window in windows:
        logprobs = model(window[None]).logits[0, :-1].double().log_softmax(-1)
        total -= float(logprobs.gather(1, window[1:, None]).sum())
    return math.exp(total / (len(windows) * (LENGTH - 1)))


def evaluate(folder: Path, text: Path, *arguments: str) -> dict:
    done = d2moe_here("eval", folder, "--text", text, "--seq-len", LENGTH, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result.pop("peak_memory_bytes") > 0
    return result


@pytest.fixture(scope="module")
def short(texts: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("short") / "held-out.txt"
    path.write_text(texts[1].read_text()[:6_000])
    return path


def test_dense(short: Path) -> None:
    result = evaluate(TINY, short)
    assert result["perplexity"] == pytest.approx(by_transformers(TINY, short), rel=1e-4)
    assert result["tokens"] == result["windows"] * (LENGTH - 1)
    assert result["scope"] is None


def test_bits_per_byte_are_of_the_bytes_that_the_tokens_come_from(short: Path, tmp_path: Path) -> None:
    """By the places in the text that the tokenizer itself says its tokens have."""
    text = tmp_path / "text.txt"
    text.write_text(short.read_text()[:2_000] + " Gödel, Čapek, 東京. " + short.read_text()[2_000:4_000], "utf-8")
    read = AutoTokenizer.from_pretrained(TINY)(text.read_text("utf-8"), add_special_tokens=False,
                                               return_offsets_mapping=True)  # fmt: skip
    result = evaluate(TINY, text)
    ends = [end for _, end in read["offset_mapping"]]
    parts = [slice(ends[n * LENGTH], ends[(n + 1) * LENGTH - 1]) for n in range(result["windows"])]
    size = sum(len(text.read_text("utf-8")[part].encode()) for part in parts)
    assert result["bytes"] == pytest.approx(size, abs=3 * result["windows"])
    nats = result["negative_log_likelihood"] * result["tokens"]
    assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / result["bytes"], rel=1e-12)
    # More words to a token, and the bits of a byte stay of one size.
    assert 1 < result["bits_per_byte"] < 3


@pytest.mark.parametrize("scope", ["off", "token"])
def test_compressed(pruned: Path, short: Path, scope: str) -> None:
    result = evaluate(pruned, short, "--scope", scope)
    assert result["perplexity"] == pytest.approx(by_transformers(pruned, short, scope), rel=1e-4)
    assert result["scope"] == scope


def test_scopes_differ_and_the_checkpoints_own_is_the_default(pruned: Path, short: Path) -> None:
    by_scope = {scope: evaluate(pruned, short, "--scope", scope)["perplexity"] for scope in ("off", "token", "batch")}
    assert len(set(by_scope.values())) == 3
    assert evaluate(pruned, short)["perplexity"] == by_scope["off"]


def test_jsonl_and_bad_texts(tmp_path: Path, short: Path) -> None:
    lines = tmp_path / "text.jsonl"
    lines.write_text(json.dumps({"text": short.read_text()}) + "\n")
    assert evaluate(TINY, lines) == evaluate(TINY, short)
    lines.write_text('{"content": "x"}\n')
    for arguments, fragment in [
        (("--text", lines), "line 1"),
        (("--text", tmp_path / "none"), "cannot be read"),
        (("--text", short, "--seq-len", "1"), "--seq-len"),
        (("--text", short, "--seq-len", "4096"), "1024"),
        (("--text", short, "--scope", "off"), "makes no sense"),
    ]:
        done = d2moe_here("eval", TINY, *arguments)
        assert done.returncode == 2
        assert len(done.stderr.strip().splitlines()) == 1
        assert fragment in done.stderr
