"""Whether a folder is a sound checkpoint, told by what it is compared with: an original that is known to be sound.

Knows nothing of the readers under test: the files are parsed here, strictly, and each difference from the original has
to be one that docs/checkpoint-format.md leaves free. Everything else is damage.
"""

from __future__ import annotations

import json
import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

WIDTHS = {"F32": 4, "I32": 4, "BF16": 2, "F16": 2}
CONFIG, INDEX, MANIFEST = "config.json", "model.safetensors.index.json", "d2moe_manifest.json"
ROLES = ("gate", "up", "down")
PROJECTION_DEFAULTS = {
    "rank": 0, "kept_columns": 0, "base_rank": 0, "delta": "factors", "shared_v": False, "distinct_u": 0, "bases": 0,
    "function": None,
}  # fmt: skip


class BrokenError(Exception):
    """Not readable as what it should be."""


def read_json(path: Path) -> Any:
    """Refuses names that are there twice and NaN; 16 MB are enough for a test's checkpoint."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({name for name, _ in pairs}) < len(pairs):
            raise BrokenError(f"{path.name}: a name twice")
        return dict(pairs)

    def constant(name: str) -> None:
        raise BrokenError(f"{path.name}: {name}")

    if not path.is_file() or path.stat().st_size > 1 << 24:
        raise BrokenError(f"{path.name}: no file, or a huge one")
    try:
        return json.loads(path.read_bytes().decode("utf-8"), object_pairs_hook=once, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise BrokenError(f"{path.name}: {error}") from None


def read_weights(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """{name: [dtype, shape]}, and the values of the int32 tensors."""
    if not path.is_file() or path.stat().st_size > 1 << 26:
        raise BrokenError(f"{path.name}: no file, or a huge one")
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    if len(content) < 8 or size > len(content) - 8:
        raise BrokenError(f"{path.name}: shorter than its header")
    (path.parent / ".header").write_bytes(content[8 : 8 + size])
    header = read_json(path.parent / ".header")
    (path.parent / ".header").unlink()
    data, at, specs, integers = content[8 + size :], 0, {}, {}
    if not isinstance(header, dict):
        raise BrokenError(f"{path.name}: header is no object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise BrokenError(f"{path.name}: metadata")
    try:
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            sizes = [*shape, start, end]
            if any(type(number) is not int or number < 0 for number in sizes) or start != at:
                raise BrokenError(f"{path.name}: {name} does not lie behind the one before it")
            if end - start != math.prod(shape) * WIDTHS[dtype]:
                raise BrokenError(f"{path.name}: {name} has another length than its shape")
            at, specs[name] = end, [dtype, shape]
            if dtype == "I32":
                integers[name] = np.frombuffer(data[start:end], "<i4")
    except (KeyError, TypeError, ValueError) as error:
        raise BrokenError(f"{path.name}: {error}") from None
    if at != len(data):
        raise BrokenError(f"{path.name}: {len(data)} bytes of data, {at} in its header")
    return specs, integers


def quantization(config: Any) -> dict[str, Any]:
    """The section with what may be absent filled in."""
    found = config.get("quantization_config") if isinstance(config, dict) else None
    if not isinstance(found, dict):
        raise BrokenError("no quantization_config")
    found = {"method": "d2", "pruning": {}, **json.loads(json.dumps(found))}
    for place, defaults in (("pruning", {"scope": "off", "groups": 8}), ("source", {"revision": None})):
        if isinstance(found.get(place), dict):
            found[place] = {**defaults, **found[place]}
    layers = found.get("layers")
    for layer in layers.values() if isinstance(layers, dict) else ():
        if isinstance(layer, dict):
            layer.setdefault("trimmed", [])
            for role in ROLES:
                if isinstance(layer.get(role), dict):
                    layer[role] = {**PROJECTION_DEFAULTS, **layer[role]}
                    if not layer[role]["kept_columns"]:  # else it has to be there
                        layer[role].setdefault("used_columns", 0)
    return found


def leaves(tree: Any, path: tuple[Any, ...] = ()) -> dict[tuple[Any, ...], Any]:
    """Every value that is no object, with its type, so that true is not 1; empty objects count as values."""
    if isinstance(tree, dict) and tree:
        return {key: value for name, child in tree.items() for key, value in leaves(child, (*path, name)).items()}
    return {path: (type(tree).__name__, tree)}


def free(path: tuple[Any, ...], kind: str, value: Any, layers: dict[str, Any]) -> bool:
    """Whether a field of quantization_config may have this value in any checkpoint."""
    match path:
        case ("method",):
            return kind == "str" and re.fullmatch("[a-z0-9][a-z0-9-]{0,63}", value) is not None
        case ("family",) | ("source", "name"):
            return kind == "str"
        case ("pruning", "scope"):
            return value in ("off", "token", "batch") and kind == "str"
        case ("source", "revision"):
            return kind in ("str", "NoneType")
        case ("source", "parameters" | "bytes"):
            return kind == "int" and value >= 1
        case ("layers", number, role, "used_columns"):
            layer = layers[number]
            both = [layer[r]["used_columns"] for r in ("gate", "up")]
            in_range = kind == "int" and 0 <= value <= layer[role]["kept_columns"] and value % 8 == 0
            return in_range and (role == "down" or both[0] == both[1])
    return False


def sound_config(before: dict[str, Any], after: dict[str, Any]) -> bool:
    old, new = leaves(before), leaves(after)
    if set(old) != set(new):
        return False
    return all(old[path] == new[path] or free(path, *new[path], after["layers"]) for path in new)


def sound_integers(settings: dict[str, Any], integers: dict[str, np.ndarray]) -> bool:
    """Columns ascend and every group has as many; an index names stored U's, -1 trimmed experts; gate's are up's."""
    sizes = {"w1": settings["hidden_size"], "w3": settings["hidden_size"], "w2": settings["intermediate_size"]}
    roles = {name: role for role, name in settings["projections"].items()}
    for name, values in integers.items():
        _, number, _, _, _, projection, kind = re.split(r"\.", name.removeprefix("model."))
        layer, numbers = settings["layers"][number], values.tolist()
        if kind == "u_index":
            stored = layer[roles[projection]]["distinct_u"]
            for expert, u in enumerate(numbers):
                if not (u == -1 if expert in layer["trimmed"] else 0 <= u < stored):
                    return False
        else:
            groups, width = settings["pruning"]["groups"], sizes[projection] // settings["pruning"]["groups"]
            counts = [sum(1 for n in numbers if g * width <= n < (g + 1) * width) for g in range(groups)]
            if counts != [len(numbers) // groups] * groups or any(a >= b for a, b in pairwise(numbers)):
                return False
        if kind != "delta_columns" and projection == "w3":
            gate = integers.get(name.replace(".w3.", ".w1."))
            if gate is None or gate.tolist() != numbers:
                return False
    return True


def snapshot(folder: Path) -> dict[str, Any]:
    """Raises BrokenError."""
    index, manifest = read_json(folder / INDEX), read_json(folder / MANIFEST)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not isinstance(manifest, dict):
        raise BrokenError("no weight map, or no manifest")
    found: dict[str, Any] = {"specs": {}, "integers": {}, "where": {}, "sizes": {}}
    for file in {file for file in weight_map.values() if isinstance(file, str)}:
        if Path(file).name != file or "\0" in file or len(file) > 200:
            raise BrokenError(f"{file!r} is no name")
        specs, integers = read_weights(folder / file)
        if set(found["specs"]) & set(specs):
            raise BrokenError("a tensor in two files")
        found["specs"] |= specs
        found["integers"] |= integers
        found["where"] |= dict.fromkeys(specs, file)
        found["sizes"][file] = (folder / file).stat().st_size
    if found["where"] != weight_map:
        raise BrokenError("the index does not say where the tensors are")
    return {**found, "quantization": quantization(read_json(folder / CONFIG)), "manifest": manifest}


def sound_entries(found: dict[str, Any]) -> bool:
    """The manifest's files: each with its size and something that may be a hash."""
    files = found["manifest"].get("files")
    if not isinstance(files, dict) or set(files) != set(found["sizes"]):
        return False
    for file, entry in files.items():
        if not isinstance(entry, dict) or set(entry) != {"bytes", "sha256"}:
            return False
        size, sha = entry["bytes"], entry["sha256"]
        if type(size) is not int or size != found["sizes"][file]:
            return False
        if not isinstance(sha, str) or not re.fullmatch("[0-9a-f]{64}", sha):
            return False
    return True


def is_sound(original: dict[str, Any], folder: Path) -> bool:
    """original: `snapshot` of a sound checkpoint. Whether `folder` differs from it only in what the format leaves
    free: metadata, hashes (which `d2moe verify` compares), and values that another sound checkpoint could have."""
    try:
        found = snapshot(folder)
    except (BrokenError, OSError):
        return False
    if leaves(found["specs"]) != leaves(original["specs"]) or not sound_entries(found):
        return False
    others = [{k: v for k, v in content["manifest"].items() if k != "files"} for content in (original, found)]
    if leaves(others[0]) != leaves(others[1]):
        return False
    return sound_config(original["quantization"], found["quantization"]) and sound_integers(
        found["quantization"], found["integers"]
    )
