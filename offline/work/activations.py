"""Arrays with a row per token, in files that are memory-mapped piece by piece.

Nothing stays mapped between two accesses, so a process's resident memory does not grow with the length of the
calibration text, and the operating system keeps in its cache what it has room for.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from offline.io.shards import sync_file

_NUMPY = {torch.float32: np.float32, torch.int32: np.int32, torch.bfloat16: np.int16}
"""What lies in the file; numpy knows no bfloat16, and is given its bits."""
_DIGEST = 32
"""Bytes behind the rows: SHA-256 of all of them, once the file is published."""
_CHUNK = 1 << 22
"""Bytes hashed at a time."""


class Rows:
    """A file of `rows` rows of `width` float32, bfloat16 or int32 numbers. bfloat16 ones are rounded when they are
    written, and read as float32."""

    def __init__(self, path: Path, rows: int, width: int, dtype: torch.dtype = torch.float32) -> None:
        self.path, self.shape, self.dtype = path, (rows, width), dtype

    @property
    def nbytes(self) -> int:
        """Of the rows alone."""
        return self.shape[0] * self.shape[1] * self.dtype.itemsize

    def allocate(self) -> None:
        """Creates the file with its blocks reserved: a full disk is an error here, not a SIGBUS in the work."""
        with self.path.open("wb") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, self.nbytes + _DIGEST)
            else:
                file.truncate(self.nbytes + _DIGEST)

    def read(self, rows: slice | Tensor) -> Tensor:
        """A copy of some rows: a slice of them, or by ascending int64 numbers [n]. Raises FileNotFoundError."""
        if isinstance(rows, slice):
            return self._numbers(np.array(self._map(rows, "r")))
        if not len(rows):
            return self._numbers(np.empty((0, self.shape[1]), _NUMPY[self.dtype]))
        start, stop = int(rows[0]), int(rows[-1]) + 1
        return self._numbers(self._map(slice(start, stop), "r")[(rows - start).numpy()])

    def _numbers(self, found: np.ndarray) -> Tensor:
        values = torch.from_numpy(found)
        return values.view(torch.bfloat16).float() if self.dtype == torch.bfloat16 else values

    def write(self, rows: slice, values: Tensor) -> None:
        """values: [n, width], on any device."""
        found = values.detach().cpu()
        if self.dtype == torch.bfloat16:
            found = found.bfloat16().view(torch.int16)
        self._map(rows, "r+")[...] = found.numpy()

    def _map(self, rows: slice, mode: str) -> np.memmap:
        width = self.shape[1]
        offset, shape = rows.start * width * self.dtype.itemsize, (rows.stop - rows.start, width)
        return np.memmap(self.path, _NUMPY[self.dtype], mode, offset=offset, shape=shape)  # type: ignore[call-overload]

    def publish(self, path: Path) -> None:
        """Gives the filled file its digest and its final name."""
        digest = self._digest()
        with self.path.open("r+b") as file:
            file.seek(self.nbytes)
            file.write(digest)
        sync_file(self.path)
        self.path.replace(path)

    def whole(self) -> bool:
        """Whether a published file is as it was published: of the same size, with the same bytes."""
        if self.path.stat().st_size != self.nbytes + _DIGEST:
            return False
        with self.path.open("rb") as file:
            file.seek(self.nbytes)
            return file.read() == self._digest()

    def _digest(self) -> bytes:
        digest, left = hashlib.sha256(), self.nbytes
        with self.path.open("rb") as file:
            while left and (chunk := file.read(min(left, _CHUNK))):
                digest.update(chunk)
                left -= len(chunk)
        return digest.digest()
