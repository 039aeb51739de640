"""lm-eval in a process of its own, on tasks whose documents are cut from text at hand: nothing is downloaded."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compression import ROOT

TASKS = ROOT / "tests" / "lm_eval" / "tasks"
PLAIN = ("-m", "lm_eval")
REGISTERED = ("-m", "d2moe_vllm.hf.lm_eval")
"""Python's arguments for lm-eval's own command, and for the same after `import d2moe_vllm.hf`."""
MAX_LENGTH = 480
"""Tokens, as lm-eval counts them; the tests' server takes 512."""


@dataclass
class Results:
    """metrics: task -> metric -> value. loglikelihoods: task -> of each document its requests' natural logarithms."""

    metrics: dict[str, dict[str, Any]]
    loglikelihoods: dict[str, list[list[float]]]


def write_documents(folder: Path, text: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """Writes the tasks' documents into a folder; returns the paragraphs of d2moe_text, and d2moe_continue's records.

    Paragraphs are of 30 to 60 words, so that nothing has to cut them into windows of MAX_LENGTH tokens.
    """
    blocks = (" ".join(block.split()) for block in text.read_text(encoding="utf-8").split("\n\n"))
    paragraphs = [block for block in blocks if 30 <= len(block.split()) <= 60][:20]
    assert len(paragraphs) == 20
    ends = [" ".join(paragraph.split()[15:27]) for paragraph in paragraphs]
    generator, questions = random.Random(0), []
    for number, paragraph in enumerate(paragraphs):
        others = generator.sample([end for end in ends if end != ends[number]], 3)
        answer = generator.randrange(4)
        choices = [*others[:answer], ends[number], *others[answer:]]
        questions.append({"beginning": " ".join(paragraph.split()[:15]), "choices": choices, "answer": answer})
    _write(folder / "text.jsonl", [{"paragraph": paragraph} for paragraph in paragraphs])
    _write(folder / "continue.jsonl", questions)
    return paragraphs, questions


def _write(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def lm_eval(
    folder: Path, kind: str, /, *, command: tuple[str, ...] = PLAIN, **model_args: Any
) -> subprocess.CompletedProcess[str]:
    """Runs both tasks on the documents in a folder, by a kind of model that lm-eval has; `read` reads the results."""
    arguments = ",".join(f"{key}={value}" for key, value in {"max_length": MAX_LENGTH, **model_args}.items())
    device = ["--device", "cpu"] if kind == "hf" else []
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "cache")}
    return subprocess.run(
        [
            sys.executable, *command, "run", "--model", kind, "--model_args", arguments, "--batch_size", "4",
            "--tasks", "d2moe_text,d2moe_continue", "--include_path", str(TASKS),
            "--output_path", str(folder / "out"), "--log_samples", *device,
        ],
        cwd=folder, env={**os.environ, **offline, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def read(folder: Path) -> Results:
    (file,) = (folder / "out").rglob("results_*.json")
    metrics = json.loads(file.read_text())["results"]
    loglikelihoods = {}
    for task in metrics:
        (samples,) = file.parent.glob(f"samples_{task}_*.jsonl")
        records = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda record: record["doc_id"])
        loglikelihoods[task] = [[_number(response) for response in record["filtered_resps"]] for record in records]
    return Results(metrics, loglikelihoods)


def _number(response: Any) -> float:
    """A choice's response is a loglikelihood and whether it is the greedy one; a text's is the loglikelihood."""
    value = float(response[0] if isinstance(response, list) else response)
    assert math.isfinite(value)
    assert value < 0
    return value
