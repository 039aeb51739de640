"""Damage that no structure shows: flipped bits, and NaN with a right hash. `d2moe verify` finds each and names it."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from compression import TINY, d2moe_here
from edits import accept, add_records
from synthetic import every_variant, write_checkpoint

SEED = "d2moe-payload-1"
PARAMETERS = 4_396_160
"""Of the bundled model."""
NOT_FINITE = {"BF16": (b"\xc0\x7f", b"\x80\x7f", b"\x80\xff", b"\xff\xff"), "F32": (b"\0\0\xc0\x7f", b"\0\0\x80\xff")}
"""NaN and the two infinities, little-endian, by dtype."""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written") / "checkpoint"
    write_checkpoint(folder, every_variant())
    add_records(folder, parameters=PARAMETERS)
    assert verify(folder, "--source", TINY) == []
    return folder


def verify(folder: Path, *arguments: object) -> list[str]:
    """The problems that it finds; its exit code agrees."""
    done = d2moe_here("verify", folder, *arguments, "--json")
    problems = json.loads(done.stdout)["problems"]
    assert done.returncode == (2 if problems else 0)
    return problems


def damaged_copy(written: Path, folder: Path, file: str, content: bytes) -> Path:
    """The other files are linked."""
    shutil.copytree(written, folder, copy_function=os.link)
    (folder / file).unlink()
    (folder / file).write_bytes(content)
    return folder


def flip(written: Path, folder: Path, chance: random.Random) -> tuple[str, str]:
    """One to eight bits of one weight file, anywhere in it; returns what has to be named and said."""
    file = chance.choice(sorted(path.name for path in written.glob("*.safetensors")))
    content = bytearray((written / file).read_bytes())
    for place in chance.sample(range(len(content)), chance.choice((1, 1, 1, 2, 8))):
        content[place] ^= 1 << chance.randrange(8)
    damaged_copy(written, folder, file, bytes(content))
    return file, "SHA-256"


def no_number(written: Path, folder: Path, chance: random.Random) -> tuple[str, str]:
    """NaN or infinity in one value of a tensor, and the manifest agrees with the file."""
    file = chance.choice(sorted(path.name for path in written.glob("*.safetensors")))
    content = bytearray((written / file).read_bytes())
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    name = chance.choice([name for name, entry in header.items() if entry.get("dtype") in NOT_FINITE])
    value = chance.choice(NOT_FINITE[header[name]["dtype"]])
    start, end = header[name]["data_offsets"]
    place = 8 + size + start + len(value) * chance.randrange((end - start) // len(value))
    content[place : place + len(value)] = value
    damaged_copy(written, folder, file, bytes(content))
    manifest = (folder / "d2moe_manifest.json").read_text()
    (folder / "d2moe_manifest.json").unlink()
    (folder / "d2moe_manifest.json").write_text(manifest)
    accept(folder)
    return name, "NaN or infinite"


@pytest.mark.parametrize("cases", [6, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("damage", [flip, no_number])
def test_verify_finds_every_damaged_payload(
    cases: int, damage: Callable[[Path, Path, random.Random], tuple[str, str]], written: Path, tmp_path: Path
) -> None:
    for number in range(cases):
        name, said = damage(written, tmp_path / "damaged", random.Random(f"{SEED}/{number}"))
        problems = verify(tmp_path / "damaged")
        assert any(name in problem and said in problem for problem in problems), (number, name, problems)
        shutil.rmtree(tmp_path / "damaged")
