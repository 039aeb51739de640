"""The tables of `make quality-real` from rows that are there, and what they say of those that are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the module sets it, for the rest of its process
    import quality_real

    return quality_real


OURS = {
    "left": 0.2, "removed": 0.736, "perplexity": 25.0, "stores": "no base, 3-bit experts", "resumed": False,
    "based": True,
    "predicted": {"seconds": 1800.0, "least_seconds": 900.0, "peak_memory_bytes": 1.3e9, "work_bytes": 0.7e9},
    "really": {"seconds": 1200.0, "peak_memory_bytes": 1.2e9, "work_bytes": 0.6e9},
}  # fmt: skip
DENSE = {"left": 1.0, "removed": 0.0, "perplexity": 20.0}


def test_rows_are_shown_by_size_and_what_is_missing_is_counted(real: Any) -> None:
    rounded = {"left": 0.203, "removed": 0.73, "perplexity": 30.0, "stores": "no base, 3-bit experts"}
    results = {("copies", "20 %"): OURS, ("copies", "gptq-3"): rounded, ("copies", "dense"): DENSE}
    lines = real.frontier_table(results).splitlines()
    assert [line.split(" | ")[1:6] for line in lines[2:5]] == [
        ["dense", "100.0 %", "0.0 %", "20.00", ""],
        ["`gptq-3`", "20.3 %", "73.0 %", "30.00", "+50.0 %"],
        ["**ours, 20 %**", "20.0 %", "73.6 %", "25.00", "+25.0 %"],
    ]
    assert lines[-1] == "8 of 11 rows not measured yet."
    plan = real.plan_table(results).splitlines()
    assert plan[2] == "| `copies` | ours, 20 % | 1800, 1200 s | 1.50 | 1.30, 1.20 GB | 0.70, 0.60 GB |"
    other = real.plan_table({("copies", "20 %"): OURS | {"based": False}}).splitlines()
    assert other[2].startswith("| `copies` | ours, 20 % | 900, 1200 s | 0.75 |")
    assert plan[-1] == "4 of 5 rows not measured yet."


def test_a_table_without_rows_is_a_sentence(real: Any) -> None:
    assert real.frontier_table({}) == "11 of 11 rows not measured yet."


def test_without_the_dense_row_no_loss_is_told(real: Any) -> None:
    line = real.frontier_table({("fresh", "20 %"): OURS}).splitlines()[2]
    assert line.split(" | ")[4:6] == ["25.00", ""]


def test_whole_tables_say_nothing_of_missing_rows(real: Any) -> None:
    results = {
        (model, row): OURS if row in real.OURS else DENSE | {"stores": ""}
        for model, rows in real.ROWS.items()
        for row in rows
    }
    assert "not measured" not in real.frontier_table(results) + real.plan_table(results)


def test_a_model_is_told_from_another_of_its_name(real: Any) -> None:
    """Rows of a model that was trained anew are measured anew."""
    one, other = ({"sha256": letter * 64} for letter in "ab")
    assert real.digest(one) != real.digest(other)
    keys = {
        job.key for record in (one, other) for job in real.jobs_of("copies", real.digest(record), ["dense", "20 %"])
    }
    assert len(keys) == 4


def test_memory_for_training_is_what_is_free_and_not_what_there_is(real: Any) -> None:
    """A training that takes what others hold brings the machine to a halt."""
    from trained_models import available_memory

    assert available_memory("MemTotal: 900 kB\nMemFree: 5 kB\nMemAvailable:     100 kB\n") == 102_400


def test_models_and_answers_are_told(real: Any) -> None:
    apart = {"mean": 0.05, "least": 0.01, "most": 0.1}
    values = {"unseen": 20.0, "held-out": 10.0}
    record = {
        **dict.fromkeys(("source", "start", "trained"), values),
        "training": {"tokens": 12_000, "seconds": 120.0},
        "apart": dict.fromkeys(("gate", "up", "down"), apart),
        "sha256": "ab" * 32,
    }
    lines = real.models_table({"copies": record}).splitlines()
    assert lines[2].startswith(
        "| `copies` | 12,000 | 2 | 20.00, 20.00, 20.00 | 10.00, 10.00, 10.00 | 0.050 (0.010 to 0.1"
    )
    assert lines[2].endswith(" | `abababababab` |")
    assert lines[-1] == "1 of 2 rows not measured yet."
    assert "not been served" in real.answers_text(None)
    assert "'Paris.'" in real.answers_text({"completion": " Paris", "answer": "Paris."})


def test_what_was_measured_stays_and_is_not_measured_again(
    real: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows, whatever machine they are from, of a model that turns out the same."""
    monkeypatch.setattr(real, "RESULTS", tmp_path / "results.json")
    assert real._kept("rows") == {}
    real._keep("rows", "a", {"perplexity": 1.0})
    real._keep("models", "copies", {"sha256": "ab"})
    real._keep("rows", "b", {"perplexity": 2.0})
    assert real._kept("rows") == {"a": {"perplexity": 1.0}, "b": {"perplexity": 2.0}}
    assert real._kept("models") == {"copies": {"sha256": "ab"}}
