"""State of a run on disk: what survives a kill, and what an input's change makes worthless.

Every file appears under its final name only when it is complete, and carries checksums that are compared when it is
read again: what an earlier run left may have been changed by another hand or a failing disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

import d2moe_vllm
from offline.algebra.products import has_bfloat16
from offline.errors import InputError
from offline.io.locks import hold
from offline.io.shards import checksum, write_file, write_tensors
from offline.source.dense import DenseModel
from offline.work.activations import Rows
from offline.work.distributed import Group

FINGERPRINT_FILE = "fingerprint.json"
MARKER_FILE = ".d2moe-work"
"""Lock, and sign that a folder is ours."""
CREATED = "created"
"""In the marker of a folder that was not there before."""


def fingerprint(
    model: DenseModel, recipe: Mapping[str, Any], calibration_sha256: str, machine: dict[str, Any]
) -> dict[str, Any]:
    """Everything the result's bytes depend on. Weight files count by size, time and header: hashing
    hundreds of gigabytes at every start would cost more than it protects. machine: what else decides the order of
    sums (token batches, processes, device)."""
    files = {file: _weight_file(model.folder / file) for file in model.reader.files}
    row = model.family.row
    return {
        "tool": d2moe_vllm.__version__,
        "source": {"config": hashlib.sha256(json.dumps(model.config).encode()).hexdigest(), "files": files},
        **({"family_row": row.model_dump(mode="json")} if row else {}),
        "recipe": recipe,
        "calibration": calibration_sha256,
        "machine": {
            "torch": torch.__version__,
            "transformers": importlib.metadata.version("transformers"),
            "threads": torch.get_num_threads(),
            "cpu": [platform.machine(), torch.backends.cpu.get_cpu_capability(), has_bfloat16()],
            **machine,
        },
    }


def _weight_file(path: Path) -> list[int | str]:
    with path.open("rb") as opened:
        header = opened.read(8)
        header += opened.read(int.from_bytes(header, "little"))
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, hashlib.sha256(header).hexdigest()]


def refuse_changed_source(model: DenseModel, mark: dict[str, Any]) -> None:
    """mark: the run's fingerprint. Raises InputError for a weight file that is not what it was when the run began."""
    for file, before in mark["source"]["files"].items():
        path = model.folder / file
        if not path.exists() or _weight_file(path) != before:
            raise InputError(
                f"{path} was changed while it was being compressed; run the same command again to start over"
            )


class WorkDir:
    """The working folder of one run, locked against a second one.

    expected: the fingerprint; restart: start over where it differs in the machine alone, which is otherwise refused
    (a run of days is not thrown away because it was resumed with another thread count).
    Raises InputError where the folder holds something else, cannot be used, or another run uses it.
    """

    def __init__(
        self, path: Path, expected: dict[str, Any], *, restart: bool = False, group: Group | None = None
    ) -> None:
        self.path, self.group = path, group or Group()
        self.invalidated: list[str] = []
        self._checked: set[str] = set()
        if self.group.first:
            self._open(expected, restart)
        self.group.barrier()

    def _open(self, expected: dict[str, Any], restart: bool) -> None:
        path = self.path
        marker = path / MARKER_FILE
        try:
            if path.is_dir() and not marker.exists() and any(path.iterdir()):
                raise InputError(f"working folder {path} is not empty and not ours; choose another --workdir")
            created = not path.exists()
            path.mkdir(parents=True, exist_ok=True)
            self._lock = hold(marker, f"another run is using {path}; wait for it, or choose another --workdir")
        except OSError as error:
            raise InputError(f"working folder {path} cannot be used ({error.strerror}); choose another") from None
        if created:
            marker.write_text(CREATED)
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
        for pattern in ("*.rows", "*.partial", "layers/*/*.safetensors", "layers/*/*.partial"):
            for file in self.path.glob(pattern):
                file.unlink()
        for folder in (*self.path.glob("layers/*"), self.path / "layers"):
            with contextlib.suppress(OSError):  # not there, or somebody put a file of theirs into it
                folder.rmdir()

    def nbytes(self) -> int:
        """Bytes that lie here now."""
        return sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file())

    def close(self) -> None:
        if self.group.first:
            self._lock.release()

    def remove(self) -> None:
        """Delete what is ours: the run is finished and its result published."""
        if not self.group.first:
            return
        self._clear()
        marker = self.path / MARKER_FILE
        created = marker.read_text() == CREATED
        marker.unlink()
        self.close()
        if created:
            with contextlib.suppress(OSError):  # somebody put a file of theirs here
                self.path.rmdir()

    # Arrays with a row per token. Every process writes its own rows; the first one creates and publishes.

    def _array_path(self, name: str) -> Path:
        return self.path / f"{name}.rows"

    def has(self, name: str) -> bool:
        return self._array_path(name).exists()

    def rows(self, name: str, rows: int, width: int, dtype: torch.dtype = torch.float32) -> Rows:
        """An array that was published. Raises FileNotFoundError where it is not there, InputError where it is damaged.

        What an earlier run published is read once for its checksum.
        """
        array = Rows(self._array_path(name), rows, width, dtype)
        if name not in self._checked and not array.whole():
            raise self._damaged(array.path)
        self._checked.add(name)
        return array

    def create(self, name: str, rows: int, width: int, dtype: torch.dtype = torch.float32) -> Rows:
        """A new array to be filled; it is not there until `publish`."""
        array = Rows(self._array_path(name).with_suffix(".partial"), rows, width, dtype)
        if self.group.first:
            array.path.unlink(missing_ok=True)
            array.allocate()
        self.group.barrier()
        return array

    def publish(self, name: str, array: Rows) -> None:
        """Gives a filled array its name, once every process has written its rows."""
        self.group.barrier()
        if self.group.first:
            array.publish(self._array_path(name))
        self._checked.add(name)
        self.group.barrier()

    def discard(self, *names: str) -> None:
        self._checked.difference_update(names)
        if self.group.first:
            for name in names:
                self._array_path(name).unlink(missing_ok=True)

    # Results: per layer a folder with a safetensors file per part ("shared", an expert's number, ...).

    def part_path(self, layer: int, part: str) -> Path:
        return self.path / "layers" / f"{layer:05d}" / f"{part}.safetensors"

    def has_part(self, layer: int, part: str) -> bool:
        return self.part_path(layer, part).exists()

    def save_part(self, layer: int, part: str, tensors: dict[str, Tensor]) -> None:
        path = self.part_path(layer, part)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        write_tensors(partial, tensors)
        partial.replace(path)

    def load_part(self, layer: int, part: str, *keys: str) -> dict[str, Tensor]:
        """The named tensors of a part, or all of them. Raises InputError where the file is damaged."""
        path = self.part_path(layer, part)
        try:
            with safe_open(path, framework="pt") as file:
                sums = file.metadata() or {}
                found = {key: file.get_tensor(key) for key in keys or sums}
        except SafetensorError:
            raise self._damaged(path) from None
        if any(sums.get(key) != checksum(tensor) for key, tensor in found.items()):
            raise self._damaged(path)
        return found

    def _damaged(self, path: Path) -> InputError:
        """A file that another hand or a failing disk has changed: ours get their names when they are whole."""
        return InputError(f"{path} is damaged; delete {self.path / FINGERPRINT_FILE} and run it again to start over")

    def discard_part(self, layer: int, part: str) -> None:
        self.part_path(layer, part).unlink(missing_ok=True)
