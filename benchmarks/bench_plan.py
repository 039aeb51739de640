"""`make bench-plan`: what `d2moe plan` says of time, memory and disk, beside what a run takes, at real models' shapes.

Models of a layer or two with random weights (synthetic_mixtral.py), compressed, verified, inspected and served by the
commands themselves, in processes of their own. At two numbers of windows, so that what a window costs can be told from
what a layer costs. Results: build/bench/plan.json, a row for each run; rows that are there are not run again. Options:
--help.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from openai import OpenAI
from places import ROOT
from synthetic_mixtral import Size, write_dense
from watching import beside_plan, said, watched_compress

from offline.compare.server import Server
from offline.io.shards import write_file

RESULTS = ROOT / "build" / "bench" / "plan.json"
MODELS = ROOT / "build" / "bench" / "models"
SHAPES = {
    "Mixtral-8x7B, 2 layers": Size(4096, 14336, 8, 2),
    "Qwen3-30B-A3B, 1 layer": Size(2048, 768, 128, 1, chosen=8),
    "a quarter of Mixtral, 2 layers": Size(2048, 7168, 8, 2),
}
"""Name -> sizes; the second is a Mixtral with these sizes, as what is computed is the same."""


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
            arguments = [str(source), str(out), *given, *self.options, "--calibration", str(text)]
            found = watched_compress(arguments, out)
            sound = said(["verify", str(out), "--source", str(source)])["sound"]
            stores = said(["inspect", str(out)])["stores"]
            served = _served(out, log=Path(name) / "server.log")
        return {
            **asdict(self),
            "predicted": found["predicted"],
            "really": found["really"],
            "sound": sound,
            "stores": stores,
            "based": found["based"],
            "served": served,
        }


def _served(out: Path, log: Path, tokens: int = 16) -> dict[str, float]:
    """Of `vllm serve`: seconds until it answers, and tokens a second of its second completion (the first compiles)."""
    started = time.monotonic()
    with Server(out, ["--max-model-len", "512"], log=log, env={"VLLM_CPU_KVCACHE_SPACE": "1"}, timeout=1800) as server:
        up = time.monotonic() - started
        client = OpenAI(base_url=server.base_url, api_key="none")
        for _ in range(2):
            asked = time.monotonic()
            reply = client.completions.create(
                model=str(out), prompt="The `for` statement", max_tokens=tokens, extra_body={"ignore_eos": True}
            )
            seconds = time.monotonic() - asked
    assert reply.usage is not None
    return {"start_seconds": up, "tokens_per_s": reply.usage.completion_tokens / seconds}


def _long(text: Path, folder: str) -> Path:
    """The text as often as the windows of a run may want."""
    out = Path(folder) / "calibration.txt"
    out.write_text(text.read_text(encoding="utf-8") * 400, encoding="utf-8")
    return out


def show(rows: Sequence[dict[str, Any]]) -> str:
    columns = ["shape", "windows", "predicted and real time", "ratio", "memory, the same", "working folder, the same"]
    lines = [
        f"| {' | '.join([*columns, 'served: start, decode'])} |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        served = row["served"]
        answers = f"{served['start_seconds']:.0f} s, {served['tokens_per_s']:.1f} tokens/s"
        lines.append(f"| {row['shape']} | {row['windows']} x {row['seq_len']} | {beside_plan(row)} | {answers} |")
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
