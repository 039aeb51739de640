"""How fast vLLM serves a checkpoint: a real `vllm serve`, loaded by vLLM's own `vllm bench serve`.

One fixed small workload (WORKLOAD), so that the figures of several checkpoints can stand beside one another. Each has
a server of its own and the servers run one after another: what the machine did meanwhile is in the differences, and
how much that is, only the spread over the rounds can tell.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from offline.compare.server import Server, ServerError
from offline.errors import InputError

WORKLOAD: Mapping[str, int] = {"input_tokens": 32, "output_tokens": 64, "at_once": 8, "requests": 16, "rounds": 3}
"""at_once: requests in flight; requests: of each round, after as many as are in flight to warm up."""
FIGURES = {"output_tokens_per_s": "output_throughput", "ms_per_output_token": "median_tpot_ms"}
"""Our names of what `vllm bench serve` reports."""
_ERROR = re.compile(r"\b((?:\w+\.)*\w*(?:Error|Exception): .+)")
_REASON = 300
"""Characters of a reason that are told."""


class ServingError(RuntimeError):
    """A checkpoint that is not served; the message is one line."""


def check_vllm() -> None:
    """Raises InputError where vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None or not _vllm().exists():
        raise InputError(
            "--serve needs vLLM beside d2moe; install it (pip install 'd2moe-vllm[serve]') or leave it out"
        )


def version() -> str:
    return importlib.metadata.version("vllm")


def serve_speed(folder: Path, *, plugin: bool, arguments: Sequence[str], log: Path) -> dict[str, Any]:
    """Medians over the rounds and their [least, most], by the names of FIGURES.

    plugin: a checkpoint of ours, served through the plugin, else stock vLLM without any plugin; arguments: further ones
    of `vllm serve`; log: what the server says, removed where all went well. Raises ServingError.
    """
    environment = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"} | ({} if plugin else {"VLLM_PLUGINS": ""})
    # Prompts repeat from round to round: a cache of them would make later rounds faster.
    options = ["--served-model-name", "model", "--no-enable-prefix-caching", *arguments]
    report = log.with_suffix(".json")
    try:
        with Server(folder, options, log=log, env=environment, trust=False) as server:
            rounds = [
                _round(folder, server.port, report, environment, warm_up=number == 0)
                for number in range(WORKLOAD["rounds"])
            ]
    except ServerError as error:
        what = str(error).partition(";")[0]
        raise ServingError(f"{what}: {last_error(log.read_text(errors='replace'))} (log: {log})") from None
    finally:
        report.unlink(missing_ok=True)
    log.unlink()
    return summary(rounds)


def summary(rounds: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Of each figure the median, and [least, most]."""
    result: dict[str, Any] = {}
    for name in FIGURES:
        values = [one[name] for one in rounds]
        result |= {name: statistics.median(values), f"{name}_min_max": [min(values), max(values)]}
    return result


def last_error(log: str) -> str:
    """The line of a log that says what went wrong, not too long: the last error that does not point to another."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    found = [
        f"{match[1]} {lines[number + 1]}" if "validation error" in match[1] and number + 1 < len(lines) else match[1]
        for number, line in enumerate(lines)
        if (match := _ERROR.search(line))
    ]
    causes = [one for one in found if "root cause" not in one]
    return " ".join((causes or found or lines or ["it ended without a word"])[-1].split())[:_REASON]


def _vllm() -> Path:
    return Path(sys.executable).with_name("vllm")


def _round(folder: Path, port: int, report: Path, environment: Mapping[str, str], *, warm_up: bool) -> dict[str, float]:
    """One `vllm bench serve`. Raises ServingError where it fails, or a request does."""
    load, report_name = WORKLOAD, ["--result-dir", str(report.parent), "--result-filename", report.name]
    command = [
        str(_vllm()), "bench", "serve", "--host", "127.0.0.1", "--port", str(port), "--model", "model",
        "--tokenizer", str(folder), "--dataset-name", "random", "--random-input-len", str(load["input_tokens"]),
        "--random-output-len", str(load["output_tokens"]), "--num-prompts", str(load["requests"]), "--ignore-eos",
        "--max-concurrency", str(load["at_once"]), "--num-warmups", str(load["at_once"] if warm_up else 0),
        # Sampled: greedy text of a small model soon repeats itself, and then uses few experts.
        "--temperature", "1", "--disable-tqdm", "--ready-check-timeout-sec", "0", "--percentile-metrics", "tpot",
        "--save-result", *report_name,
    ]  # fmt: skip
    report.unlink(missing_ok=True)
    done = subprocess.run(
        command,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode or not report.exists():
        raise ServingError(f"vllm bench serve: {last_error(done.stdout + done.stderr)}")
    found = json.loads(report.read_text(encoding="utf-8"))
    if (found["completed"], found["total_output_tokens"]) != (
        load["requests"],
        load["requests"] * load["output_tokens"],
    ):
        raise ServingError(f"{load['requests'] - found['completed']} of {load['requests']} requests failed")
    return {ours: found[theirs] for ours, theirs in FIGURES.items()}
