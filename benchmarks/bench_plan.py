"""`make bench-plan`: what `d2moe plan` says of time, memory and disk, beside what a run takes, at real models' shapes.

Models of a layer or two with random weights (synthetic_mixtral.py), compressed, verified and inspected by the commands
themselves, in processes of their own. At two numbers of windows, so that what a window costs can be told from what a
layer costs. Results: build/bench/plan.json, a row for each run; rows that are there are not run again. Options: --help.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from places import ROOT
from synthetic_mixtral import Size, write_dense

from d2moe_vllm.format.kinds import ROLES
from offline.io.shards import write_file

RESULTS = ROOT / "build" / "bench" / "plan.json"
MODELS = ROOT / "build" / "bench" / "models"
SHAPES = {
    "Mixtral-8x7B, 2 layers": Size(4096, 14336, 8, 2),
    "Qwen3-30B-A3B, 1 layer": Size(2048, 768, 128, 1, chosen=8),
    "a quarter of Mixtral, 2 layers": Size(2048, 7168, 8, 2),
}
"""Name -> sizes; the second is a Mixtral with these sizes, as what is computed is the same."""
EVERY = 0.2
"""Seconds between two looks at the working folder."""


@dataclass(frozen=True)
class Run:
    """One compression; windows of `seq_len` tokens."""

    shape: str
    windows: int
    seq_len: int
    ratio: float
    options: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        return json.dumps(list(asdict(self).values()))

    def measure(self, models: Path) -> dict[str, Any]:
        """predicted and really: seconds, bytes of memory at the peak, bytes of the working folder at its fullest."""
        source = write_dense(models, SHAPES[self.shape])
        with tempfile.TemporaryDirectory(dir=models) as name:
            out = Path(name) / "out"
            given = ["--ratio", str(self.ratio), "--windows", str(self.windows), "--seq-len", str(self.seq_len)]
            text = _long(ROOT / "README.md", name)
            command = ["compress", str(source), str(out), *given, *self.options, "--calibration", str(text)]
            start = time.monotonic()
            found, fullest = watched([*command, "--json"], out.with_name("out.d2moe-work"))
            really = {
                "seconds": time.monotonic() - start,
                "peak_memory_bytes": found["peak_memory_bytes"],
                "work_bytes": fullest,
            }
            sound = json.loads(_run(["verify", str(out), "--source", str(source), "--json"]))["sound"]
            inside = json.loads(_run(["inspect", str(out), "--json"]))
        return {
            **asdict(self),
            "predicted": found["predicted"],
            "really": really,
            "sound": sound,
            "stores": inside["stores"],
            "based": any(layer[role]["kept_columns"] for layer in inside["layers"].values() for role in ROLES),
        }


def _long(text: Path, folder: str) -> Path:
    """The text as often as the windows of a run may want."""
    out = Path(folder) / "calibration.txt"
    out.write_text(text.read_text(encoding="utf-8") * 400, encoding="utf-8")
    return out


def _command(arguments: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "offline.cli", *arguments]


def _run(arguments: Sequence[str]) -> str:
    return subprocess.run(_command(arguments), check=True, capture_output=True, text=True).stdout


def watched(arguments: Sequence[str], folder: Path) -> tuple[dict[str, Any], int]:
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


def show(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| shape | windows | predicted and real time | ratio | memory, the same | working folder, the same |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        said, took = row["predicted"], row["really"]
        # Whether a base pays is not known before: a run that had none has to be the shorter one.
        seconds = said["seconds" if row["based"] else "least_seconds"]
        pairs = [(said[name], took[name]) for name in ("peak_memory_bytes", "work_bytes")]
        bytes_ = " | ".join(f"{one / 1e9:.2f}, {two / 1e9:.2f} GB" for one, two in pairs)
        lines.append(
            f"| {row['shape']} | {row['windows']} x {row['seq_len']} | {seconds:.0f}, {took['seconds']:.0f} s "
            f"| {seconds / took['seconds']:.2f} | {bytes_} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--windows", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--ratio", type=float, default=0.8)
    parser.add_argument("--models", type=Path, default=MODELS, help="where the models are written (6 GB the largest)")
    parser.add_argument("options", nargs="*", help="of `d2moe compress`, after --")
    given = parser.parse_args()
    rows: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for shape in given.shapes:
        for windows in given.windows:
            run = Run(shape, windows, given.seq_len, given.ratio, tuple(given.options))
            if run.key not in rows:
                print(f"{shape}, {windows} windows", file=sys.stderr, flush=True)
                rows[run.key] = run.measure(given.models)
                RESULTS.parent.mkdir(parents=True, exist_ok=True)
                write_file(RESULTS, json.dumps(rows, indent=1) + "\n")
    print(show(list(rows.values())))
    print(f"written to {os.path.relpath(RESULTS)}")


if __name__ == "__main__":
    main()
