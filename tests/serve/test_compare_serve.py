"""`d2moe compare --serve`: refused without vLLM, shown in the tables, and measured by real servers."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from compression import TINY, d2moe_here
from processes import processes
from rich.console import Console

from offline.compare.html import page
from offline.compare.table import compare_table
from offline.compare.throughput import WORKLOAD, last_error, summary

FEW = ("--windows", "16", "--seq-len", "64")


def test_refused_without_vllm(texts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a Python that cannot import it: one line, exit code 2, before any work."""
    monkeypatch.setitem(sys.modules, "vllm", None)
    done = d2moe_here(
        "compare", TINY, "--ratio", "0.2", "--method", "d2", "--text", texts[1], "--calibration", texts[0], *FEW,
        "--workdir", tmp_path / "work", "--serve",
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("d2moe: --serve needs vLLM")
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "work").exists()


LOG = """(APIServer pid=1) INFO starting
(EngineCore pid=2) ERROR 11-22 12:00:00 [core.py:1] Traceback (most recent call last):
(EngineCore pid=2) ERROR 11-22 12:00:00 [core.py:1] ValueError: No model architectures are specified
(APIServer pid=1) RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""


def test_the_reason_is_the_cause_and_not_what_points_to_it() -> None:
    assert last_error(LOG) == "ValueError: No model architectures are specified"
    validation = (
        "pydantic_core._pydantic_core.ValidationError: 1 validation error for VllmConfig\n  Value error, x is y\n"
    )
    assert last_error(validation + "bye").endswith("1 validation error for VllmConfig Value error, x is y")
    assert last_error("one\ntwo\n\n") == "two"
    assert last_error("") == "it ended without a word"


def test_medians_and_spread_stand_in_the_tables() -> None:
    """Of rounds whose middle one is neither first nor last; a row that is not served says why, and keeps the rest."""
    speeds = [(100.0, 9.0), (300.0, 3.04), (220.4, 4.0)]
    served = summary([{"output_tokens_per_s": tokens, "ms_per_output_token": ms} for tokens, ms in speeds])
    assert served == {
        "output_tokens_per_s": 220.4, "output_tokens_per_s_min_max": [100.0, 300.0],
        "ms_per_output_token": 4.0, "ms_per_output_token_min_max": [3.04, 9.0],
    }  # fmt: skip
    empty = dict.fromkeys(("counted", "cpu_seconds", "path", "reachable", "failed", "served"))
    row: dict[str, Any] = {
        **empty, "name": "source", "kind": "source", "ratio": 0.0, "stored_ratio": 0.0, "bytes": 1000,
        "parameters": 500, "expert_bytes": 800, "expert_share": 1.0, "perplexity": {"a.txt": 7.0}, "seconds": None,
        "peak_memory_bytes": None, "resumed": False,
    }  # fmt: skip
    other = {**row, "name": "d2", "kind": "method", "ratio": 0.4, "seconds": 2.0, "peak_memory_bytes": 10**9}
    content = {
        "source": {"name": "m", "parameters": 500, "bytes": 1000},
        "calibration": {"tokens_sha256": "ab" * 32, "windows": 1, "seq_len": 8, "seed": 0},
        "texts": [{"name": "a.txt", "sha256": "cd"}], "seq_len": 8, "machine": {"threads": 1, "device": "cpu"},
        "serving": {"vllm": "0.32.0", "arguments": [], **WORKLOAD}, "tool": "0", "workdir": "w",
        "frontier": None,
        "rows": [{**row, "served": served}, {**other, "failed": "not served: the server exited with 1"}],
    }  # fmt: skip
    console = Console(width=300, file=io.StringIO())
    compare_table(console, content)
    text, html = console.file.getvalue(), page(content)
    for shown in (text, html):
        assert "220 (100-300)" in shown
        assert "4.0 (3.0-9.0)" in shown
        assert "not served: the server exited with 1" in shown
        assert "16 requests of 32 + 64 tokens, 8 at once" in shown
    assert re.search(r"<th scope=\"row\">d2</th><td>40 %</td><td>0.00 %</td>", html)


@pytest.mark.slow
@pytest.mark.timeout(2400)  # three servers, three rounds each, on a shared machine
def test_rows_are_served_by_vllm(texts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The source and a baseline by stock vLLM, d2 through the plugin: each has a speed that its three rounds span,
    which is remembered. An argument that `vllm serve` does not know is a reason in every row, and no crash; nothing
    that was started is left."""
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    text, work = tmp_path / "short.txt", tmp_path / "work"
    text.write_text(texts[1].read_text()[:8_000])
    arguments = (
        "compare", TINY, "--ratio", "0.4", "--method", "d2", "--baseline", "frequency", "--text", text, "--calibration",
        texts[0], *FEW, "--workdir", work, "--serve", "--keep", "--json",
    )  # fmt: skip
    done = d2moe_here(*arguments, "--vllm-args=--enforce-eager --dtype float32 --max-model-len 512")
    assert done.returncode == 0, done.stderr
    content = json.loads(done.stdout)
    assert content["serving"]["arguments"] == ["--enforce-eager", "--dtype", "float32", "--max-model-len", "512"]
    assert [row["name"] for row in content["rows"]] == ["source", "d2", "frequency"]
    for row in content["rows"]:
        for figure in ("output_tokens_per_s", "ms_per_output_token"):
            least, most = row["served"][f"{figure}_min_max"]
            assert 0 < least <= row["served"][figure] <= most
    assert not list(work.glob("*.serve.*"))
    again = d2moe_here(*arguments, "--vllm-args=--enforce-eager --dtype float32 --max-model-len 512")
    assert json.loads(again.stdout) == content
    assert "starting" not in again.stderr

    wrong = d2moe_here(*arguments, "--vllm-args=--no-such-thing")
    assert wrong.returncode == 1
    rows = json.loads(wrong.stdout)["rows"]
    assert all(row["failed"].startswith("not served: the server exited with 2: ") for row in rows)
    assert all("unrecognized arguments: --no-such-thing" in row["failed"] for row in rows)
    assert [row["perplexity"] for row in rows] == [row["perplexity"] for row in content["rows"]]
    assert len(list(work.glob("*.serve.log"))) == 3
    assert processes(str(work)) == []
