"""What a checkpoint's files must be before any of them is loaded; checkpoint.py needs pydantic, this does not.

Used by plain transformers, and copied into modeling_d2moe.py of checkpoints.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from safetensors import SafetensorError, safe_open

from d2moe_vllm.format.kinds import FORMAT_VERSION, Shape, Stored, first_index_problem, layer_of, stored_tensors

MANIFEST = "d2moe_manifest.json"


def d2moe_config(config: Any) -> dict[str, Any] | None:
    """The checkpoint's own configuration, or None for a dense model. Raises ValueError, in one line."""
    content = getattr(config, "d2moe", None) or getattr(config, "quantization_config", None)
    # What from_pretrained leaves in the configuration is an object.
    if content is not None and not isinstance(content, dict):
        content = content.to_dict()
    if not isinstance(content, dict) or content.get("quant_method") != "d2moe":
        return None
    if content.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"d2moe format version {content.get('format_version')!r} is not supported (this file reads version "
            f"{FORMAT_VERSION}); use the modeling_d2moe.py that came with the checkpoint"
        )
    if lacking := {"layers", "projections", "pruning", "experts", "num_experts", "dtype"} - set(content):
        raise ValueError(f"quantization_config lacks {', '.join(sorted(lacking))}; restore the original config.json")
    return content


def check_files(folder: str, settings: Mapping[str, Any]) -> None:
    """Refuse files that are not what config and manifest say. Raises ValueError, one line, naming a tensor."""
    manifest = _read_json(folder, MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{folder}: {MANIFEST} is not of format version {FORMAT_VERSION}; copy it again")
    try:
        expected = {name: (dtype, tuple(shape)) for name, (dtype, shape) in manifest["other_tensors"].items()}
        sizes = {file: int(entry["bytes"]) for file, entry in manifest["files"].items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError(
            f"{folder}: {MANIFEST} lacks other_tensors or files, or they are damaged; copy it again"
        ) from None
    for number in settings["layers"]:
        expected.update(
            {name: (one.spec.dtype, one.spec.shape) for name, one in _layer_tensors(settings, str(number)).items()}
        )
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    paths: dict[str, str] = {}
    for file in sorted(sizes):
        path = os.path.join(folder, file)
        if os.path.basename(file) != file:
            raise ValueError(f"{folder}: {MANIFEST} names {file!r}, which is no file of this folder")
        if not os.path.isfile(path):
            raise ValueError(f"{folder}: weight file {file} is missing; copy it again")
        try:
            with safe_open(path, framework="pt") as handle:
                slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 - not a dict
                found.update({name: (s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()})
                paths.update(dict.fromkeys(slices, path))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: damaged or truncated ({error}); copy it again") from None
    for problem, names in (
        ("missing", [name for name in expected if name not in found]),
        ("do not belong here", [name for name in found if name not in expected]),
    ):
        if names:
            raise ValueError(f"{folder}: {len(names)} tensors {problem}: {', '.join(names[:3])}; copy it again")
    for name, spec in expected.items():
        if found[name] != spec:
            raise ValueError(f"{folder}: {name} is {found[name]}, expected {spec}; copy the checkpoint again")
    for file, size in sizes.items():
        if os.path.getsize(os.path.join(folder, file)) != size:
            raise ValueError(f"{folder}: weight file {file} is truncated or replaced; copy it again")
    for number in settings["layers"]:
        _check_indices(folder, settings, str(number), paths)


def _check_indices(folder: str, settings: Mapping[str, Any], number: str, paths: Mapping[str, str]) -> None:
    """A layer's columns, U indices and channels are what the format says."""
    found: dict[str, tuple[Stored, list[int]]] = {}
    for name, one in _layer_tensors(settings, number).items():
        if one.kind.is_index:
            with safe_open(paths[name], framework="numpy") as handle:
                found[name] = one, handle.get_tensor(name).tolist()
    layer, groups = layer_of(settings["layers"][number]), settings["pruning"].get("groups", 8)
    if problem := first_index_problem(found, layer, _shape(settings), groups):
        raise ValueError(f"{folder}: {problem}; copy the checkpoint again")


def _layer_tensors(settings: Mapping[str, Any], number: str) -> dict[str, Stored]:
    """All of a layer's expert tensors, by full name."""
    shape = _shape(settings)
    prefix, layer = settings["experts"].replace("{layer}", number), settings["layers"][number]
    return {
        f"{prefix}.{one.expert}.{projection}.{one.name}": one
        for role, projection in settings["projections"].items()
        for one in stored_tensors(shape, role, layer_of(layer))
    }


def _shape(settings: Mapping[str, Any]) -> Shape:
    return Shape(*(settings[field] for field in Shape._fields))


def _read_json(folder: str, name: str) -> Any:
    try:
        with open(os.path.join(folder, name), encoding="utf-8") as file:
            return json.load(file)
    except FileNotFoundError:
        raise ValueError(f"{folder}: {name} is missing; copy the whole checkpoint again") from None
    except ValueError as error:
        raise ValueError(f"{folder}: {name} is not readable as JSON ({error}); copy it again") from None
