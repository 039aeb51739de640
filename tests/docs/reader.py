"""The folder that a reader of the documents is in: this checkout, and beside it the models and texts that they name.

All that differs from what a reader types is in the tables of this file.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import typer
from compression import ROOT, TINY
from unlisted import write_unlisted

from offline.cli.app import app
from offline.cli.compare import spread

ORIGINALS = ("Mixtral-8x7B-v0.1", "tiny-mixtral")
UNLISTED = "A.X-K1"
"""Of a family that d2moe has no row of."""
COMPRESSED = ("mixtral-d2-40", "tiny-d2-40")
DAMAGED = "damaged"
TEXTS = ("text.txt", "my-text.txt", "calibration.txt")
OTHER_TEXTS = ("other-text.txt", "held-out.txt", "wiki.txt", "code.txt")

WINDOW = 128
"""Tokens that the stand-in for Mixtral says to take at most: `auto` windows are of 2,048 otherwise."""

WORDS = {"M": "moe-svd", "R": "0.2", "8192": str(WINDOW), "24GB": "25MB"}
"""What stands in a document for a value of the reader's choice, or for more than the stand-in takes."""

PORT = "localhost:8000"
"""Where the documents' servers listen; ours take any free port."""


@dataclass(frozen=True)
class Models:
    """The originals of every name above: dense models with short windows, a compressed one, a damaged one, texts."""

    dense: Path
    unlisted: Path
    compressed: Path
    damaged: Path
    text: Path
    other_text: Path

    def by_name(self) -> dict[str, Path]:
        return {
            **dict.fromkeys(ORIGINALS, self.dense),
            UNLISTED: self.unlisted,
            **dict.fromkeys(COMPRESSED, self.compressed),
            DAMAGED: self.damaged,
            **dict.fromkeys(TEXTS, self.text),
            **dict.fromkeys(OTHER_TEXTS, self.other_text),
        }


def make_models(folder: Path, compressed: Path, texts: tuple[Path, Path]) -> Models:
    """Copies with the changes that the tables above name. Paths of models end as the documents show them."""
    dense = shutil.copytree(TINY, folder / "tiny-mixtral")
    config = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps({**config, "max_position_embeddings": WINDOW}))
    unlisted = write_unlisted(folder / UNLISTED, "axk1", moe_intermediate_size=480, max_position_embeddings=WINDOW)
    damaged = shutil.copytree(compressed, folder / DAMAGED)
    (weights,) = damaged.glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    short = folder / "other-text.txt"
    short.write_text(texts[1].read_text(encoding="utf-8")[:8000], encoding="utf-8")
    return Models(dense, unlisted, compressed, damaged, texts[0], short)


def written(arguments: list[str]) -> set[str]:
    """Names in the current folder that a d2moe command is about to make, by the command's own parser."""
    if not arguments or arguments[0] not in (commands := typer.main.get_command(app).commands):
        return set()
    context = commands[arguments[0]].make_context(arguments[0], spread(arguments)[1:], resilient_parsing=True)
    out = context.params.get("out")
    return {Path(out).name} if out else set()


def lay_out(folder: Path, models: Models, without: set[str]) -> None:
    """Links to the checkout's files, and to the models but for those that the commands make themselves."""
    for path in ROOT.iterdir():
        if not path.name.startswith(".") and path.name not in ("build", "dist") and path.suffix != ".egg-info":
            (folder / path.name).symlink_to(path)
    for name, path in models.by_name().items():
        if name not in without:
            (folder / name).symlink_to(path)
