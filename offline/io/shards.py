"""Safetensors read lazily and written as a stream: no shard is ever held in memory.

The library's own writer needs every tensor of a file at once; here names, dtypes and shapes are known
long before the values, so the header is laid out first (which also tells the exact size of every file
before any work is done) and tensors are appended one at a time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from torch import Tensor

from d2moe_vllm.format.config import INDEX_FILE, CheckpointError, FileEntry
from d2moe_vllm.format.files import read_places, read_weight_map
from d2moe_vllm.format.kinds import DTYPE_BYTES, TensorSpec

SHARD_BYTES = 5_000_000_000
TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity; torch cannot ask that of floats of one byte."""
    narrow = tensor.is_floating_point() and tensor.itemsize == 1
    return bool(torch.isfinite(tensor.float() if narrow else tensor).all())


class Reader:
    """The safetensors files of one checkpoint folder; tensors are read when asked for.

    Raises CheckpointError for files that are missing or truncated and for an index that lies.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.weight_map = read_weight_map(folder)
        self.files = sorted(set(self.weight_map.values()))
        self.specs: dict[str, TensorSpec] = {}
        self._headers: dict[str, tuple[tuple[int, ...], dict[str, tuple[TensorSpec, int]]]] = {}
        for file in self.files:
            for name, (spec, _) in self._places(file).items():
                if self.weight_map.get(name) != file:
                    where = f"says it is in {self.weight_map[name]}" if name in self.weight_map else "does not list it"
                    raise CheckpointError(
                        f"{folder / file}: holds tensor {name}, and {INDEX_FILE} {where}; set it to {file!r} in its "
                        "weight_map, or copy both again"
                    )
                if spec.dtype not in DTYPE_BYTES:
                    raise CheckpointError(f"{folder / file}: {name} has the unknown dtype {spec.dtype}")
                self.specs[name] = spec
        if missing := [name for name in self.weight_map if name not in self.specs]:
            raise CheckpointError(f"{folder}: {len(missing)} tensors of the index are in no file, first {missing[0]}")

    @property
    def nbytes(self) -> int:
        """Bytes of all weight files on disk, headers included."""
        return sum((self.folder / file).stat().st_size for file in self.files)

    @property
    def parameters(self) -> int:
        return sum(spec.numel for spec in self.specs.values())

    def tensor(self, name: str) -> Tensor:
        """One tensor, in its stored dtype: a view of the file, whose pages are read when they are used and are given
        back with it. Raises CheckpointError where the file is damaged.

        Not by the library's own `safe_open`, which reads the header again for each tensor: most of the time of reading
        a small one, and of a file with hundreds.
        """
        file = self.weight_map[name]
        try:
            spec, begin = self._places(file)[name]
            dtype = TORCH_DTYPES[spec.dtype]
            if not spec.nbytes:
                return torch.empty(spec.shape, dtype=dtype)
            mapped = torch.UntypedStorage.from_file(str(self.folder / file), False, begin + spec.nbytes)
            if begin % dtype.itemsize:
                stored = torch.empty(0, dtype=torch.uint8).set_(mapped, begin, (spec.nbytes,), (1,)).clone().view(dtype)
                return stored.view(spec.shape)
            flat = torch.empty(0, dtype=dtype).set_(mapped, begin // dtype.itemsize, (spec.numel,), (1,))
            return flat.view(spec.shape)
        except (KeyError, OSError, RuntimeError) as error:
            raise CheckpointError(f"{self.folder / file}: {name} cannot be read ({error}); copy it again") from None

    def _places(self, file: str) -> dict[str, tuple[TensorSpec, int]]:
        """A file's header, which is read again when the file is another one than it was."""
        state: tuple[int, ...] = ()
        with contextlib.suppress(OSError):  # read_places says what is wrong
            status = (self.folder / file).stat()
            state = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
        if file not in self._headers or self._headers[file][0] != state:
            self._headers[file] = state, read_places(self.folder / file)
        return self._headers[file][1]

    def finite(self, name: str) -> Tensor:
        """One tensor that is to be computed with. Raises CheckpointError where it holds a NaN or infinity."""
        tensor = self.tensor(name)
        if not all_finite(tensor):
            path = self.folder / self.weight_map[name]
            raise CheckpointError(f"{path}: {name} holds NaN or infinite values; download the file again")
        return tensor


@dataclass(frozen=True)
class Shard:
    """One file to be written: its name and, in file order, its tensors."""

    file: str
    tensors: dict[str, TensorSpec]
    metadata: Mapping[str, str] = field(default_factory=lambda: {"format": "pt"})

    @property
    def header(self) -> bytes:
        """Length and JSON header, padded to 8 bytes, as the safetensors format fixes them."""
        content: dict[str, object] = {"__metadata__": dict(self.metadata)}
        offset = 0
        for name, spec in self.tensors.items():
            end = offset + spec.nbytes
            content[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(content, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    @cached_property
    def nbytes(self) -> int:
        return len(self.header) + sum(spec.nbytes for spec in self.tensors.values())


@lru_cache(maxsize=1 << 18)  # a plan sorts the same names again and again, 180,000 of DeepSeek-V3
def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key that puts layer 2 before layer 10."""
    return tuple((1, int(part), "") if part.isdigit() else (0, 0, part) for part in re.split(r"(\d+)", name))


def plan_shards(specs: Mapping[str, TensorSpec], max_bytes: int = SHARD_BYTES) -> list[Shard]:
    """Distribute tensors over files of at most `max_bytes` of data (a larger tensor gets its own file).

    Within a file wider dtypes come first, which keeps every tensor aligned to its own element size.
    """
    groups: list[dict[str, TensorSpec]] = [{}]
    size = 0
    for name in sorted(specs, key=natural_key):
        if groups[-1] and size + specs[name].nbytes > max_bytes:
            groups.append({})
            size = 0
        groups[-1][name] = specs[name]
        size += specs[name].nbytes
    count = len(groups)
    return [
        Shard(
            f"model-{number:05d}-of-{count:05d}.safetensors",
            # A stable sort: of one width in natural order.
            dict(sorted(group.items(), key=lambda item: -DTYPE_BYTES[item[1].dtype])),
        )
        for number, group in enumerate(groups, start=1)
    ]


def checksum(tensor: Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and bytes, in hex."""
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
    digest.update(_bytes(tensor.contiguous()))
    return digest.hexdigest()


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """One safetensors file of tensors that are in memory already, with the checksum of each in its header's metadata.

    Raises OSError where it cannot be written.
    """
    names = {dtype: name for name, dtype in TORCH_DTYPES.items()}
    specs = {name: TensorSpec(names[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}
    (shard,) = plan_shards(specs, max_bytes=sum(s.nbytes for s in specs.values()) + 1)
    sums = {name: checksum(tensor) for name, tensor in tensors.items()}
    _write_shard(path, replace(shard, metadata=sums), tensors.__getitem__)


def write_shards(folder: Path, shards: list[Shard], produce: Callable[[str], Tensor]) -> dict[str, FileEntry]:
    """Write every shard and the index into `folder`, asking `produce` for one tensor at a time.

    Returns size and sha256 of every file. Raises ValueError where a produced tensor does not match its plan.
    """
    entries = {shard.file: _write_shard(folder / shard.file, shard, produce) for shard in shards}
    weight_map = {name: shard.file for shard in shards for name in shard.tensors}
    total = sum(spec.nbytes for shard in shards for spec in shard.tensors.values())
    index = {
        "metadata": {"total_size": total},
        "weight_map": {name: weight_map[name] for name in sorted(weight_map, key=natural_key)},
    }
    write_file(folder / INDEX_FILE, json.dumps(index, indent=2) + "\n")
    return entries


def _write_shard(path: Path, shard: Shard, produce: Callable[[str], Tensor]) -> FileEntry:
    digest = hashlib.sha256()
    size = 0
    with path.open("wb") as file:
        for chunk in _chunks(shard, produce):
            file.write(chunk)
            digest.update(chunk)
            size += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    return FileEntry(bytes=size, sha256=digest.hexdigest())


def _chunks(shard: Shard, produce: Callable[[str], Tensor]) -> Iterator[bytes | memoryview]:
    yield shard.header
    for name, spec in shard.tensors.items():
        tensor = produce(name).detach().contiguous()
        if tuple(tensor.shape) != spec.shape or tensor.dtype != TORCH_DTYPES[spec.dtype]:
            raise ValueError(f"{name}: got {tensor.dtype} {list(tensor.shape)}, planned {spec}")
        yield _bytes(tensor)


def _bytes(tensor: Tensor) -> memoryview:
    """A view: torch has no numpy type for bfloat16, and a copy would double the memory."""
    # What is contiguous may have any stride where there is one number only.
    flat = tensor.detach().as_strided((tensor.numel(),), (1,))
    return memoryview(flat.view(torch.uint8).numpy())


def write_file(path: Path, content: str) -> None:
    """Write a text file that is either whole or not there."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
