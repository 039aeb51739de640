"""A thousand damaged checkpoints, each refused at load in bounded time and memory, in one line that names a file or a
tensor and says how to mend it. `pytest -s` shows the table of docs/reliability.md.

Case number N is `random.Random(f"{SEED}/N")`, whatever the cases before it: D2MOE_FUZZ_FIRST=N starts there.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from damage import KINDS, Victim
from engine import run_engine
from soundness import CONFIG, INDEX, MANIFEST, is_sound, snapshot
from synthetic import mixed, write_checkpoint

from d2moe_vllm.format.config import CheckpointError
from d2moe_vllm.format.files import check_checkpoint
from d2moe_vllm.serving.quantization import D2MoEConfig

SEED = "d2moe-1"
FIRST = int(os.environ.get("D2MOE_FUZZ_FIRST", "0"))
DAMAGED = 1000
MEMORY = 32 << 20
"""Bytes by which a refusal may raise the process's peak; the checkpoints have 5 to 8 MB."""
SECONDS = 1.0
"""Of processor time."""
MENDS = ("again", "restore", "install the version")


@pytest.fixture(scope="module")
def originals(checkpoint: Path, variants: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Bases and deltas in every layer; every variant of the format; MoBE's tensors and a dense layer."""
    folder = tmp_path_factory.mktemp("mixed") / "mixed"
    write_checkpoint(folder, mixed())
    return [checkpoint, variants, folder]


@dataclass
class Tally:
    damaged: Counter[str] = field(default_factory=Counter)
    sound: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    memory: int = 0

    def table(self) -> str:
        rows = [f"| {kind} | {self.damaged[kind]} | {self.sound[kind]} |" for kind in KINDS]
        total = f"| all | {self.damaged.total()} | {self.sound.total()} |"
        return "\n".join([*rows, total, f"slowest {self.seconds:.2f} s, highest peak {self.memory / 2**20:.1f} MiB"])


def load(folder: Path) -> None:
    """What happens before vLLM makes a model: its front-end reads config.json, and hands us the section and the folder.

    What transformers cannot read never reaches us; our own reader of config.json, which `d2moe` uses, says it then.
    """
    config = folder / CONFIG
    try:
        readable = config.is_file() and config.stat().st_size < 1 << 24
        section: Any = json.loads(config.read_bytes())["quantization_config"] if readable else None
        ours = isinstance(section, dict) and section["quant_method"] == "d2moe"
    except (OSError, ValueError, RecursionError, LookupError, TypeError):
        ours = False
    if ours:
        D2MoEConfig.from_config(section).maybe_update_config(str(folder))
    else:
        check_checkpoint(folder)


def peak() -> int:
    """Bytes; the kernel's own high-water mark of resident memory, Rust's and C's allocations included."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


def measured(read: Callable[[], object], tally: Tally) -> None:
    Path("/proc/self/clear_refs").write_text("5")  # the mark falls to what is resident now
    before, began = peak(), time.process_time()
    try:
        read()
    finally:
        tally.seconds = max(tally.seconds, time.process_time() - began)
        tally.memory = max(tally.memory, peak() - before)


def one_line_that_helps(message: str) -> bool:
    named = (CONFIG, INDEX, MANIFEST, ".safetensors", "quantization_config", "model.", "lm_head")
    return (
        message.isprintable()
        and len(message) < 2500
        and any(name in message for name in named)
        and any(words in message for words in MENDS)
    )


def one_case(number: int, originals: list[tuple[Path, dict[str, Any]]], folder: Path, tally: Tally) -> None:
    chance = random.Random(f"{SEED}/{number}")
    (original, content), kind = chance.choice(originals), chance.choice(list(KINDS))
    victim = Victim(original, folder)
    KINDS[kind](victim, chance)
    where = f"case {number}, {kind}, of {original.name}"
    for read in (load, check_checkpoint):
        try:
            measured(lambda read=read: read(folder), tally)
            refusal = None
        except CheckpointError as error:
            refusal = str(error)
        except BaseException as error:
            raise AssertionError(f"{where}: {type(error).__name__}: {str(error)[:300]}") from error
        sound = is_sound(content, folder)
        assert (refusal is None) == sound, f"{where}: sound {sound}, but {refusal}"
        assert refusal is None or one_line_that_helps(refusal), f"{where}: {refusal}"
    (tally.sound if sound else tally.damaged)[kind] += 1


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("damaged", [100, pytest.param(DAMAGED, marks=pytest.mark.slow)])
def test_every_damaged_checkpoint_is_refused(
    damaged: int, originals: list[Path], tmp_path: Path, record_testsuite_property: Callable[[str, object], None]
) -> None:
    """Cases are drawn until so many are damaged. What is sound all the same, by `soundness.is_sound`, which is not the
    readers' own judgement, has to load."""
    tally, number = Tally(), FIRST
    sound = [(original, snapshot(original)) for original in originals]
    for original in originals:  # also imports what reading needs, before anything is measured
        load(original)
    while tally.damaged.total() < damaged:
        one_case(number, sound, tmp_path / "victim", tally)
        shutil.rmtree(tmp_path / "victim")
        number += 1
    print(f"\n{number} cases\n{tally.table()}")
    record_testsuite_property("table", tally.table())
    assert tally.seconds < SECONDS
    assert tally.memory < MEMORY
    assert min(tally.damaged[kind] for kind in KINDS) >= damaged / len(KINDS) / 4


IN_THE_ENGINE = (
    "index: paths",
    "header: dtype, shape, offsets, name",
    "tensors in the wrong file, or in two",
    "columns and indices",
    "manifest: a field missing, added or wrong",
)


@pytest.mark.slow
@pytest.mark.parametrize("kind", IN_THE_ENGINE)
def test_the_engine_refuses_in_the_same_words(kind: str, originals: list[Path], tmp_path: Path) -> None:
    """A real engine's start: it ends, and its log has the line."""
    chance = random.Random(f"{SEED}/engine/{kind}")
    original, folder = chance.choice(originals), tmp_path / "victim"
    content, sound = snapshot(original), True
    while sound:
        shutil.rmtree(folder, ignore_errors=True)
        KINDS[kind](Victim(original, folder), chance)
        sound = is_sound(content, folder)
    with pytest.raises(CheckpointError) as refusal:
        check_checkpoint(folder)
    code, log, _ = run_engine(tmp_path, folder, {}, llm={"enforce_eager": True})
    assert code != 0
    assert str(refusal.value) in log
