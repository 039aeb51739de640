"""`d2moe compare`: methods and baselines at several ratios, on one calibration, as rows of one table.

Every row is remembered in the working folder as soon as it is known, together with what made it, and is not computed
again. What a method writes is measured and then removed, unless it is to be kept.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import traceback
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import d2moe_vllm
from d2moe_vllm.format.config import MANIFEST_FILE, CheckpointError
from d2moe_vllm.format.files import read_config
from offline.checkpoint.inspect import count_parameters, routed_bytes
from offline.compare.baselines import FEWER_EXPERTS, RECIPES, ROUNDED, fewer_experts, write_fewer
from offline.compare.frontier import frontier
from offline.compare.rewriting import RECORD_FILE
from offline.compare.rounding import rounded_ratio, rounding_plan, write_rounded
from offline.compare.settings import Settings
from offline.compare.state import RowState, own_folder
from offline.compare.throughput import WORKLOAD, ServingError, serve_speed, version
from offline.errors import InputError, UnreachableError, reason
from offline.io.memory import forget_peak, peak_memory
from offline.io.progress import Steps
from offline.io.shards import Reader
from offline.plan.make import make_plan
from offline.plan.plan import Plan
from offline.plan.recipe import Recipe
from offline.run import compress as jobs
from offline.run.evaluate import Measure, evaluate
from offline.run.usage import count_usage
from offline.source.dense import DenseModel, open_dense
from offline.source.text import as_text
from offline.source.tokens import Windows, choose_windows, open_tokenizer
from offline.work.workdir import fingerprint

ROWS = "rows"
SOURCE = "source"
"""Name of the first row: the model as it is."""
ANY_RATIO = 0.5
"""A recipe has to have one."""
FIGURES = (
    "stored_ratio", "bytes", "parameters", "expert_bytes", "expert_share", "counted", "perplexity", "seconds",
    "cpu_seconds", "peak_memory_bytes", "served", "path", "reachable", "failed",
)  # fmt: skip
"""Of a row; null where there is none."""
EXPECTED = (InputError, CheckpointError, MemoryError, torch.OutOfMemoryError)
"""Failures of a row that say what is wrong by themselves; others come with a traceback."""


@dataclass
class Comparison:
    """One run of the command, with all that its rows share. Raises InputError for settings that make no sense."""

    settings: Settings
    console: Console
    model: DenseModel = field(init=False)
    windows: Windows = field(init=False)
    texts: dict[str, Path] = field(init=False)
    hashes: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        settings = self.settings
        settings.check()
        self.model = open_dense(settings.source, settings.revision)
        self.texts = settings.labels()
        self.hashes = {name: as_text(path).sha256() for name, path in self.texts.items()}
        recipe = self._resolved(SOURCE, ANY_RATIO)
        calibration = recipe.calibration
        self.seq_len = int(calibration.seq_len)
        reads = open_tokenizer(self.model.folder, settings.tokenizer)
        for note in (*self.model.remarks, *reads.notes):
            self._say(note)
        self.windows = choose_windows(reads, settings.calibration, calibration.windows, self.seq_len, calibration.seed)
        self.device = jobs.choose_device(settings.device)
        self.folder = settings.folder()
        source = self.model.folder
        if self.folder == source or self.folder in source.parents or source in self.folder.parents:
            raise InputError(f"--workdir {self.folder} and the source lie inside one another; choose another --workdir")

    def run(self) -> dict[str, Any]:
        """The table: what the source is, what was measured on, and a row for each method and ratio."""
        names = [*self.settings.methods, *self.settings.baselines]
        wanted = [(name, ratio) for ratio in self.settings.ratios for name in names if name not in ROUNDED]
        wanted += [(name, rounded_ratio(self.model, name)) for name in names if name in ROUNDED]
        # Every refusal comes before any work.
        refused = {one: self._refused(*one) for one in wanted}
        if all(row and row["failed"] for row in refused.values()):
            raise InputError(next(row["failed"] for row in refused.values() if row))
        with own_folder(self.folder):
            self._say(f"working folder: {self.folder}")
            for left in self.folder.glob("count-*"):  # activations of a run that was killed
                shutil.rmtree(left)
            rows = [self._source_row()]
            for number, one in enumerate(wanted, start=1):
                self._say(f"{number} of {len(wanted)}: {one[0]} at {100 * one[1]:g} %")
                rows.append(refused[one] or self._attempted(*one))
        calibration = self._resolved(SOURCE, ANY_RATIO).calibration
        return {
            "source": {
                "name": self.model.name, "parameters": self.model.reader.parameters, "bytes": self.model.reader.nbytes,
            },
            "calibration": {"tokens_sha256": self.windows.sha256, "windows": calibration.windows,
                            "seq_len": self.seq_len, "seed": calibration.seed},
            "texts": [{"name": name, "sha256": digest} for name, digest in self.hashes.items()],
            "seq_len": self.seq_len,
            "machine": self._fingerprint(SOURCE, 0.0)["machine"],
            "serving": self._serving,
            "tool": d2moe_vllm.__version__,
            "workdir": str(self.folder),
            "rows": rows,
            "frontier": frontier(rows, list(self.texts)),
        }  # fmt: skip

    # What a row is made from

    def _resolved(self, name: str, ratio: float) -> Recipe:
        shape = self.model.shape
        recipe = self.settings.recipe(name, ratio)
        return recipe.resolve(
            shape.model_hidden_size, self.model.max_positions, shape.num_experts, shape.intermediate_size
        )

    def _refused(self, name: str, ratio: float) -> dict[str, Any] | None:
        """The row of a ratio that a method cannot reach, or of a model that it cannot compress; None where it can.
        Raises InputError for a ratio that makes no sense."""
        recipe, row = self.settings.recipe(name, ratio), self._row(name, ratio)
        try:
            if name in FEWER_EXPERTS:
                fewer_experts(self.model, ratio)
            elif name in ROUNDED:
                self._rounding_plan()
            else:
                make_plan(self.model, recipe, memory=self.settings.memory, device=self.device.type)
        except UnreachableError as error:
            return {**row, "reachable": error.most}
        except InputError as error:
            return {**row, "failed": reason(error)}
        return None

    def _rounding_plan(self) -> Plan:
        calibration = self._resolved(SOURCE, ANY_RATIO).calibration
        return rounding_plan(self.model, calibration, self.settings.memory, self.device.type)

    @cached_property
    def _serving(self) -> dict[str, Any] | None:
        """How speed is measured."""
        if self.settings.serve is None:
            return None
        settings = {name: value for name, value in sorted(os.environ.items()) if name.startswith(("VLLM_", "D2MOE_"))}
        return {"vllm": version(), "arguments": list(self.settings.serve), "environment": settings, **WORKLOAD}

    def _fingerprint(self, name: str, ratio: float) -> dict[str, Any]:
        """Everything that a row's figures depend on but the texts."""
        recipe = self._resolved(name, ratio or ANY_RATIO)
        machine = {"device": self.device.type, "memory": self.settings.memory}
        found = fingerprint(self.model, recipe.to_json(), self.windows.sha256, machine)
        # What is remembered has to have all figures that this version tells.
        return json.loads(json.dumps({"row": name, "figures": FIGURES, **found}))

    # Rows

    def _row(self, name: str, ratio: float) -> dict[str, Any]:
        """A row without figures.

        expert_bytes, expert_share: of the routed experts, without files' headers, and their share of the source's;
        counted: what codes and scales take, of a checkpoint that holds rounded numbers in the source's dtype;
        reachable: the highest ratio, where the one asked for cannot be reached; resumed: seconds and memory are those
        of the last of several runs, and the whole took more; failed: why figures are missing.
        """
        kind = SOURCE if name == SOURCE else self.settings.kind(name)
        return {"name": name, "kind": kind, "ratio": ratio, **dict.fromkeys(FIGURES), "resumed": False}

    def _source_row(self) -> dict[str, Any]:
        state = self._state(SOURCE, 0.0)
        state.row = self._row(SOURCE, 0.0) | self._stored(self.model.reader)
        return self._with_figures(state, self.model.folder)

    def _attempted(self, name: str, ratio: float) -> dict[str, Any]:
        """The row; where it cannot be made, what is known of it and why: the other rows must not be lost with it."""
        try:
            return self._measured(name, ratio)
        except Exception as error:
            if not isinstance(error, EXPECTED):
                self._say(traceback.format_exc())
            self._say(f"{name} at {100 * ratio:g} % failed: {reason(error)}")
            state = self._state(name, ratio)
            known = {text: state.perplexities.get(key) for text, key in self._keys.items()}
            found = {"perplexity": known} if any(known.values()) else {}
            return self._row(name, ratio) | state.row | found | {"failed": reason(error)}

    def _measured(self, name: str, ratio: float) -> dict[str, Any]:
        state = self._state(name, ratio)
        out = self.folder / f"{name}-{ratio}"
        missing = [key for key in self._keys.values() if key not in state.perplexities]
        missing += [key for key in self._served_keys if key not in state.served]
        if not state.row or ((missing or self.settings.keep) and not out.is_dir()):
            state.forget()
            if out.exists():  # of an earlier run with other settings
                shutil.rmtree(out)
            resumed = self._begun(out).exists()
            forget_peak()
            started, computing = time.monotonic(), time.process_time()
            self._write(name, ratio, out)
            made = {
                "seconds": round(time.monotonic() - started, 1),
                "cpu_seconds": round(time.process_time() - computing, 1),
                "peak_memory_bytes": peak_memory(),
            }
            state.row = self._row(name, ratio) | made | self._stored(Reader(out)) | {"resumed": resumed}
            state.save()
        row = self._with_figures(state, out)
        if not self.settings.keep and out.exists():
            shutil.rmtree(out)
        return row | {"path": str(out) if out.exists() else None}

    def _stored(self, reader: Reader) -> dict[str, Any]:
        """What lies on disk, and what codes and scales would take where numbers are only rounded."""
        found: dict[str, Any] = {"bytes": reader.nbytes, "parameters": reader.parameters, "counted": None}
        record, source = reader.folder / RECORD_FILE, self.model
        if (reader.folder / MANIFEST_FILE).exists():
            config = read_config(reader.folder)
            found["parameters"] = count_parameters(reader, config)
            experts = routed_bytes(config, len(source.shape.layers))
        elif record.exists() and (counted := json.loads(record.read_text(encoding="utf-8")).get("counted")):
            experts = counted.pop("expert_bytes")
            found["counted"] = {**counted, "ratio": 1 - counted["bytes"] / source.reader.nbytes}
        else:
            experts = (source if reader is source.reader else open_dense(str(reader.folder))).expert_bytes
        found |= {"expert_bytes": experts, "expert_share": experts / source.expert_bytes}
        return found | {"stored_ratio": 1 - reader.nbytes / source.reader.nbytes}

    def _begun(self, out: Path) -> Path:
        """The working folder of one compression; there before it starts where an earlier run was interrupted."""
        return self.folder / f"{out.name}.work"

    def _write(self, name: str, ratio: float, out: Path) -> None:
        settings = self.settings
        if name in ROUNDED:
            plan = self._rounding_plan()
            write_rounded(plan, name, self.windows, out, self._begun(out), self.device, self.console)
            return
        if name not in FEWER_EXPERTS:
            jobs.compress(
                str(self.model.folder),
                out,
                settings.recipe(name, ratio),
                settings.calibration,
                tokenizer=settings.tokenizer,
                workdir=self._begun(out),
                restart=True,
                memory=settings.memory,
                device=settings.device,
                console=self.console,
            )
            return
        layers = self.model.shape.layers
        with Steps((max(layers) + 1) * len(self.windows.tokens) + len(layers), self.console) as steps:
            usage = count_usage(self.model, self.windows.tokens, self.device, self.folder, steps)
            write_fewer(self.model, name, fewer_experts(self.model, ratio), usage, out, steps)

    @cached_property
    def _keys(self) -> dict[str, str]:
        """Label of a text -> under which its perplexity is remembered."""
        return {name: f"{digest}-{self.seq_len}" for name, digest in self.hashes.items()}

    @cached_property
    def _served_keys(self) -> list[str]:
        """Under which speed is remembered, if it is wanted."""
        return [json.dumps(self._serving, sort_keys=True)] if self._serving else []

    def _with_figures(self, state: RowState, folder: Path) -> dict[str, Any]:
        """The row with what is measured on its checkpoint, and remembered: perplexities, and speed if wanted."""

        def steps(total: float) -> Steps:
            return Steps(total, self.console)

        for name, key in self._keys.items():
            if key not in state.perplexities:
                self._say(f"perplexity on {name}")
                measure = Measure(as_text(self.texts[name]), self.seq_len, tokenizer=self.settings.tokenizer)
                found = evaluate(str(folder), measure, None, steps)
                state.perplexities[key] = found.perplexity
                state.save()
        row = self._row(state.row["name"], state.row["ratio"]) | state.row
        row["perplexity"] = {name: state.perplexities[key] for name, key in self._keys.items()}
        for key in self._served_keys:
            try:
                if key not in state.served:
                    state.served[key] = self._speed(state.row, folder)
                    state.save()
                row["served"] = state.served[key]
            except ServingError as error:
                self._say(f"not served: {error}")
                row["failed"] = f"not served: {error}"
        return row

    def _speed(self, row: dict[str, Any], folder: Path) -> dict[str, Any]:
        self._say("starting vllm serve")
        if self.device.type == "cuda":  # the server needs what this process only keeps in reserve
            torch.cuda.empty_cache()
        log = self.folder / f"{row['name']}-{row['ratio']}.serve.log"
        plugin = row["kind"] == "method" or row["name"] in RECIPES
        return serve_speed(folder, plugin=plugin, arguments=self.settings.serve or (), log=log)

    def _state(self, name: str, ratio: float) -> RowState:
        path = self.folder / ROWS / f"{name}-{ratio}.json"
        return RowState(path, self._fingerprint(name, ratio))

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)


def compare(settings: Settings, console: Console) -> dict[str, Any]:
    """Measure every method and baseline at every ratio. Raises InputError or CheckpointError."""
    return Comparison(settings, console).run()
