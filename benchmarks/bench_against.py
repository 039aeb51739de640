"""One MoE layer on this CPU by this working tree beside another commit's, call by call in turn.

Each of the two runs in a process of its own, with the same numbers and routes, and waits while the other computes. A
row's ratio is the median over pairs of calls of now / before: below 1 this tree is faster. A table on stdout, all rows
in build/bench/against.json; exit code 1 where the median of all rows is above --most.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from layer_shapes import SCOPES, SHAPES, STORAGES
from places import ROOT

OUT = ROOT / "build" / "bench" / "against.json"
WORKER = """
import json, sys, time
import bench_layer, d2moe_vllm, torch
def answer(value):
    print(json.dumps(value), file=answers, flush=True)
answers, sys.stdout = sys.stdout, sys.stderr
answer([bench_layer.__file__, d2moe_vllm.__file__])
layer = None
for line in sys.stdin:
    asked = json.loads(line)
    if "layer" in asked:
        name, what, scope = asked["layer"]
        layer, shape = None, bench_layer.SHAPES[name]
        torch.manual_seed(0)
        layer = bench_layer.Few(shape, what) if isinstance(what, str) else bench_layer.Ours(shape, what, scope)
        answer(True)
    elif "tokens" in asked:
        torch.manual_seed(asked["tokens"])
        x = torch.randn(asked["tokens"], shape.hidden, dtype=torch.bfloat16)
        ids = torch.stack([torch.randperm(shape.experts)[: shape.top_k] for _ in range(len(x))]).int()
        gates = torch.rand(len(x), shape.top_k)
        layer(x, gates, ids)
        answer(True)
    else:
        started = time.perf_counter()
        layer(x, gates, ids)
        answer(1000 * (time.perf_counter() - started))
"""


class Worker:
    """A tree's own bench_layer, which has stood in two places."""

    def __init__(self, tree: Path) -> None:
        places = [tree / name for name in ("benchmarks", "tests") if (tree / name / "bench_layer.py").exists()]
        if not places:
            sys.exit("that commit has no bench_layer.py; name one from 06bf710 on")
        (place,) = places
        env, pipe = {**os.environ, "PYTHONPATH": f"{tree}{os.pathsep}{place}"}, subprocess.PIPE
        self._process = subprocess.Popen(
            [sys.executable, "-c", WORKER], stdin=pipe, stdout=pipe, env=env, text=True, cwd=tree
        )
        found = [Path(file).parent for file in self._answer()]
        assert found == [place, tree / "d2moe_vllm"], f"imported from {found}, not from {tree}"

    def ask(self, **what: object) -> Any:
        assert self._process.stdin is not None
        print(json.dumps(what), file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        if not (line := self._process.stdout.readline()):
            sys.exit(f"a layer's process ended with exit code {self._process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("commit", help="what to compare with, as git names it")
    parser.add_argument("--shapes", nargs="+", default=["Mixtral-8x7B"], choices=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 256])
    parser.add_argument("--ratios", nargs="*", type=float, default=[0.2, 0.4, 0.6], help="of low-rank deltas")
    parser.add_argument("--scopes", nargs="+", default=list(SCOPES), choices=SCOPES)
    parser.add_argument(
        "--storages", nargs="*", default=[], choices=list(STORAGES), help="of whole matrices, scope off"
    )
    parser.add_argument("--pairs", type=int, default=15, help="calls of each, per row")
    parser.add_argument("--most", type=float, default=1.03, help="largest median of all rows' ratios")
    arguments = parser.parse_args()
    with ExitStack() as stack:
        tree = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "before"
        git = ["git", "-C", str(ROOT), "worktree"]
        added = [*git, "add", "--quiet", "--detach", str(tree), arguments.commit]
        if (done := subprocess.run(added, capture_output=True, text=True, check=False)).returncode:
            parser.error(f"git has no {arguments.commit}: {done.stderr.strip()}")
        stack.callback(subprocess.run, [*git, "remove", "--force", str(tree)], check=True)
        workers = {"before": Worker(tree), "now": Worker(ROOT)}
        for worker in workers.values():
            stack.callback(worker.close)
        rows = measure(workers, arguments)
    overall = statistics.median(row["ratio"] for row in rows)
    print(f"\nmedian of {len(rows)} rows: {overall:.3f}, worst {max(row['ratio'] for row in rows):.3f}")
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps({"commit": arguments.commit, "median": overall, "rows": rows}, indent=1))
    return int(overall > arguments.most)


def measure(workers: dict[str, Worker], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    print(f"{'shape':16} {'what':>21} {'scope':>5} {'tokens':>6} {'before ms':>9} {'now ms':>9} {'now/before':>10}")
    kinds = [
        *itertools.product(arguments.ratios, arguments.scopes),
        *((storage, "off") for storage in arguments.storages),
    ]
    for name, (what, scope) in itertools.product(arguments.shapes, kinds):
        for worker in workers.values():
            worker.ask(layer=(name, what, scope))
        for tokens in arguments.tokens:
            for worker in workers.values():
                worker.ask(tokens=tokens)
            pairs = []
            for number in range(arguments.pairs):
                # Who is first takes turns: what the other left in the caches helps neither.
                order = sorted(workers, reverse=bool(number % 2))
                times = {which: workers[which].ask() for which in order}
                pairs.append((times["before"], times["now"]))
            before, now = (statistics.median(column) for column in zip(*pairs, strict=True))
            change = statistics.median(second / first for first, second in pairs)
            rows.append({"shape": name, "asked": what, "scope": scope, "tokens": tokens, "before_ms": before,
                         "now_ms": now, "ratio": change})  # fmt: skip
            said = what if isinstance(what, str) else f"{what:.0%}"
            print(f"{name:16} {said:>21} {scope:>5} {tokens:6} {before:9.2f} {now:9.2f} {change:10.3f}", flush=True)
    return rows


if __name__ == "__main__":
    sys.exit(main())
