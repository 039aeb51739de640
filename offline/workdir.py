"""State of a run on disk: what survives a kill, and what an input's change makes worthless.

Every file appears under its final name only when it is complete, so what exists can be trusted.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

import d2moe_vllm
from offline.errors import InputError
from offline.recipe import Recipe
from offline.shards import write_file, write_tensors
from offline.source import DenseModel

FINGERPRINT_FILE = "fingerprint.json"
MARKER_FILE = ".d2moe-work"
"""Lock, and sign that a folder is ours."""
CREATED = "created"
"""In the marker of a folder that was not there before."""


def fingerprint(model: DenseModel, recipe: Recipe, calibration_sha256: str) -> dict[str, Any]:
    """Everything the result's bytes depend on. Weight files count by size, time and header: hashing
    hundreds of gigabytes at every start would cost more than it protects."""
    files = {}
    for file in model.reader.files:
        path = model.folder / file
        with path.open("rb") as opened:
            header = opened.read(8)
            header += opened.read(int.from_bytes(header, "little"))
        stat = path.stat()
        files[file] = [stat.st_size, stat.st_mtime_ns, hashlib.sha256(header).hexdigest()]
    return {
        "tool": d2moe_vllm.__version__,
        "source": {"config": hashlib.sha256(json.dumps(model.config).encode()).hexdigest(), "files": files},
        "recipe": recipe.model_dump(),
        "calibration": calibration_sha256,
        "machine": {
            "torch": torch.__version__,
            "transformers": importlib.metadata.version("transformers"),
            "threads": torch.get_num_threads(),
            "cpu": [platform.machine(), torch.backends.cpu.get_cpu_capability()],
        },
    }


class WorkDir:
    """The working folder of one run, locked against a second one.

    expected: the fingerprint; restart: start over where it differs in the machine alone, which is otherwise refused
    (a run of days is not thrown away because it was resumed with another thread count).
    Raises InputError where the folder holds something else, cannot be used, or another run uses it.
    """

    def __init__(self, path: Path, expected: dict[str, Any], *, restart: bool = False) -> None:
        self.path = path
        self.invalidated: list[str] = []
        marker = path / MARKER_FILE
        try:
            if path.is_dir() and not marker.exists() and any(path.iterdir()):
                raise InputError(f"working folder {path} is not empty and not ours; choose another --workdir")
            created = not path.exists()
            path.mkdir(parents=True, exist_ok=True)
            self._lock = marker.open("a+")
        except OSError as error:
            raise InputError(f"working folder {path} cannot be used ({error.strerror}); choose another") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"another run is using {path}; wait for it, or choose another --workdir") from None
        if created:
            self._lock.write(CREATED)
            self._lock.flush()
        self._check(expected, restart)
        (path / "layers").mkdir(exist_ok=True)

    def _check(self, expected: dict[str, Any], restart: bool) -> None:
        file = self.path / FINGERPRINT_FILE
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = None
        wanted = json.loads(json.dumps(expected))
        if found == wanted:
            return
        if isinstance(found, dict):
            self.invalidated = [key for key in wanted if found.get(key) != wanted[key]]
            if self.invalidated == ["machine"] and not restart:
                before, now = found["machine"], wanted["machine"]
                changes = [f"{key} {before.get(key)} -> {now[key]}" for key in now if before.get(key) != now[key]]
                raise InputError(
                    f"{self.path} was begun elsewhere ({'; '.join(changes)}) and would end in other bytes; "
                    "go on there, or add --restart to start over"
                )
        self._clear()
        write_file(file, json.dumps(wanted, indent=1) + "\n")

    def _clear(self) -> None:
        """Delete our own files, and nothing else that may lie here; what makes them trusted goes first."""
        (self.path / FINGERPRINT_FILE).unlink(missing_ok=True)
        for pattern in ("*.f32", "*.partial", "layers/*.safetensors", "layers/*.json", "layers/*.partial"):
            for file in self.path.glob(pattern):
                file.unlink()
        if (self.path / "layers").is_dir():
            (self.path / "layers").rmdir()

    def close(self) -> None:
        self._lock.close()

    def remove(self) -> None:
        """Delete what is ours: the run is finished and its result published."""
        self._clear()
        self._lock.seek(0)
        created = self._lock.read() == CREATED
        (self.path / MARKER_FILE).unlink()
        self.close()
        if created:
            with contextlib.suppress(OSError):  # somebody put a file of theirs here
                self.path.rmdir()

    # Activations: float32 [windows, seq, hidden], one file each, memory-mapped.

    def _activation_path(self, name: str) -> Path:
        return self.path / f"{name}.f32"

    def has(self, name: str) -> bool:
        return self._activation_path(name).exists()

    def read(self, name: str, shape: tuple[int, int, int]) -> Tensor:
        """Memory-mapped; raises FileNotFoundError where it is not there."""
        path = self._activation_path(name)
        if not path.exists():
            raise FileNotFoundError(path)
        return map_activations(path, shape)

    def create(self, name: str, shape: tuple[int, int, int]) -> ActivationWriter:
        return ActivationWriter(self._activation_path(name), shape)

    def discard(self, name: str) -> None:
        self._activation_path(name).unlink(missing_ok=True)

    # Results: one safetensors file and one report per layer.

    def layer_path(self, layer: int) -> Path:
        return self.path / "layers" / f"{layer:05d}.safetensors"

    def layer_done(self, layer: int) -> bool:
        return self.layer_path(layer).exists()

    def save_layer(self, layer: int, tensors: dict[str, Tensor], report: dict[str, Any]) -> None:
        path = self.layer_path(layer)
        write_file(path.with_suffix(".json"), json.dumps(report))
        partial = path.with_suffix(".partial")
        write_tensors(partial, tensors)
        partial.replace(path)  # last: this file says that the layer is done

    def layer_tensor(self, layer: int, name: str) -> Tensor:
        with safe_open(self.layer_path(layer), framework="pt") as file:
            return file.get_tensor(name)

    def layer_report(self, layer: int) -> dict[str, Any]:
        return json.loads(self.layer_path(layer).with_suffix(".json").read_text(encoding="utf-8"))


class ActivationWriter:
    """A float32 array being filled; `publish` gives it its final name, all or nothing."""

    def __init__(self, path: Path, shape: tuple[int, int, int]) -> None:
        self._path, self._partial = path, path.with_suffix(".partial")
        self._partial.unlink(missing_ok=True)
        self.array = map_activations(self._partial, shape)

    def publish(self) -> None:
        del self.array
        sync_file(self._partial)
        self._partial.replace(self._path)


def map_activations(path: Path, shape: tuple[int, int, int]) -> Tensor:
    """A float32 array of this shape, kept in a file that is created where it does not exist."""
    size = shape[0] * shape[1] * shape[2]
    if not path.exists():
        # Reserves the blocks: a full disk is an error here, not a SIGBUS in the middle of the work.
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size * 4)
    return torch.from_file(str(path), shared=True, size=size, dtype=torch.float32).view(shape)


def sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
