"""Reading a d2moe checkpoint's files, and refusing what is not whole: index, manifest, headers, index tensors.

Reads safetensors headers, and of the data only the tensors that say which columns or factors belong where:
nothing is allocated for a weight before its name, dtype and shape have been found right.
"""

from __future__ import annotations

import itertools
import json
import re
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from d2moe_vllm.format.config import (
    INDEX_FILE,
    MANIFEST_FILE,
    CheckpointConfig,
    CheckpointError,
    FileEntry,
    Manifest,
    first_error,
    parse_config,
    refuse_version,
)
from d2moe_vllm.format.kinds import Stored, TensorSpec, first_index_problem, index_problem

WHOLE_FILE = "model.safetensors"
"""Holds all tensors of a model that is not split."""
MAX_JSON = 1 << 28
"""Bytes: ten times the index of the largest models there are."""
MAX_HEADER = 100_000_000
"""Bytes, of a safetensors file; the library's own limit."""


def _read_json(path: Path) -> Any:
    try:
        refuse_special(path, MAX_JSON)
        return _strict_json(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent}: {path.name} is missing; copy the whole checkpoint again") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error}); copy the checkpoint again") from None


def refuse_special(path: Path, most: int | None = None) -> None:
    """Raises OSError for what is no regular file, or larger than `most` bytes: a pipe would be waited for, and a device
    read, without end."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError("no regular file")
    if most is not None and status.st_size > most:
        raise OSError(f"{status.st_size:,} bytes, more than the {most:,} that it may have")


def _strict_json(text: bytes) -> Any:
    """Raises ValueError, also for a name that is there twice, of which readers differ in what they take, and for
    numbers that JSON has not; RecursionError."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no number")

    return json.loads(text.decode("utf-8"), object_pairs_hook=_each_once, parse_constant=refuse)


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r} is there twice")
        found[name] = value
    return found


def read_config(folder: Path) -> CheckpointConfig:
    """The configuration of the compressed checkpoint in `folder`. Raises CheckpointError."""
    content = _read_json(folder / "config.json")
    config = content.get("quantization_config") if isinstance(content, dict) else None
    if not isinstance(config, dict):
        raise CheckpointError(
            f"{folder}: config.json has no quantization_config: this is a dense checkpoint; "
            "copy config.json again if it should be a compressed one"
        )
    return parse_config(config, str(folder / "config.json"))


def read_manifest(folder: Path) -> Manifest:
    """Raises CheckpointError."""
    content = _read_json(folder / MANIFEST_FILE)
    where = str(folder / MANIFEST_FILE)
    refuse_version(content.get("format_version") if isinstance(content, dict) else None, where)
    try:
        return Manifest.model_validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        raise CheckpointError(f"{where}: {first_error(error)}; copy it again") from None


def read_weight_map(folder: Path) -> dict[str, str]:
    """Tensor name -> file name, from the headers where all are in WHOLE_FILE, which transformers prefers, else from the
    index.

    Works on dense checkpoints too. Raises CheckpointError for file names that leave the folder.
    """
    index = folder / INDEX_FILE
    weight_map: Any
    if (folder / WHOLE_FILE).exists():
        weight_map = dict.fromkeys(read_header(folder / WHOLE_FILE), WHOLE_FILE)
    elif index.exists():
        content = _read_json(index)
        weight_map = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{index}: no weight_map; copy the checkpoint again")
    else:
        raise CheckpointError(
            f"{folder}: neither {INDEX_FILE} nor {WHOLE_FILE}: no safetensors weights here; copy it again"
        )
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or not re.fullmatch(r"[\w][\w.\-]*\.safetensors", file):
            raise CheckpointError(
                f"{index}: {tensor} points at {file!r}, which is not a file name in this folder; copy it again"
            )
    names: dict[str, str] = weight_map
    return names


def read_header(path: Path) -> dict[str, TensorSpec]:
    """Names, dtypes and shapes in one safetensors file; its data is not read.

    Raises CheckpointError for a missing, truncated or damaged file.
    """
    return {name: spec for name, (spec, _) in read_places(path).items()}


def read_places(path: Path) -> dict[str, tuple[TensorSpec, int]]:
    """What `read_header` says, each with the byte of the file at which the tensor begins. Raises likewise."""
    from safetensors import SafetensorError, safe_open

    try:
        refuse_special(path)
        begins = _begins(path)
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            return {n: (TensorSpec(s.get_dtype(), tuple(s.get_shape())), begins[n]) for n, s in slices.items()}
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent}: weight file {path.name} is missing; copy it again") from None
    except KeyError as name:  # the file was exchanged between the two readings
        raise CheckpointError(f"{path}: {name} was not there a moment ago; read it again") from None
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged or truncated ({error}); copy it again") from None


def _begins(path: Path) -> dict[str, int]:
    """Where tensors begin, or nothing where the library is to say what is wrong; what it does not see, a tensor that a
    header has twice, of which it takes the last, is refused. Raises ValueError, RecursionError, OSError."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > min(MAX_HEADER, path.stat().st_size):
            return {}
        header = _strict_json(file.read(size))
    try:
        return {name: 8 + size + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}
    except (AttributeError, IndexError, KeyError, TypeError):
        return {}


def _names(names: Iterable[str], limit: int = 3) -> str:
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def check_tensors(
    folder: Path, expected: Mapping[str, TensorSpec], files: Mapping[str, FileEntry] | None = None
) -> dict[str, str]:
    """Compare index and headers of every weight file with `expected`; returns the weight map.

    Raises CheckpointError, naming the first offenders, for a tensor that is missing, of the wrong dtype or
    shape, unexpected, or in another file than the index says, and for a file of the wrong size.
    """
    weight_map = read_weight_map(folder)
    if files is not None and (unlisted := set(weight_map.values()) ^ set(files)):
        raise CheckpointError(
            f"{folder}: {INDEX_FILE} and {MANIFEST_FILE} disagree about {_names(sorted(unlisted))}; copy both again"
        )
    found: dict[str, TensorSpec] = {}
    for file in sorted(set(weight_map.values())):
        for name, spec in read_header(folder / file).items():
            if weight_map.get(name) != file:
                raise CheckpointError(f"{folder / file}: tensor {name} is not where the index says; copy both again")
            found[name] = spec
    if missing := [name for name in expected if name not in found]:
        raise CheckpointError(f"{folder}: {len(missing)} tensors missing: {_names(missing)}; copy it again")
    if unknown := [name for name in found if name not in expected]:
        raise CheckpointError(f"{folder}: {len(unknown)} tensors do not belong here: {_names(unknown)}; copy it again")
    for name, spec in expected.items():
        if found[name] != spec:
            raise CheckpointError(
                f"{folder / weight_map[name]}: {name} is {found[name]}, expected {spec}; copy it again"
            )
    # Last: a tensor's own name tells more than its file's size.
    for name, entry in (files or {}).items():
        size = (folder / name).stat().st_size
        if size != entry.bytes:
            raise CheckpointError(
                f"{folder / name}: truncated or replaced ({size} bytes, not {entry.bytes}); copy it again"
            )
    return weight_map


def check_checkpoint(folder: Path, config: CheckpointConfig | None = None) -> CheckpointConfig:
    """Refuse a damaged checkpoint before anything is allocated: config, manifest, index and all headers.

    Raises CheckpointError. Payloads are not read, but for integers (which columns, which U): hashes are not compared.
    """
    if config is None:
        config = read_config(folder)
    elif (folder / "config.json").exists():
        _read_json(folder / "config.json")  # what gave us the config may be less strict
    manifest = read_manifest(folder)
    others = {name: TensorSpec(dtype, shape) for name, (dtype, shape) in manifest.other_tensors.items()}
    experts = _expert_tensors(folder, config)
    if both := [name for name in others if name in experts]:
        raise CheckpointError(f"{folder}: {MANIFEST_FILE} lists expert tensors: {_names(both)}; copy it again")
    weight_map = check_tensors(folder, others | experts, manifest.files)
    for layer in config.layers:
        names = [name for name, one in config.stored(layer).items() if one.kind.is_index]
        check_indices(config, layer, _read_integers(folder, weight_map, names))
    return config


def _expert_tensors(folder: Path, config: CheckpointConfig) -> dict[str, TensorSpec]:
    """`config.expert_tensors()`; of a config that declares more of them than the index has names no more are made than
    tells so. Raises CheckpointError."""
    names, expected = read_weight_map(folder), dict[str, TensorSpec]()
    for layer, role in itertools.product(config.layers, config.roles):
        if (least := config.tensors_at_least(layer, role)) > len(names):
            raise CheckpointError(
                f"{folder}: config.json declares {least:,} tensors of {role} in layer {layer}, but the index has "
                f"{len(names):,} in all; copy both again"
            )
        expected |= config.projection_tensors(layer, role)
        if len(expected) > len(names):
            missing = [name for name in expected if name not in names]
            raise CheckpointError(f"{folder}: {len(missing)} tensors or more missing: {_names(missing)}; copy it again")
    return expected


def _read_integers(folder: Path, weight_map: Mapping[str, str], names: Iterable[str]) -> dict[str, list[int]]:
    """The named integer tensors, each file opened once."""
    from safetensors import SafetensorError, safe_open

    values: dict[str, list[int]] = {}
    by_file = sorted(names, key=weight_map.__getitem__)
    for file, members in itertools.groupby(by_file, key=weight_map.__getitem__):
        try:
            with safe_open(folder / file, framework="numpy") as handle:
                values.update({name: handle.get_tensor(name).tolist() for name in members})
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{folder / file}: damaged or truncated ({error}); copy it again") from None
    return values


def check_indices(config: CheckpointConfig, layer: int, values: Mapping[str, list[int]]) -> None:
    """Check a layer's integer tensors, by full name. Raises CheckpointError, naming the first that is wrong."""
    found = {name: (one, values[name]) for name, one in config.stored(layer).items() if one.kind.is_index}
    if problem := first_index_problem(found, config.layers[layer], config.sizes, config.pruning.groups):
        raise CheckpointError(f"{problem}; copy the checkpoint again")


def check_index(name: str, values: list[int], config: CheckpointConfig, layer: int, one: Stored) -> None:
    """Raises CheckpointError unless an index tensor's values are what `kinds.index_problem` says they have to be."""
    if problem := index_problem(one, values, config.layers[layer], config.sizes, config.pruning.groups):
        raise CheckpointError(f"{name}: {problem}; copy the checkpoint again")
