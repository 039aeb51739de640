"""What `d2moe compare` is asked to do."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from offline.compare.baselines import BASELINES, RECIPES
from offline.compare.throughput import check_vllm
from offline.errors import InputError
from offline.io.naming import labels
from offline.methods import METHODS
from offline.plan.recipe import Recipe, load_recipe
from offline.source.text import Text
from offline.source.tokens import OWN, TokenizerChoice


@dataclass(frozen=True)
class Settings:
    """What to compare. ratios: of stored bytes; seq_len: tokens per window, of the calibration and of the texts (None:
    2048, or the model's limit if less); tokenizer: what reads them; memory: bytes to stay within; keep: what was
    written stays in `folder()`; serve: speed is measured too, with these further arguments of `vllm serve`, None for
    not at all."""

    source: str
    methods: Sequence[str]
    baselines: Sequence[str]
    ratios: Sequence[float]
    texts: Sequence[Path]
    calibration: Text
    tokenizer: TokenizerChoice = OWN
    workdir: Path | None = None
    windows: int | None = None
    seq_len: int | None = None
    seed: int | None = None
    revision: str | None = None
    memory: int | None = None
    device: str = "auto"
    keep: bool = False
    serve: Sequence[str] | None = None

    def recipe(self, name: str, ratio: float) -> Recipe:
        """Of a method, or of a baseline: of one that is no recipe only ratio and calibration count."""
        chosen = {"method": name} if name in self.methods else RECIPES.get(name, {})
        calibration = {"windows": self.windows, "seq_len": self.seq_len, "seed": self.seed}
        return load_recipe(None, {"ratio": ratio, "calibration": calibration, **chosen})

    def kind(self, name: str) -> str:
        return "method" if name in self.methods else "baseline"

    def check(self) -> None:
        """Raises InputError for settings that make no sense."""
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise InputError("compare runs as one process; start it without torchrun")
        for option, given in (("ratio", self.ratios), ("text", self.texts)):
            if not given:
                raise InputError(f"compare needs at least one --{option}")
        if not self.methods and not self.baselines:
            raise InputError("compare needs at least one --method or --baseline")
        for option, names, known in (
            ("method", self.methods, METHODS), ("baseline", self.baselines, BASELINES),
        ):  # fmt: skip
            if unknown := [name for name in names if name not in known]:
                raise InputError(f"--{option} {unknown[0]} is not one of {', '.join(known)}")
        for option, many in (
            ("ratio", self.ratios), ("method", self.methods), ("baseline", self.baselines), ("text", self.texts),
        ):  # fmt: skip
            if twice := next((one for one, two in itertools.combinations(many, 2) if one == two), None):
                raise InputError(f"--{option} {twice} is given twice")
        if self.serve is not None:
            check_vllm()

    def folder(self) -> Path:
        """Where rows are remembered: `workdir`, or else a folder in the user's cache, called after the model and after
        what all rows are made from, so that the same command finds it from anywhere."""
        if self.workdir is not None:
            return self.workdir.expanduser().resolve()
        source = Path(self.source).expanduser()
        made_from = [
            str(source.resolve()) if source.is_dir() else self.source, self.revision,
            [str(path.resolve()) for path in self.calibration.paths],
            self.windows, self.seq_len, self.seed, self.memory, self.device,
        ]  # fmt: skip
        digest = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().resolve()
        return cache / "d2moe" / "compare" / f"{source.resolve().name}-{digest[:12]}"

    def labels(self) -> dict[str, Path]:
        """Texts by what they are called in the table."""
        return dict(zip(labels(self.texts), self.texts, strict=True))
