"""Disks that are read-only, full, or changed by another hand: one line and exit code 2, and the run goes on to the same
bytes."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from compression import COMPRESS, TINY, d2moe_here
from hostile import RECIPES, Disk, compress, cut, digests, refused
from processes import Compression


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    folder.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("only root, where mounts are allowed, can make a disk that is read-only for root too")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_read_only_disk_is_refused_before_any_work(olmoe: Path, few_words: Path, tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "ro") as disk:
        refused(compress(olmoe, disk / "out", few_words), str(disk), "not writable")
        refused(compress(olmoe, tmp_path / "out", few_words, "--workdir", disk / "work"), str(disk), "Read-only")
        assert [path.name for path in tmp_path.iterdir()] == ["disk"]


def test_a_page_on_a_read_only_disk_is_refused_before_any_work(texts: tuple[Path, Path], tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "ro") as disk:
        done = d2moe_here(
            "compare", TINY, "--ratio", 0.4, "--text", texts[1], "--calibration", texts[0],
            "--workdir", tmp_path / "work", "--html", disk / "table.html",
        )  # fmt: skip
        refused(done, str(disk), "not writable")
        assert not (tmp_path / "work").exists()


POINTS = 24


@pytest.mark.parametrize(
    "part", [part if part in (1, 9, 17, POINTS) else pytest.param(part, marks=pytest.mark.slow)
             for part in range(1, POINTS + 1)]
)  # fmt: skip
def test_a_disk_that_is_full_at_any_write_costs_nothing(
    part: int, olmoe: Path, few_words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch)
    assert compress(olmoe, tmp_path / "whole", few_words).returncode == 0
    total, out = disk.calls, tmp_path / "out"
    assert total > POINTS
    disk.fill(at=total * part // POINTS)
    done = compress(olmoe, out, few_words)
    refused(done, "No space left", "again")
    assert not out.exists()
    assert not (tmp_path / ".out.partial").exists()
    disk.fill(at=0)
    done = compress(olmoe, out, few_words)
    assert done.returncode == 0, done.stderr
    assert digests(out) == digests(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


BROKEN_OFF = {**RECIPES, "no base": {"base": {"kind": "none"}, "delta": {"share_v": True}}}


@pytest.mark.parametrize(
    "recipe", [name if name == "shared" else pytest.param(name, marks=pytest.mark.slow) for name in BROKEN_OFF]
)
def test_a_run_that_is_broken_off_again_and_again_ends_in_the_same_bytes(
    recipe: str, olmoe: Path, few_words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each time a little later, so that every kind of step is resumed after another one."""
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(BROKEN_OFF[recipe]))
    given, disk = (few_words, "--recipe", tmp_path / "recipe.yaml"), Disk(monkeypatch)
    assert compress(olmoe, tmp_path / "whole", *given).returncode == 0
    out, breaks = tmp_path / "out", 0
    for at in range(11, 200, 3):
        disk.fill(at)
        done = compress(olmoe, out, *given)
        if not done.returncode:
            break
        refused(done, "No space left")
        breaks += 1
    assert breaks >= 4
    assert digests(out) == digests(tmp_path / "whole")


SEED = 7
FULL = 10


def leave(room: int, neighbour: Path) -> None:
    """A file that takes all but `room` bytes of its disk, whatever a run takes meanwhile."""
    with neighbour.open("wb") as file:
        while (free := shutil.disk_usage(neighbour.parent).free) > room:
            with contextlib.suppress(OSError):
                os.posix_fallocate(file.fileno(), 0, file.seek(0, 2) + free - room)
                return


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_real_disk_that_fills_up_at_random_moments(texts: tuple[Path, Path], tmp_path: Path) -> None:
    """A neighbour's file leaves a random part of the room that the run needs, as soon as it has found enough and begun:
    less than it uses at most, so that some write must fail."""
    chance, given = random.Random(SEED), ("--calibration", texts[0], *COMPRESS)
    with mounted(tmp_path / "disk", "size=256m") as disk:
        run, peak = Compression(TINY, disk / "whole", *given), [0]
        assert not run.wait_for(lambda: peak.append(max(peak.pop(), shutil.disk_usage(disk).used)))
        assert run.end().returncode == 0
        whole, places = digests(disk / "whole"), set()
        shutil.rmtree(disk / "whole")
        for number in range(FULL):
            run, room = Compression(TINY, disk / "out", *given), chance.randrange(peak[0])
            assert run.wait_for_work()
            leave(room, disk / "neighbour")
            refused(run.end(), "No space left", "again")
            assert {path.name for path in disk.iterdir()} == {"neighbour", "out.d2moe-work"}
            places.add(left := len(list(run.work.rglob("*"))))
            print(f"{number}: {room:,} of {peak[0]:,} bytes, {left} files written", flush=True)
            (disk / "neighbour").unlink()
            done = Compression(TINY, disk / "out", *given).end()
            assert done.returncode == 0, done.stderr
            assert digests(disk / "out") == whole
            assert [path.name for path in disk.iterdir()] == ["out"]
            shutil.rmtree(disk / "out")
        assert len(places) > FULL / 2


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


SPOIL: dict[str, Callable[[Path], object]] = {
    "cut": lambda path: cut(path, path.stat().st_size // 2),
    "one bit": lambda path: flip(path, -50),
    "lengthened": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
}


WHEN = {"layers/*/facts.safetensors": 0.5, "layers/*/0000*.safetensors": 0.75, "hidden-00000.rows": 0.5}
"""Files, and a share of a run after which they lie there: final tensors are written in its second half."""


@pytest.mark.parametrize("damage", SPOIL)
@pytest.mark.parametrize("pattern", WHEN)
def test_a_damaged_working_folder_is_recognised(
    pattern: str, damage: str, olmoe: Path, few_words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No crash of ours leaves such files: each gets its name when it is whole and on disk. Others may."""
    disk, work = Disk(monkeypatch), tmp_path / "out.d2moe-work"
    assert compress(olmoe, tmp_path / "whole", few_words).returncode == 0
    disk.fill(at=int(WHEN[pattern] * disk.calls))
    refused(compress(olmoe, tmp_path / "out", few_words))
    disk.fill(at=0)
    (victim, *_) = work.glob(pattern)
    SPOIL[damage](victim)
    done = compress(olmoe, tmp_path / "out", few_words)
    if damage == "one bit" and done.returncode == 0:  # in a tensor that nothing is made from: it is never read
        assert digests(tmp_path / "out") == digests(tmp_path / "whole")
        return
    refused(done, str(victim), "fingerprint.json")
    (work / "fingerprint.json").unlink()
    done = compress(olmoe, tmp_path / "out", few_words)
    assert done.returncode == 0, done.stderr
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
