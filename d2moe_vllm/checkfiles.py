"""Reading a d2moe checkpoint's files, and refusing what is not whole: index, manifest, headers, index tensors.

Reads safetensors headers, and of the data only the tensors that say which columns or factors belong where:
nothing is allocated for a weight before its name, dtype and shape have been found right.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from d2moe_vllm.checkpoint import (
    INDEX_FILE,
    MANIFEST_FILE,
    ROLES,
    CheckpointConfig,
    CheckpointError,
    FileEntry,
    Manifest,
    Role,
    TensorSpec,
    first_error,
    parse_config,
    refuse_version,
)

INDEX_KINDS = (".base_columns", ".delta_columns", ".u_index")
"""How the names of the integer tensors end."""


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent}: {path.name} is missing; copy the whole checkpoint again") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error}); copy the checkpoint again") from None


def read_config(folder: Path) -> CheckpointConfig:
    """The configuration of the compressed checkpoint in `folder`. Raises CheckpointError."""
    content = _read_json(folder / "config.json")
    config = content.get("quantization_config") if isinstance(content, dict) else None
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder}: config.json has no quantization_config: this is a dense checkpoint")
    return parse_config(config, str(folder / "config.json"))


def read_manifest(folder: Path) -> Manifest:
    """Raises CheckpointError."""
    content = _read_json(folder / MANIFEST_FILE)
    where = str(folder / MANIFEST_FILE)
    refuse_version(content.get("format_version") if isinstance(content, dict) else None, where)
    try:
        return Manifest.model_validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        raise CheckpointError(f"{where}: {first_error(error)}") from None


def read_weight_map(folder: Path) -> dict[str, str]:
    """Tensor name -> file name, from the index, or from the headers where one file needs no index.

    Works on dense checkpoints too. Raises CheckpointError for file names that leave the folder.
    """
    index = folder / INDEX_FILE
    if index.exists():
        content = _read_json(index)
        weight_map = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{index}: no weight_map; copy the checkpoint again")
    elif (folder / "model.safetensors").exists():
        weight_map = dict.fromkeys(read_header(folder / "model.safetensors"), "model.safetensors")
    else:
        raise CheckpointError(f"{folder}: neither {INDEX_FILE} nor model.safetensors: no safetensors weights here")
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or not re.fullmatch(r"[\w][\w.\-]*\.safetensors", file):
            raise CheckpointError(f"{index}: {tensor} points at {file!r}, which is not a file name in this folder")
    return weight_map


def read_header(path: Path) -> dict[str, TensorSpec]:
    """Names, dtypes and shapes in one safetensors file; its data is not read.

    Raises CheckpointError for a missing, truncated or damaged file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            return {name: TensorSpec(s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent}: weight file {path.name} is missing; copy it again") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged or truncated ({error}); copy it again") from None


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
        raise CheckpointError(f"{folder}: {INDEX_FILE} and {MANIFEST_FILE} disagree about {_names(sorted(unlisted))}")
    found: dict[str, TensorSpec] = {}
    for file in sorted(set(weight_map.values())):
        for name, spec in read_header(folder / file).items():
            if weight_map.get(name) != file:
                raise CheckpointError(f"{folder / file}: tensor {name} is not where the index says; copy both again")
            found[name] = spec
    if missing := [name for name in expected if name not in found]:
        raise CheckpointError(f"{folder}: {len(missing)} tensors missing: {_names(missing)}; copy it again")
    if unknown := [name for name in found if name not in expected]:
        raise CheckpointError(f"{folder}: {len(unknown)} tensors do not belong here: {_names(unknown)}")
    for name, spec in expected.items():
        if found[name] != spec:
            raise CheckpointError(f"{folder / weight_map[name]}: {name} is {found[name]}, expected {spec}")
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
    config = config or read_config(folder)
    manifest = read_manifest(folder)
    others = {name: TensorSpec(dtype, shape) for name, (dtype, shape) in manifest.other_tensors.items()}
    experts = config.expert_tensors()
    if both := [name for name in others if name in experts]:
        raise CheckpointError(f"{folder}: {MANIFEST_FILE} lists expert tensors: {_names(both)}")
    weight_map = check_tensors(folder, others | experts, manifest.files)
    for layer in config.layers:
        names = [name for role in ROLES for name in config.projection_tensors(layer, role) if _is_index(name)]
        check_indices(config, layer, _read_integers(folder, weight_map, names))
    return config


def _is_index(name: str) -> bool:
    return name.endswith(INDEX_KINDS)


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
    for role in ROLES:
        for name in config.projection_tensors(layer, role):
            if name.endswith("u_index"):
                check_u_index(name, values[name], config, layer, role)
            elif _is_index(name):
                check_columns(name, values[name], config, role)
    for kind in ("base_columns", "u_index"):
        names = [config.tensor_name(layer, 0, role, kind) for role in ("gate", "up")]
        if all(name in values for name in names) and values[names[0]] != values[names[1]]:
            raise CheckpointError(differ_message(*names))


def differ_message(gate: str, up: str) -> str:
    return f"{gate} and {up} differ, gate and up share one; copy the checkpoint again"


def check_columns(name: str, columns: list[int], config: CheckpointConfig, role: Role) -> None:
    """Raises CheckpointError unless columns of a base or delta ascend, are in range and as many in every group."""
    groups, inputs = config.pruning.groups, config.shape(role)[1]
    ascending = all(left < right for left, right in itertools.pairwise(columns))
    per_group = len(columns) // groups
    expected = [group for group in range(groups) for _ in range(per_group)]
    if not ascending or [column // (inputs // groups) for column in columns] != expected:
        raise CheckpointError(
            f"{name}: columns must ascend, lie in 0..{inputs - 1} and be spread evenly over {groups} groups; "
            "copy the checkpoint again"
        )


def check_u_index(name: str, index: list[int], config: CheckpointConfig, layer: int, role: Role) -> None:
    """Raises CheckpointError unless trimmed experts have -1 and all others one of the stored U's."""
    stored, trimmed = config.layers[layer][role].distinct_u, set(config.layers[layer].trimmed)
    for expert, slot in enumerate(index):
        if expert in trimmed and slot != -1:
            raise CheckpointError(f"{name}: expert {expert} is trimmed and needs -1, not {slot}; copy it again")
        if expert not in trimmed and not 0 <= slot < stored:
            raise CheckpointError(
                f"{name}: expert {expert} has U {slot}, but 0..{stored - 1} are stored; copy the checkpoint again"
            )
