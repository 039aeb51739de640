"""`make quality-real`: a model with pretrained weights, upcycled to a Mixtral and trained apart here; its frontier, and
what the compressions took beside what `d2moe plan` says; tables in docs/quality.md. Needs the texts of ../shared.

Two models: experts that were copies, and experts of which a tenth of the channels was drawn anew before training. They
lie in build/real, where an interrupted run goes on, row by row; --models and --rows do some of it. What was measured is
kept in docs/quality-real.json: on another machine, a model that turns out the same, to the bit, is not measured again.
Options: --help.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

# One thread: seconds and memory of one row can then be compared with another's.
os.environ["OMP_NUM_THREADS"] = "1"

import torch
from measuring import perplexity, put_tables, silent
from places import ROOT, SHARED, commit
from trained_models import FIT, FOLDER, FRESH, LENGTH, TEXTS, make_model, write_texts
from watching import beside_plan, watched_compress

from d2moe_vllm.format.files import read_config
from d2moe_vllm.format.words import describe
from offline.compare.baselines import ROUNDED
from offline.compare.rounding import rounded_expert_bytes, rounded_ratio, rounding_plan, write_rounded
from offline.compare.server import Server
from offline.io.shards import Reader, write_file
from offline.methods.settings import Calibration
from offline.source.dense import open_dense
from offline.source.text import as_text
from offline.source.tokens import choose_windows, open_tokenizer

sys.path.insert(0, str(ROOT / "examples"))
import demo

PAGE = ROOT / "docs" / "quality.md"
RESULTS = ROOT / "docs" / "quality-real.json"
"""What is known of the models and their rows, wherever it was measured."""
DENSE = "dense"
ROUNDINGS = ("gptq-4", "gptq-3", "gptq-2")
OURS: Mapping[str, float] = {"30 %": 0.3, "20 %": 0.2, "15 %": 0.15, "10 %": 0.1}
"""Row -> share of the experts' bytes that is left."""
ROWS: Mapping[str, Sequence[str]] = {
    "copies": (DENSE, "gptq-3", "20 %", "10 %", "gptq-2", "gptq-4", "30 %", "15 %"),
    "fresh": (DENSE, "gptq-3", "20 %"),
}
"""Model -> its rows, what matters most first."""
SERVED = ("copies", "20 %")
CALIBRATED = 64
"""Windows of LENGTH tokens."""
STEPS = 35
"""Of training; 25 minutes of one core with AVX2 alone."""
PROMPT, QUESTION = "The capital of France is", "What is a Python list? Answer in one sentence."


# The rows


@dataclass(frozen=True)
class Job:
    """One row: the dense model, a rounding, or ours at a share of the experts' bytes. made: which of the models of
    this name, by its record."""

    model: str
    row: str
    made: str

    @property
    def key(self) -> str:
        return json.dumps(list(asdict(self).values()))

    @property
    def source(self) -> Path:
        return FOLDER / self.model / "model"

    @property
    def out(self) -> Path:
        """Of ours it stays: 10 to 30 % of the source's 1.4 GB."""
        return FOLDER / self.model / self.row.replace(" %", "").replace(DENSE, "model")

    def measure(self) -> dict[str, Any]:
        """left: share of the experts' bytes; removed: of the whole model's; perplexity on the unseen text; of ours
        `predicted` and `really`, seconds and bytes, as well; date and commit of the measurement."""
        text, count = TEXTS["unseen"]
        found: dict[str, Any] = {"date": date.today().isoformat(), "commit": commit()}
        if self.row == DENSE:
            found |= {"left": 1.0, "removed": 0.0}
            return {**found, "perplexity": perplexity(self.source, text, LENGTH, windows=count)}
        found |= self._rounded() if self.row in ROUNDINGS else self._ours()
        found["perplexity"] = perplexity(self.out, text, LENGTH, windows=count)
        if self.row in ROUNDINGS:
            shutil.rmtree(self.out)  # as large as the source
        return found

    def _rounded(self) -> dict[str, Any]:
        model = open_dense(str(self.source))
        settings = Calibration(windows=CALIBRATED, seq_len=LENGTH)
        windows = choose_windows(open_tokenizer(self.source), as_text(FIT), CALIBRATED, LENGTH, settings.seed)
        folder = self.out.with_name(f"{self.out.name}.work")
        started = time.monotonic()
        shutil.rmtree(self.out, ignore_errors=True)  # of a run that was killed while it measured
        plan = rounding_plan(model, settings, None, "cpu")
        write_rounded(plan, self.row, windows, self.out, folder, torch.device("cpu"), silent())
        return {
            "left": rounded_expert_bytes(model, self.row) / model.expert_bytes,
            "removed": rounded_ratio(model, self.row),
            "stores": f"no base, {ROUNDED[self.row].bits}-bit experts",
            "really": {"seconds": time.monotonic() - started},
        }

    def _ours(self) -> dict[str, Any]:
        """What the compression said is kept beside its result: a run that is killed while it measures needs it."""
        said = self.out.with_name(f"{self.out.name}.json")
        known = json.loads(said.read_text(encoding="utf-8")) if said.exists() and self.out.exists() else {}
        if known.get("key") != self.key:
            said.unlink(missing_ok=True)
            shutil.rmtree(self.out, ignore_errors=True)
            model = open_dense(str(self.source))
            ratio = (1 - OURS[self.row]) * model.expert_bytes / model.reader.nbytes
            given = ["--ratio", f"{ratio:.4f}", "--windows", str(CALIBRATED), "--seq-len", str(LENGTH), "--restart"]
            resumed = self.out.with_name(f"{self.out.name}.d2moe-work").exists()
            found = watched_compress([str(self.source), str(self.out), *given, "--calibration", str(FIT)], self.out)
            known = {"key": self.key, "ratio": ratio, "resumed": resumed}
            known |= {name: found[name] for name in ("predicted", "really", "based")}
            write_file(said, json.dumps(known) + "\n")
        config = read_config(self.out)
        return {
            **known,
            "left": config.expert_bytes / (config.layer_bytes * len(config.layers)),
            "removed": 1 - Reader(self.out).nbytes / config.source.bytes,
            "stores": describe(config),
        }


def jobs_of(model: str, made: str, rows: Sequence[str]) -> list[Job]:
    return [Job(model, row, made) for row in ROWS[model] if row in rows]


def digest(record: Mapping[str, Any]) -> str:
    """Which model a record is of: one that was trained again, in the same steps, may be the same."""
    return str(record["sha256"])[:12]


def answers(job: Job) -> dict[str, str]:
    """What the row's checkpoint, served, says to PROMPT and QUESTION; kept."""
    log, env = FOLDER / "server.log", {"VLLM_CPU_KVCACHE_SPACE": "1"}
    started = time.monotonic()
    with Server(job.out, ["--max-model-len", "512"], log=log, env=env, timeout=1800) as server:
        up = time.monotonic() - started
        completion, answer = demo.ask(server, job.out, PROMPT, QUESTION, tokens=60)
    return {"completion": completion, "answer": answer, "start_seconds": f"{up:.0f}"}


# The tables

Records = Mapping[str, Mapping[str, Any]]
"""Model -> its record, of those that were made."""
Results = Mapping[tuple[str, str], Mapping[str, Any]]
"""(model, row) -> what was measured, of those that were."""


def models_table(records: Records) -> str:
    """What the models are."""
    heads = ("model", "tokens of training", "minutes of it", "perplexity of the source, at the start, trained",
             "the same on the held-out text", "apart: gate", "up", "down", "SHA-256")  # fmt: skip
    lines = []
    for name, record in records.items():
        done = record["training"]
        values = [", ".join(f"{record[when][text]:.2f}" for when in ("source", "start", "trained")) for text in TEXTS]
        apart = [f"{one['mean']:.3f} ({one['least']:.3f} to {one['most']:.3f})" for one in record["apart"].values()]
        lines.append(
            [f"`{name}`", f"{done['tokens']:,}", f"{done['seconds'] / 60:.0f}", *values, *apart, f"`{digest(record)}`"]
        )
    return _table(heads, lines, len(FRESH), texts=1)


def frontier_table(results: Results) -> str:
    """Quality and what was chosen, by model and size, the largest first."""
    lines = []
    for model in ROWS:
        dense = results.get((model, DENSE))
        for row in sorted((row for one, row in results if one == model), key=lambda row: -results[model, row]["left"]):
            found = results[model, row]
            name = row if row == DENSE else f"`{row}`" if row in ROUNDINGS else f"**ours, {row}**"
            loss = "" if dense is None else f"{100 * (found['perplexity'] / dense['perplexity'] - 1):+.1f} %"
            shares = [f"{100 * found[what]:.1f} %" for what in ("left", "removed")]
            values = [f"{found['perplexity']:.2f}", "" if row == DENSE else loss, found.get("stores", "")]
            lines.append([f"`{model}`", name, *shares, *values])
    heads = ("model", "row", "experts' bytes left", "removed of the whole", "perplexity", "loss", "stores")
    return _table(heads, lines, sum(map(len, ROWS.values())))


def plan_table(results: Results) -> str:
    """What ours took, beside what `d2moe plan` says."""
    lines = []
    for (model, row), found in results.items():
        if row in OURS:
            again = " (the last of several runs)" if found["resumed"] else ""
            lines.append([f"`{model}`", f"ours, {row}{again}", beside_plan(dict(found))])
    heads = ("model", "row", "predicted and real time", "ratio", "memory, the same", "working folder, the same")
    return _table(heads, lines, sum(row in OURS for rows in ROWS.values() for row in rows))


def _table(heads: Sequence[str], lines: Sequence[Sequence[str]], every: int, texts: int = 2) -> str:
    """The table's rows, of which `every` many are wanted, and how many are not there yet; the first `texts` columns are
    words, all others numbers."""
    head = [f"| {' | '.join(heads)} |", f"|{'---|' * texts}{'---:|' * (len(heads) - texts)}"]
    found = [*head, *(f"| {' | '.join(cells)} |" for cells in lines)] if lines else []
    missing = every - len(lines)
    note = [f"{missing} of {every} rows not measured yet."] if missing else []
    return "\n".join([*found, *([""] if found and note else []), *note])


def answers_text(found: Mapping[str, str] | None) -> str:
    model, row = SERVED
    if found is None:
        return f"`{model}` at {row} has not been served yet."
    lines = [f"- {PROMPT!r}: {found['completion']!r}", f"- {QUESTION!r}: {found['answer']!r}"]
    return "\n".join([f"`{model}` at {row}, by `vllm serve`, the likeliest tokens:", "", *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = list(dict.fromkeys(row for rows in ROWS.values() for row in rows))
    parser.add_argument("--models", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--rows", nargs="*", default=every, choices=every)
    parser.add_argument("--steps", type=int, default=STEPS, help="to train each model (default %(default)d)")
    parser.add_argument("--print", action="store_true", help="print the tables, and leave docs/quality.md as it is")
    options = parser.parse_args()
    if not SHARED.is_dir():
        raise SystemExit("make quality-real needs the texts of ../shared")
    FOLDER.mkdir(parents=True, exist_ok=True)
    write_texts()
    for model in options.models:
        if wanted := [row for row in options.rows if row in ROWS[model]]:
            record = make_model(model, options.steps)
            _keep("models", model, record)
            for job in jobs_of(model, digest(record), wanted):
                if job.key not in _kept("rows"):
                    with ProcessPoolExecutor(1) as pool:  # whose memory is its own
                        found = pool.submit(job.measure).result()
                    _keep("rows", job.key, found)
                    print(f"{job.key}: {found}", file=sys.stderr, flush=True)
            job = Job(*SERVED, digest(record))
            if job.model == model and job.row in wanted and job.key not in _kept("answers"):
                _keep("answers", job.key, answers(job))
    records = {name: _kept("models")[name] for name in ROWS if name in _kept("models")}
    jobs = [job for name, record in records.items() for job in jobs_of(name, digest(record), ROWS[name])]
    results = {(job.model, job.row): _kept("rows")[job.key] for job in jobs if job.key in _kept("rows")}
    served = [job.key for job in jobs if (job.model, job.row) == SERVED]
    answered = next((_kept("answers")[key] for key in served if key in _kept("answers")), None)
    tables = {
        "real-models": models_table(records),
        "real-frontier": frontier_table(results),
        "real-plan": plan_table(results),
        "real-answers": answers_text(answered),
    }
    if options.print:
        print("\n\n".join(tables.values()))
        return
    put_tables(PAGE, tables)
    print(f"tables written to {PAGE.relative_to(ROOT)}")


def _kept(what: str) -> dict[str, Any]:
    """Of RESULTS: records of models, rows, answers."""
    content = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    found: dict[str, Any] = content.get(what, {})
    return found


def _keep(what: str, key: str, value: Any) -> None:
    content = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    content.setdefault(what, {})[key] = value
    write_file(RESULTS, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
