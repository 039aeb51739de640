"""The models of `make quality-real`: made, trained and measured once, in build/real."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import train_experts
import upcycled
from measuring import perplexity
from places import ROOT, SHARED

from offline.io.shards import write_file
from offline.source.text import as_text
from offline.source.tokens import choose_windows, open_tokenizer

sys.path.insert(0, str(ROOT / "examples"))
import language_reference

FOLDER = ROOT / "build" / "real"
FRESH: Mapping[str, float] = {"copies": 0.0, "fresh": 0.1}
"""Model -> share of an expert's channels that is drawn anew before training."""
LENGTH = 256
MEASURED, HELD_OUT = 60, 16
"""Windows of LENGTH tokens, drawn by seed 0: of wikitext2-valid, of the held-out text."""
TRAINED = 256
"""Tokens of a window of training."""
TRAINING_BYTES = 16_000_000_000
"""Of memory that training takes; 15.95 GB were measured."""
FIT, REST = FOLDER / "fit.txt", FOLDER / "held-out.txt"
TEXTS: Mapping[str, tuple[Path, int]] = {
    "unseen": (SHARED / "data" / "wikitext2-valid.txt", MEASURED),
    "held-out": (REST, HELD_OUT),
}
"""Name -> file, and how many windows of it are measured."""


def write_texts() -> None:
    """The calibration text in two: what is trained and calibrated on, and what is held out."""
    text = (SHARED / "data" / "calib.txt").read_text(encoding="utf-8")
    cut = int(len(text) * 0.85)
    FIT.write_text(text[:cut], encoding="utf-8")
    REST.write_text(text[cut:], encoding="utf-8")


def training_texts() -> list[str]:
    """Documentation, Python's language reference, and source code of its standard library, to half a million
    characters. The last two differ between Python versions."""
    library = sorted(Path(os.__file__).parent.glob("*.py"))
    code = "\n".join(file.read_text(encoding="utf-8") for file in library)
    return [FIT.read_text(encoding="utf-8"), language_reference.split()[0], code[:500_000]]


def make_model(name: str, steps: int) -> dict[str, Any]:
    """The model's record, made and trained unless it is there: perplexities of the source, at the start and at the end,
    how it was trained, how far its experts are apart, and the digest of its weights."""
    folder = FOLDER / name
    if known := record_of(name):
        return known
    available = available_memory(Path("/proc/meminfo").read_text(encoding="utf-8"))
    if available < TRAINING_BYTES:
        raise SystemExit(
            f"training takes {TRAINING_BYTES:,} bytes of memory, {available:,} are free: end what needs them"
        )
    dense, tokenizer = upcycled.read_dense(upcycled.download(FOLDER / "source"))
    model = upcycled.upcycle(dense, fresh=FRESH[name])
    start = folder / "start"
    before = folder / "start.json"
    if not before.exists():
        folder.mkdir(parents=True, exist_ok=True)
        if not start.exists():
            upcycled.save(model, tokenizer, start)
        found = {"source": dense_perplexities(dense, start), "start": perplexities(start)}
        write_file(before, json.dumps(found) + "\n")
    del dense
    windows = train_experts.choose_windows(tokenizer, training_texts(), TRAINED)
    state = folder / "training.pt"
    done = train_experts.train(model, windows, steps, state, lambda text: print(f"{name}, {text}", flush=True))
    if not (folder / "model").exists():
        upcycled.save(model, tokenizer, folder / "model")
    del model
    content = {
        **json.loads(before.read_text(encoding="utf-8")),
        "trained": perplexities(folder / "model"),
        "training": {**asdict(done), "windows": len(windows)},
        "sha256": weights_sha256(folder / "model"),
        "apart": {role: asdict(apart) for role, apart in upcycled.distances(folder / "model").items()},
    }
    write_file(folder / "trained.json", json.dumps(content, indent=1) + "\n")
    state.unlink()
    shutil.rmtree(start, ignore_errors=True)
    return content


def available_memory(meminfo: str) -> int:
    """Bytes that a new process can have, from what Linux says in /proc/meminfo."""
    line = next(line for line in meminfo.splitlines() if line.startswith("MemAvailable:"))
    return int(line.split()[1]) * 1024


def weights_sha256(model: Path) -> str:
    """Of its files of weights, in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted(model.glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def perplexities(folder: Path) -> dict[str, float]:
    return {name: perplexity(folder, text, LENGTH, windows=count) for name, (text, count) in TEXTS.items()}


def dense_perplexities(dense: Any, folder: Path) -> dict[str, float]:
    """Of transformers' own dense model, on the very windows that others are measured on; folder: with its tokenizer."""
    tokenizer, found = open_tokenizer(folder), {}
    for name, (text, count) in TEXTS.items():
        tokens = choose_windows(tokenizer, as_text(text), count, LENGTH, seed=0).tokens
        with torch.no_grad():
            losses = [float(dense(one[None], labels=one[None]).loss) for one in tokens]
        found[name] = math.exp(sum(losses) / len(losses))
    return found


def record_of(name: str) -> dict[str, Any] | None:
    """The model's record; None where it was not made yet."""
    path = FOLDER / name / "trained.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
