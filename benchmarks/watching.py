"""Commands of `d2moe` in processes of their own, and what lay on the disk while they ran."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from d2moe_vllm.format.files import read_config

EVERY = 0.2
"""Seconds between two looks at the working folder."""


def _command(arguments: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "offline.cli", *arguments]


def said(arguments: Sequence[str]) -> dict[str, Any]:
    """What `d2moe ARGUMENTS --json` says. Raises CalledProcessError."""
    done = subprocess.run(_command([*arguments, "--json"]), check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def watched_compress(arguments: Sequence[str], out: Path) -> dict[str, Any]:
    """What `d2moe compress ARGUMENTS --json` says, with `really`: its seconds, its bytes of memory at the peak, and the
    most bytes that lay in the working folder beside `out`; `predicted` says the same beforehand. based: whether some
    layer has a base. Raises SystemExit with the command's exit code."""
    start = time.monotonic()
    found, fullest = _watched(["compress", *arguments, "--json"], out.with_name(f"{out.name}.d2moe-work"))
    really = {
        "seconds": time.monotonic() - start,
        "peak_memory_bytes": found["peak_memory_bytes"],
        "work_bytes": fullest,
    }
    layers = read_config(out).layers.values()
    based = any(projection.has_base for layer in layers for projection in (layer.up, layer.down))
    return {**found, "really": really, "based": based}


def _watched(arguments: Sequence[str], folder: Path) -> tuple[dict[str, Any], int]:
    """What the command says as JSON, and the most bytes that lay in the folder meanwhile."""
    process = subprocess.Popen(_command(arguments), stdout=subprocess.PIPE, text=True)
    fullest = 0
    while process.poll() is None:
        fullest = max(fullest, _bytes(folder))
        time.sleep(EVERY)
    assert process.stdout is not None
    if process.returncode:
        raise SystemExit(process.returncode)
    return json.loads(process.stdout.read()), fullest


def _bytes(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*"):
        try:
            total += file.stat().st_blocks * 512 if file.is_file() else 0
        except FileNotFoundError:  # files come and go
            continue
    return total


def beside_plan(row: dict[str, Any]) -> str:
    """Cells of a table, predicted and real: time, its ratio, memory, working folder."""
    told, took = row["predicted"], row["really"]
    # Whether a base pays is not known before: a run that had none has to be the shorter one.
    seconds = told["seconds" if row["based"] else "least_seconds"]
    pairs = [(told[name], took[name]) for name in ("peak_memory_bytes", "work_bytes")]
    bytes_ = " | ".join(f"{one / 1e9:.2f}, {two / 1e9:.2f} GB" for one, two in pairs)
    return f"{seconds:.0f}, {took['seconds']:.0f} s | {seconds / took['seconds']:.2f} | {bytes_}"
