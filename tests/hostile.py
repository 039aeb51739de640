"""What the tests of hostile surroundings share: a small original to spoil, how to compress it, what a refusal is."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from compression import d2moe_here
from safetensors.torch import load_file, save_file
from torch import Tensor

WINDOWS = ("--windows", "4", "--seq-len", "32")
RECIPES: dict[str, dict[str, Any]] = {
    "default": {},
    "factors": {"bits": 16},
    "regmean": {"base": {"merge": "regmean", "sparsity": 0}},
    "svd base, asvd": {"base": {"kind": "svd", "merge": "frequency"}, "delta": {"method": "asvd"}},
    "ties, prune": {"base": {"merge": "ties"}, "delta": {"method": "prune"}},
    "shared": {"delta": {"share_v": True, "distinct_u": 2, "trim": 2}, "calibration": {"inputs": "compressed"}},
    "merged": {"delta": {"distinct_u": 3, "shrinkage": 0}},
    "adaptive": {"allocation": "adaptive", "base": {"kind": "auto"}, "delta": {"shrinkage": 0}},
    "moe-svd": {"method": "moe-svd", "delta": {"distinct_u": 5}, "moe_svd": {"share_v": "refit"}},
    "mobe": {"method": "mobe", "mobe": {"max_steps": 30}},
    "mobe, plain": {"method": "mobe", "mobe": {"max_steps": 30, "weighting": "none", "function": "tanh"}},
}


def edit(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def compress(source: Path, out: Path, text: Path, *more: object) -> subprocess.CompletedProcess[str]:
    """In the paper's world, unless a recipe says what is to be done."""
    bits = () if "--recipe" in more else ("--bits", "16")
    given = ("--ratio", "0.08", "--calibration", text, *WINDOWS, *bits)
    return d2moe_here("compress", source, out, *given, *more)


def refused(done: subprocess.CompletedProcess[str], *fragments: str) -> None:
    """Exit 2, and the last line says why; before it there may be progress."""
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    said = [line for line in done.stderr.splitlines() if line.startswith("d2moe: ")]
    assert said == done.stderr.splitlines()[-1:], done.stderr
    for fragment in fragments:
        assert fragment in said[0]


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def finite_result(source: Path, out: Path) -> dict[str, Any]:
    """The checkpoint is sound, and so are its errors; its statistics."""
    done = d2moe_here("verify", out, "--source", source, "--json")
    found = json.loads(done.stdout)
    assert (done.returncode, found["problems"]) == (0, [])
    stats = json.loads((out / "d2moe_stats.json").read_text(), parse_constant=pytest.fail)
    for layer in stats["layers"].values():
        assert all(0 <= error < 2 for errors in layer["relative_error"].values() for error in errors)
    return stats


def cut(path: Path, keep: int) -> None:
    path.write_bytes(path.read_bytes()[:keep])


class Disk:
    """Counts what reserves or syncs bytes on disk, and is full at one such call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls, self.full_at = 0, 0
        for name in ("posix_fallocate", "fsync"):
            monkeypatch.setattr(os, name, self._wrap(getattr(os, name)))

    def _wrap(self, call: Callable[..., None]) -> Callable[..., None]:
        def counted(*arguments: Any) -> None:
            self.calls += 1
            if self.calls == self.full_at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            call(*arguments)

        return counted

    def fill(self, at: int) -> None:
        """Full at the `at`-th call from now; 0: never."""
        self.calls, self.full_at = 0, at
