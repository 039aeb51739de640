"""`d2moe compress` killed at random moments, some runs again and again: nothing half under the final name, ever, and
resumed to the end the same bytes as an undisturbed run. `pytest -s` shows where every kill fell."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from compression import COMPRESS, TINY
from hostile import digests
from processes import Compression

SEED = 7
KILLS = {"d2": 30, "mobe": 6, "moe-svd": 6}
RECIPES = {
    "d2": "",
    "mobe": "method: mobe\nmobe: {max_steps: 60}\n",
    "moe-svd": "method: moe-svd\nmoe_svd: {share_v: refit}\n",
}


@dataclass
class Task:
    """What to compress, the bytes it has to end in, and how long the work takes."""

    arguments: tuple[object, ...]
    whole: dict[str, str]
    seconds: float

    def start(self, out: Path) -> Compression:
        return Compression(TINY, out, *self.arguments)


@pytest.fixture(params=[pytest.param(method, marks=pytest.mark.slow) for method in KILLS])
def method(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def task(method: str, texts: tuple[Path, Path], tmp_path: Path) -> Task:
    (tmp_path / "recipe.yaml").write_text(RECIPES[method])
    arguments = ("--calibration", texts[0], *COMPRESS, "--recipe", tmp_path / "recipe.yaml")
    run = Compression(TINY, tmp_path / "whole", *arguments)
    assert begins(run)
    began = time.monotonic()
    done = run.end()
    assert done.returncode == 0, done.stderr
    return Task(arguments, digests(tmp_path / "whole"), time.monotonic() - began)


def begins(run: Compression) -> bool:
    """Waits until it writes what it works on: before that it measures, half of so short a run, how fast the machine is.
    False where it ended before."""
    since = time.time()

    def writes() -> bool:
        try:
            return any(path.stat().st_mtime > since for path in run.work.rglob("[!.]*.*") if path.suffix != ".json")
        except FileNotFoundError:  # a file that got its name meanwhile
            return True

    return run.wait_for(writes)


def where(work: Path) -> str:
    """The newest file in a working folder, and how many there are."""
    files = sorted((path for path in work.rglob("*") if path.is_file()), key=lambda path: path.stat().st_mtime_ns)
    return f"{len(files)} files, newest {files[-1].relative_to(work)}" if files else "no files"


def kill_at(task: Task, out: Path, moment: float) -> str | None:
    """Runs, or resumes, and kills `moment` seconds after the work began; says where, None if it was over by then."""
    run = task.start(out)
    if not begins(run):
        return None
    time.sleep(moment)
    if not run.kill():
        return None
    if out.exists():  # killed while tidying up: what has the name is whole
        assert digests(out) == task.whole
        return "after the result had its name"
    return where(run.work)


@pytest.mark.timeout(3600)
def test_killed_at_random_moments_it_ends_in_the_same_bytes(
    method: str, task: Task, tmp_path: Path, record_testsuite_property: Callable[[str, object], None]
) -> None:
    """The kills of one run share its duration out: a run that is killed four times is killed early four times."""
    chance, found, runs = random.Random(SEED), [], 0
    while len(found) < KILLS[method]:
        out, runs = tmp_path / f"run-{runs}", runs + 1
        for kills in [chance.choice((1, 1, 2, 4))] * 4:
            place = kill_at(task, out, chance.random() * task.seconds / kills)
            print(f"{method} run {runs}: {place}", flush=True)
            found += [place] if place else []
            if place is None or out.exists() or kills == 1:
                break
        if not out.exists():
            done = task.start(out).end()
            assert done.returncode == 0, done.stderr
            assert not out.with_name(out.name + ".d2moe-work").exists()
        assert digests(out) == task.whole
        assert not list(tmp_path.glob(".*.partial"))
    record_testsuite_property(f"{method}: kills", len(found))
    record_testsuite_property(f"{method}: runs", runs)
    assert len(set(found)) > KILLS[method] / 3, "the kills fell on too few places to prove anything"
