"""`d2moe compare`: methods and baselines at several ratios, on one calibration, as rows of one table.

Every row is remembered in the working folder as soon as it is known, together with what made it, and is not computed
again. What a method writes is measured and then removed, unless it is to be kept.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console

import d2moe_vllm
from offline import jobs
from offline.baselines import BASELINES, FEWER_EXPERTS, RECIPES, fewer_experts, write_fewer
from offline.calibration import Windows, choose_windows, read_text, tokenize
from offline.card import METHODS
from offline.comparestate import RowState, own_folder
from offline.errors import InputError, UnreachableError
from offline.evaluation import evaluate
from offline.memory import forget_peak, peak_memory
from offline.plan import make_plan
from offline.progress import Steps
from offline.recipe import Recipe, load_recipe
from offline.shards import Reader
from offline.source import DenseModel, open_dense
from offline.usage import count_usage
from offline.workdir import fingerprint

ROWS = "rows"
SOURCE = "source"
"""Name of the first row: the model as it is."""
ANY_RATIO = 0.5
"""A recipe has to have one."""


@dataclass(frozen=True)
class Settings:
    """What to compare. ratios: of stored bytes; seq_len: tokens per window, of the calibration and of the texts (None:
    2048, or the model's limit if less); memory: bytes to stay within; keep: what was written stays in `workdir`."""

    source: str
    methods: Sequence[str]
    baselines: Sequence[str]
    ratios: Sequence[float]
    texts: Sequence[Path]
    calibration: Path
    workdir: Path
    windows: int | None = None
    seq_len: int | None = None
    seed: int | None = None
    revision: str | None = None
    memory: int | None = None
    device: str = "auto"
    keep: bool = False

    def recipe(self, name: str, ratio: float) -> Recipe:
        """Of a method, or of a baseline: of one that is no recipe only ratio and calibration count."""
        chosen = {"method": name} if name in self.methods else RECIPES.get(name, {})
        calibration = {"windows": self.windows, "seq_len": self.seq_len, "seed": self.seed}
        return load_recipe(
            None, {"ratio": ratio, **chosen, **{f"calibration.{key}": value for key, value in calibration.items()}}
        )


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
        _check(settings)
        self.model = open_dense(settings.source, settings.revision)
        self.texts = _labels(settings.texts)
        self.hashes = {name: hashlib.sha256(read_text(path).encode()).hexdigest() for name, path in self.texts.items()}
        recipe = self._resolved(SOURCE, ANY_RATIO)
        calibration = recipe.calibration
        self.seq_len = int(calibration.seq_len)
        tokens = tokenize(self.model.folder, read_text(settings.calibration))
        self.windows = choose_windows(tokens, calibration.windows, self.seq_len, calibration.seed)
        self.device = jobs.choose_device(settings.device)
        self.folder = settings.workdir.expanduser().resolve()
        source = self.model.folder
        if self.folder == source or self.folder in source.parents or source in self.folder.parents:
            raise InputError(f"--workdir {self.folder} and the source lie inside one another; choose another --workdir")

    def run(self) -> dict[str, Any]:
        """The table: what the source is, what was measured on, and a row for each method and ratio."""
        names = [*self.settings.methods, *self.settings.baselines]
        wanted = [(name, ratio) for ratio in self.settings.ratios for name in names]
        # Every refusal comes before any work.
        most = {one: self._most(*one) for one in wanted}
        with own_folder(self.folder):
            for left in self.folder.glob("count-*"):  # activations of a run that was killed
                shutil.rmtree(left)
            rows = [self._source_row()]
            for number, (name, ratio) in enumerate(wanted, start=1):
                self._say(f"{number} of {len(wanted)}: {name} at {100 * ratio:g} %")
                reachable = most[name, ratio]
                if reachable is not None:
                    rows.append({**_row(name, self._kind(name), ratio), "reachable": reachable})
                else:
                    rows.append(self._measured(name, ratio))
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
            "tool": d2moe_vllm.__version__,
            "workdir": str(self.folder),
            "rows": rows,
        }  # fmt: skip

    # What a row is made from

    def _kind(self, name: str) -> str:
        return "method" if name in self.settings.methods else "baseline"

    def _resolved(self, name: str, ratio: float) -> Recipe:
        shape = self.model.shape
        recipe = self.settings.recipe(name, ratio)
        return recipe.resolve(shape.hidden_size, self.model.max_positions, shape.num_experts)

    def _most(self, name: str, ratio: float) -> float | None:
        """None, or the highest ratio that a method reaches where that is less than the one asked for."""
        try:
            if name in FEWER_EXPERTS:
                fewer_experts(self.model, ratio)
            else:
                make_plan(self.model, self.settings.recipe(name, ratio), memory=self.settings.memory)
        except UnreachableError as error:
            return error.most
        return None

    def _fingerprint(self, name: str, ratio: float) -> dict[str, Any]:
        """Everything that a row's figures depend on but the texts."""
        recipe = self._resolved(name, ratio or ANY_RATIO)
        machine = {"device": self.device.type, "memory": self.settings.memory}
        found = fingerprint(self.model, recipe, self.windows.sha256, machine)
        return json.loads(json.dumps({"row": name, **found}))

    # Rows

    def _source_row(self) -> dict[str, Any]:
        row = _row(SOURCE, SOURCE, 0.0) | _stored(self.model.reader, self.model.reader.nbytes)
        state = self._state(SOURCE, 0.0)
        state.row = row
        return self._with_perplexity(state, self.model.folder)

    def _measured(self, name: str, ratio: float) -> dict[str, Any]:
        state = self._state(name, ratio)
        out = self.folder / f"{name}-{ratio}"
        missing = [key for key in self._keys.values() if key not in state.perplexities]
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
            stored = _stored(Reader(out), self.model.reader.nbytes)
            state.row = _row(name, self._kind(name), ratio) | made | stored | {"resumed": resumed}
            state.save()
        row = self._with_perplexity(state, out)
        if not self.settings.keep and out.exists():
            shutil.rmtree(out)
        return row | {"path": str(out) if out.exists() else None}

    def _begun(self, out: Path) -> Path:
        """The working folder of one compression; there before it starts where an earlier run was interrupted."""
        return self.folder / f"{out.name}.work"

    def _write(self, name: str, ratio: float, out: Path) -> None:
        settings = self.settings
        if name not in FEWER_EXPERTS:
            jobs.compress(
                str(self.model.folder),
                out,
                settings.recipe(name, ratio),
                settings.calibration,
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

    def _with_perplexity(self, state: RowState, folder: Path) -> dict[str, Any]:
        def steps(total: float) -> Steps:
            return Steps(total, self.console)

        for name, key in self._keys.items():
            if key not in state.perplexities:
                self._say(f"perplexity on {name}")
                found = evaluate(str(folder), self.texts[name], self.seq_len, None, steps)
                state.perplexities[key] = found.perplexity
                state.save()
        return {**state.row, "perplexity": {name: state.perplexities[key] for name, key in self._keys.items()}}

    def _state(self, name: str, ratio: float) -> RowState:
        path = self.folder / ROWS / f"{name}-{ratio}.json"
        return RowState(path, self._fingerprint(name, ratio))

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)


def _row(name: str, kind: str, ratio: float) -> dict[str, Any]:
    """A row without figures. reachable: the highest ratio, where the one asked for cannot be reached; resumed: seconds
    and memory are those of the last of several runs, and the whole took more."""
    figures = ("stored_ratio", "bytes", "parameters", "perplexity", "seconds", "peak_memory_bytes", "path", "reachable")
    return {"name": name, "kind": kind, "ratio": ratio, **dict.fromkeys(figures), "resumed": False}


def _stored(reader: Reader, source_bytes: int) -> dict[str, Any]:
    return {
        "bytes": reader.nbytes,
        "parameters": reader.parameters,
        "stored_ratio": 1 - reader.nbytes / source_bytes,
    }


def _check(settings: Settings) -> None:
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise InputError("compare runs as one process; start it without torchrun")
    for option, given in (("ratio", settings.ratios), ("text", settings.texts)):
        if not given:
            raise InputError(f"compare needs at least one --{option}")
    if not settings.methods and not settings.baselines:
        raise InputError("compare needs at least one --method or --baseline")
    for option, names, known in (
        ("method", settings.methods, METHODS), ("baseline", settings.baselines, BASELINES),
    ):  # fmt: skip
        if unknown := [name for name in names if name not in known]:
            raise InputError(f"--{option} {unknown[0]} is not one of {', '.join(known)}")
    for option, many in (
        ("ratio", settings.ratios), ("method", settings.methods), ("baseline", settings.baselines),
        ("text", settings.texts),
    ):  # fmt: skip
        if twice := next((one for one, two in itertools.combinations(many, 2) if one == two), None):
            raise InputError(f"--{option} {twice} is given twice")


def _labels(texts: Sequence[Path]) -> dict[str, Path]:
    """Files by their names, by their paths where two have one name."""
    names = [path.name for path in texts]
    return {str(path) if names.count(path.name) > 1 else path.name: path for path in texts}


def compare(settings: Settings, console: Console) -> dict[str, Any]:
    """Measure every method and baseline at every ratio. Raises InputError or CheckpointError."""
    return Comparison(settings, console).run()
