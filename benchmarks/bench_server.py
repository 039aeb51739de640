"""A whole vLLM server on this CPU: a dense model beside its compressed versions, by vLLM's own benchmark commands.

The models are synthetic (synthetic_mixtral.py): Mixtral-like, about 3 GB dense, with random weights. Of each pair,
dense and compressed, two `vllm serve` run at once on the same cores, compiled, in bfloat16; `vllm bench serve` loads
them in turn, so that both see the same machine; then `vllm bench throughput` runs on each in turn. A table on stdout;
everything in build/bench/server.json, where rows of other pairs stay as long as the workload is the same. Whole
matrices of few bits (--storages), by every backend that is asked for (--backends), follow the low-rank ones.

KV tokens: what fits into the memory that the dense server takes, its own KV cache included.
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
from collections.abc import Iterable, Iterator
from pathlib import Path
from re import search
from typing import Any, NamedTuple

import psutil
from layer_shapes import STORAGES
from synthetic_mixtral import Size, write_compressed, write_dense, write_packed

from offline.compare.server import Server

BENCH = Path(__file__).resolve().parent.parent / "build" / "bench"
CORES = ",".join(map(str, sorted(os.sched_getaffinity(0))))
ENVIRONMENT = {
    # vLLM's automatic choice leaves a core to the front end, which on two cores halves what computes.
    "VLLM_CPU_OMP_THREADS_BIND": CORES,
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
FIGURES = {
    "output_tokens_per_s": "output_throughput",
    "ttft_ms": "median_ttft_ms",
    "tpot_ms": "median_tpot_ms",
}
"""Our names of what `vllm bench serve` reports."""


Rows = dict[str, list[dict[str, Any]]]
"""By kind: memory, serve, throughput."""


class Pair(NamedTuple):
    """A compressed model that is compared with the dense one."""

    ratio: float
    scope: str
    folder: Path
    storage: str = "bfloat16"
    backend: str = "cpu"

    @property
    def key(self) -> dict[str, Any]:
        return {"ratio": self.ratio, "scope": self.scope, "storage": self.storage, "backend": self.backend}


class Bench:
    """Runs pairs; see the module. folder: for logs and what vLLM's commands report."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.arguments, self.folder = arguments, folder
        self.logs = 0

    def server(self, model: Path, backend: str | None = None) -> Server:
        a = self.arguments
        options = ["--dtype", "bfloat16", "--max-model-len", "2048", "--no-enable-prefix-caching"]
        options += ["--served-model-name", "model", *(["--enforce-eager"] if a.eager else [])]
        options += _by(backend)
        return Server(model, options, log=self._log(f"serve-{model.name}"), env=ENVIRONMENT)

    def _log(self, name: str) -> Path:
        self.logs += 1
        return self.folder / f"{self.logs:02d}-{name}.log"

    def _run(self, name: str, *command: str) -> dict[str, Any]:
        """What one of vLLM's benchmark commands reports. Raises RuntimeError with its output where it fails."""
        report = self._log(name).with_suffix(".json")
        place = ["--save-result", "--result-dir", str(self.folder), "--result-filename", report.name]
        place = ["--output-json", str(report)] if command[0] == "throughput" else place
        vllm = str(Path(sys.executable).with_name("vllm"))
        command = (vllm, "bench", *command, *place)
        done = subprocess.run(command, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, check=False)
        if done.returncode or not report.exists():
            raise RuntimeError(
                f"{' '.join(command)} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}"
            )
        return json.loads(report.read_text())

    def _random(self, prompts: int) -> list[str]:
        a = self.arguments
        lengths = ["--random-input-len", str(a.input_len), "--random-output-len", str(a.output_len)]
        return ["--dataset-name", "random", *lengths, "--num-prompts", str(prompts)]

    def serve(self, server: Server, model: Path, concurrency: int, warm_up: bool) -> dict[str, float]:
        """One `vllm bench serve`: FIGURES of two waves of requests, more where there is but one at a time."""
        prompts = max(2 * concurrency, 3)
        found = self._run(
            f"bench-serve-{model.name}", "serve", "--port", str(server.port), "--host", "127.0.0.1",
            "--model", "model", "--tokenizer", str(model), *self._random(prompts), "--ignore-eos",
            "--max-concurrency", str(concurrency), "--num-warmups", str(concurrency if warm_up else 0),
            # Sampled, as greedy text of a random model soon repeats itself, and then uses few experts.
            "--temperature", "1", "--disable-tqdm", "--ready-check-timeout-sec", "0",
            "--percentile-metrics", "ttft,tpot",
        )  # fmt: skip
        if (found["completed"], found["total_output_tokens"]) != (prompts, prompts * self.arguments.output_len):
            raise RuntimeError(f"requests failed, see {server.log}")
        return {ours: found[theirs] for ours, theirs in FIGURES.items()}

    def throughput(self, model: Path, backend: str | None = None) -> dict[str, float]:
        """One `vllm bench throughput`: output tokens per second, all requests at once."""
        a = self.arguments
        found = self._run(
            f"bench-throughput-{model.name}", "throughput", "--model", str(model), "--trust-remote-code",
            *self._random(a.prompts), "--dtype", "bfloat16", "--max-model-len", "2048", "--no-enable-prefix-caching",
            "--disable-detokenize", *(["--enforce-eager"] if a.eager else []), *_by(backend),
        )  # fmt: skip
        return {"output_tokens_per_s": a.prompts * a.output_len / found["elapsed_time"]}

    def serve_pairs(self, dense: Path, pairs: list[Pair]) -> Iterator[Rows]:
        """Of each pair memory, then one round after another at every concurrency."""
        if not self.arguments.rounds:
            return
        with self.server(dense) as reference:
            fresh = Resident.of(dense, reference)
            for pair in pairs:
                with self.server(pair.folder, pair.backend) as server:
                    memory = compare_memory(fresh, Resident.of(pair.folder, server))
                    yield {"memory": [{**pair.key, **memory}]}
                    yield from self._rounds(pair, {dense: reference, pair.folder: server})

    def _rounds(self, pair: Pair, servers: dict[Path, Server]) -> Iterator[Rows]:
        for concurrency in self.arguments.concurrency:
            for number in range(self.arguments.rounds):
                both = [self.serve(server, model, concurrency, number == 0) for model, server in servers.items()]
                yield {"serve": [{**pair.key, "concurrency": concurrency, "rounds": [both]}]}

    def throughput_pairs(self, dense: Path, pairs: list[Pair]) -> Iterator[Rows]:
        """One round of all pairs after another."""
        for pair in self.arguments.throughput_rounds * pairs:
            both = [self.throughput(dense), self.throughput(pair.folder, pair.backend)]
            yield {"throughput": [{**pair.key, "requests": self.arguments.prompts, "rounds": [both]}]}


def _by(backend: str | None) -> list[str]:
    """vLLM's arguments for it."""
    return [] if backend is None else ["--additional-config", json.dumps({"d2moe": {"backend": backend}})]


class Resident(NamedTuple):
    """What a server that has not been asked anything yet has in memory.

    checkpoint: bytes of weight files; resident: of the process that computes; kv_tokens: its KV cache.
    """

    checkpoint: int
    resident: int
    kv_tokens: int

    @classmethod
    def of(cls, model: Path, server: Server) -> Resident:
        parent = psutil.Process(server.process.pid)
        worker = max(process.memory_info().rss for process in (parent, *parent.children(recursive=True)))
        found = search(r"KV cache size: ([\d,]+) tokens", server.log.read_text(errors="replace"))
        if found is None:
            raise RuntimeError(f"{server.log} does not tell the size of the KV cache")
        weights = sum(file.stat().st_size for file in model.glob("*.safetensors"))
        return cls(weights, worker, int(found[1].replace(",", "")))


def compare_memory(dense: Resident, ours: Resident) -> dict[str, Any]:
    per_token = int(ENVIRONMENT["VLLM_CPU_KVCACHE_SPACE"]) * 2**30 / dense.kv_tokens
    more = int((dense.resident - ours.resident) / per_token)
    return {
        "dense": dense._asdict(),
        "ours": {**ours._asdict(), "kv_tokens": ours.kv_tokens + more},
        "bytes_per_kv_token": per_token,
    }


def compare(row: dict[str, Any]) -> dict[str, Any]:
    """The row with medians and spread of its rounds of (dense, ours); the speed-up is of output tokens per second."""
    rounds, result = row["rounds"], dict(row)
    for number, name in enumerate(("dense", "ours")):
        values = {figure: [both[number][figure] for both in rounds] for figure in rounds[0][number]}
        result[name] = {figure: statistics.median(of) for figure, of in values.items()}
        result[name] |= {f"{figure}_min_max": [min(of), max(of)] for figure, of in values.items()}
    speedups = [ours["output_tokens_per_s"] / dense["output_tokens_per_s"] for dense, ours in rounds]
    result["speedup"], result["speedup_min_max"] = statistics.median(speedups), [min(speedups), max(speedups)]
    return result


def merged(old: dict[str, Any], workload: dict[str, Any], new: Rows) -> dict[str, Any]:
    """The results with new rows, their rounds added to those that are there of the same pair.

    Of the same workload only: rows of another are left out.
    """
    result: dict[str, Any] = old if old.get("workload") == workload else {"workload": workload}
    for kind, rows in new.items():
        table = {_key(row): row for row in result.get(kind, [])}
        for row in rows:
            before = table.get(_key(row), {}).get("rounds", [])
            measured = "rounds" in row
            table[_key(row)] = compare({**row, "rounds": [*before, *row["rounds"]]}) if measured else row
        result[kind] = [table[key] for key in sorted(table)]
    return result


def without(results: dict[str, Any], pairs: Iterable[Pair]) -> dict[str, Any]:
    """The results without these pairs' rows."""
    gone = [_identity(pair.key) for pair in pairs]
    kinds = {kind: rows for kind, rows in results.items() if kind != "workload"}
    kept = {kind: [row for row in rows if _identity(row) not in gone] for kind, rows in kinds.items()}
    return {**results, **kept}


def _identity(row: dict[str, Any]) -> tuple[Any, ...]:
    """Of its pair; results of before there were storages have none."""
    return row["ratio"], row["scope"], row.get("storage", "bfloat16"), row.get("backend", "cpu")


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return *_identity(row), row.get("concurrency", row.get("requests", 0))


def _name(row: dict[str, Any]) -> str:
    ratio, scope, storage, backend = _identity(row)
    return f"{ratio:5.0%} {scope:>5} {storage + ('' if backend == 'cpu' else f', {backend}'):32}"


def show(results: dict[str, Any]) -> Iterable[str]:
    """The lines of the tables; each cell dense -> ours."""

    def arrow(row: dict[str, Any], figure: str, unit: float = 1) -> str:
        return f"{row['dense'][figure] / unit:9.1f} -> {row['ours'][figure] / unit:<9.1f}"

    titles = f"{'tokens/s':^22} {'speed-up':^18} {'TTFT ms':^22} {'TPOT ms':^22}"
    yield f"{'ratio':>5} {'scope':>5} {'stored':32} {'conc.':>5} {titles}"
    for row in [*results.get("serve", []), *results.get("throughput", [])]:
        low, high = row["speedup_min_max"]
        figures = [arrow(row, figure) for figure in ("ttft_ms", "tpot_ms") if figure in row["ours"]]
        load = row.get("concurrency", "all")
        speed = f"{row['speedup']:5.2f} ({low:4.2f}-{high:4.2f})"
        yield " ".join([f"{_name(row)} {load:>5}", arrow(row, "output_tokens_per_s"), speed, *figures])
    for row in results.get("memory", []):
        kv = f"{row['dense']['kv_tokens']:,} -> {row['ours']['kv_tokens']:,}"
        yield f"{_name(row)} resident GB {arrow(row, 'resident', 1e9)} KV tokens {kv}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratios", nargs="*", type=float, default=[0.4, 0.6, 0.8], help="in scope off")
    parser.add_argument("--batch-ratios", nargs="*", type=float, default=[0.8], help="in scope batch")
    parser.add_argument("--storages", nargs="*", default=["int4", "int2"], choices=STORAGES, help="of whole matrices")
    parser.add_argument("--backends", nargs="+", default=["cpu", "cpu-int8"], help="for these")
    parser.add_argument("--concurrency", nargs="+", type=int, default=[16, 1])
    parser.add_argument("--rounds", type=int, default=3, help="of `vllm bench serve`, 0 to leave it out")
    parser.add_argument(
        "--throughput-rounds", type=int, default=2, help="of `vllm bench throughput`, 0 to leave it out"
    )
    parser.add_argument("--more", action="store_true", help="add to the rounds of earlier runs, not replace them")
    parser.add_argument("--input-len", type=int, default=32, help="tokens")
    parser.add_argument("--output-len", type=int, default=128, help="tokens")
    parser.add_argument("--prompts", type=int, default=64, help="of `vllm bench throughput`, all at once")
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("--size", type=lambda text: Size(*map(int, text.split(","))), default=Size(),
                        help="of the model: hidden,intermediate,experts,layers")  # fmt: skip
    parser.add_argument("--folder", type=Path, default=BENCH, help="for models and results")
    arguments = parser.parse_args()
    asked = [(ratio, "off") for ratio in arguments.ratios] + [(ratio, "batch") for ratio in arguments.batch_ratios]
    dense = write_dense(arguments.folder / "models", arguments.size)
    pairs = [Pair(ratio, scope, write_compressed(dense, ratio, scope)) for ratio, scope in asked]
    weight = sum(file.stat().st_size for file in dense.glob("*.safetensors"))
    for storage in arguments.storages:
        packed = write_packed(dense, *STORAGES[storage])
        gone = round(1 - sum(file.stat().st_size for file in packed.glob("*.safetensors")) / weight, 3)
        pairs += [Pair(gone, "off", packed, storage, backend) for backend in arguments.backends]
    names = ("input_len", "output_len", "eager")
    workload = {"model": arguments.size.name, "cores": CORES, **{name: getattr(arguments, name) for name in names}}
    out = arguments.folder / "server.json"
    results = json.loads(out.read_text()) if out.exists() else {}
    results = results if arguments.more else without(results, pairs)
    with tempfile.TemporaryDirectory(prefix="bench-server-") as folder:
        bench = Bench(arguments, Path(folder))
        for rows in itertools.chain(bench.serve_pairs(dense, pairs), bench.throughput_pairs(dense, pairs)):
            results = merged(results, workload, rows)
            out.write_text(json.dumps(results, indent=1))
    print(*show(results), sep="\n")


if __name__ == "__main__":
    main()
