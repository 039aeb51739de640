"""Random structural damage to a checkpoint, by kind. Each kind draws what it does from a seeded generator."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from edits import accept
from soundness import CONFIG, INDEX, MANIFEST

NONSENSE: tuple[bytes, ...] = (
    b"", b" ", b"null", b"7", b'"x"', b"[]", b"{}", b"{", b"[1, 2", b"\0" * 64, b"\xff\xfe{}", b"\xef\xbb\xbf{}",
    b"[" * 200_000, b'{"a":' * 200_000, b'{"a": ' + b"9" * 6000 + b"}", b'{"a": NaN}', b'{"a": 1e999}',
    b"pickle" * 1000, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    b"<html><title>404</title></html>",
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 7, 8, 9, 64, 10**6, 2**31, 2**63, 10**30, -(2**63), 1.5, -0.5, 1e308, "", "0", "8",
    "off", "token", "factors", "columns", "bases", "dense", "silu", "../..", "/etc/passwd", "a\nb", "\ud800",
    "x" * 9999, [], [0], [3, 1], [1, 1], {}, {"a": 1},
)  # fmt: skip
NAMES: tuple[Any, ...] = (
    "../model.safetensors", "../../etc/passwd", "/etc/passwd", "/dev/zero", "", ".", "..", "a/b.safetensors", "./x",
    "..\\x.safetensors", "x.safetensors\0", "x\n.safetensors", "~.safetensors", ".hidden.safetensors", "x.bin",
    "%2e%2e%2fx.safetensors", "x" * 5000 + ".safetensors", "ghost.safetensors", "données.safetensors", 7, None, [], {},
    "model-00001-of-00002.safetensors ", "MODEL-00001-OF-00002.SAFETENSORS", "http://example.com/x.safetensors",
    "model-00001-of-00002.safetensors/../model-00001-of-00002.safetensors", "config.json", True,
)  # fmt: skip


class Victim:
    """A copy of a checkpoint: its files are linked to the original's, and replaced when they are changed."""

    def __init__(self, original: Path, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        for path in original.iterdir():
            os.link(path, folder / path.name)
        self.weights = sorted(path.name for path in folder.glob("*.safetensors"))

    def put(self, name: str, content: bytes) -> None:
        (self.folder / name).unlink(missing_ok=True)
        (self.folder / name).write_bytes(content)

    def get(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()

    def json(self, name: str) -> Any:
        return json.loads(self.get(name))

    def put_json(self, name: str, content: Any) -> None:
        self.put(name, json.dumps(content).encode())

    def header(self, name: str) -> tuple[dict[str, Any], bytes]:
        content = self.get(name)
        size = int.from_bytes(content[:8], "little")
        return json.loads(content[8 : 8 + size]), content[8 + size :]

    def put_weights(self, name: str, header: Any, data: bytes, chance: random.Random) -> None:
        """header: what becomes JSON, or its text. In half of the cases the manifest agrees with the new file."""
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self.put(name, len(text).to_bytes(8, "little") + text + data)
        if chance.random() < 0.5:
            self.put(MANIFEST, self.get(MANIFEST))
            accept(self.folder)


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all values in it, objects' and lists' own included."""
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path, *(place for name, child in children for place in places(child, (*path, name)))]


def at(tree: Any, path: tuple[Any, ...]) -> Any:
    for name in path:
        tree = tree[name]
    return tree


def change_tree(tree: Any, root: tuple[Any, ...], chance: random.Random) -> None:
    """One value below `root` dropped, replaced, nudged, renamed, or one added."""
    path = chance.choice([place for place in places(at(tree, root)) if place])
    parent, name = at(tree, root + path[:-1]), path[-1]
    match chance.choice(("drop", "replace", "nudge", "rename", "add")):
        case "drop":
            del parent[name]
        case "nudge" if type(parent[name]) is int:
            parent[name] += chance.choice((-8, -1, 1, 8))
        case "rename" if isinstance(name, str):
            parent[name + chance.choice(("x", " ", "\n", ".0"))] = parent.pop(name)
        case "add" if isinstance(parent, dict):
            parent[chance.choice(("surprise", "", "00", "rank", "4", "-1", "1e3", "٣"))] = chance.choice(VALUES)
        case "add" if isinstance(parent, list):
            parent.append(chance.choice(VALUES))
        case _:
            parent[name] = chance.choice(VALUES)


def config_field(victim: Victim, chance: random.Random) -> None:
    content = victim.json(CONFIG)
    change_tree(content, ("quantization_config",), chance)
    victim.put_json(CONFIG, content)


def config_layer(victim: Victim, chance: random.Random) -> None:
    """The fields that decide what is stored are few among many: damaged by themselves."""
    content = victim.json(CONFIG)
    layers = content["quantization_config"]["layers"]
    number = chance.choice(list(layers))
    match chance.choice(("field", "field", "field", "swap", "number", "huge", "missing")):
        case "swap":
            other = chance.choice([key for key in layers if key != number])
            layers[number], layers[other] = layers[other], layers[number]
        case "number":
            layers[chance.choice(("9999", "-1", "0x1", f"0{number}", f" {number}", f"{number}.0", "one"))] = layers[
                number
            ]
        case "missing":
            del layers[number]
        case "huge":
            content["quantization_config"]["num_experts"] = chance.choice((9, 1000, 99_999, 100_001, 10**18))
        case _:
            change_tree(layers, (number,), chance)
    victim.put_json(CONFIG, content)


def manifest_field(victim: Victim, chance: random.Random) -> None:
    content = victim.json(MANIFEST)
    change_tree(content, (), chance)
    victim.put_json(MANIFEST, content)


def index_field(victim: Victim, chance: random.Random) -> None:
    content = victim.json(INDEX)
    change_tree(content, ("weight_map",), chance)
    victim.put_json(INDEX, content)


def text(victim: Victim, chance: random.Random) -> None:
    """A JSON file that is cut, overwritten, or something else altogether."""
    name = chance.choice((CONFIG, INDEX, MANIFEST))
    content = bytearray(victim.get(name))
    match chance.choice(("cut", "bytes", "nonsense", "nonsense")):
        case "cut":
            del content[chance.randrange(len(content)) :]
        case "bytes":
            for _ in range(chance.choice((1, 1, 4, 100))):
                content[chance.randrange(len(content))] = chance.randrange(256)
        case _:
            content = bytearray(chance.choice(NONSENSE))
    victim.put(name, bytes(content))


def twice(victim: Victim, chance: random.Random) -> None:
    """A name that is there twice: in a JSON file, or a tensor in a header."""
    name = chance.choice((CONFIG, INDEX, MANIFEST, *victim.weights))
    if name in victim.weights:
        header, data = victim.header(name)
        tensor = chance.choice([key for key in header if key != "__metadata__"])
        first = {**header[tensor], "shape": chance.choice((header[tensor]["shape"], [1], [2**40]))}
        body = json.dumps({tensor: first})[:-1] + ", " + json.dumps(header)[1:]
        victim.put_weights(name, body.encode(), data, chance)
        return
    content = victim.json(name)
    inner = [place for place in places(content) if place and isinstance(place[-1], str)]
    path = chance.choice(inner)
    parent, key = at(content, path[:-1]), path[-1]
    parent["\0first"], value = chance.choice(VALUES), parent.pop(key)
    parent[key] = value
    victim.put(name, json.dumps(content).replace(json.dumps("\0first"), json.dumps(key)).encode())


def path_in_index(victim: Victim, chance: random.Random) -> None:
    """A name that leads out of the folder, or nowhere; of one tensor, or of a file with all its tensors."""
    content, name = victim.json(INDEX), chance.choice(NAMES)
    tensors = list(content["weight_map"])
    if chance.random() < 0.5:
        content["weight_map"][chance.choice(tensors)] = name
    else:
        file = chance.choice(victim.weights)
        content["weight_map"] = {t: name if f == file else f for t, f in content["weight_map"].items()}
        manifest = victim.json(MANIFEST)
        if isinstance(name, str):
            manifest["files"][name] = manifest["files"].pop(file)
        victim.put_json(MANIFEST, manifest)
    victim.put_json(INDEX, content)


def special_file(victim: Victim, chance: random.Random) -> None:
    """A link, a pipe, a device, a folder or a file of any size, where a file of the checkpoint should be."""
    name = chance.choice((CONFIG, INDEX, MANIFEST, *victim.weights, *victim.weights))
    path, other = victim.folder / name, victim.folder / chance.choice(victim.weights)
    kept = victim.folder / "kept"
    path.rename(kept)
    match chance.choice(("gone", "nowhere", "loop", "folder", "pipe", "device", "other", "sparse", "aside")):
        case "nowhere":
            path.symlink_to("/nowhere/at/all")
        case "loop":
            path.symlink_to(path)
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "device":
            path.symlink_to(chance.choice(("/dev/zero", "/dev/null", "/dev/full", "/proc/self/mem")))
        case "other":
            path.symlink_to(other)
        case "sparse":
            path.touch()
            os.truncate(path, chance.choice((8, 1 << 20, 1 << 33, 1 << 40)))
        case "aside":  # as in the Hub's cache: sound
            path.symlink_to(kept)


def cut_weights(victim: Victim, chance: random.Random) -> None:
    """A weight file that ends too early or too late, or a range of it overwritten in its header."""
    name = chance.choice(victim.weights)
    content = bytearray(victim.get(name))
    size = int.from_bytes(content[:8], "little")
    match chance.choice(("cut", "cut header", "longer", "length", "bytes")):
        case "cut":
            del content[chance.randrange(len(content)) :]
        case "cut header":
            del content[chance.randrange(size + 8) :]
        case "longer":
            content += bytes(chance.choice((1, 8, 4096)))
        case "length":
            length = chance.choice((0, 1, size - 1, size + 1, size + 8, 10**8, 10**8 + 1, 2**32, 2**63, 2**64 - 1))
            content[:8] = length.to_bytes(8, "little")
        case _:
            for _ in range(chance.choice((1, 1, 4, 100))):
                content[8 + chance.randrange(size)] = chance.randrange(256)
    victim.put(name, bytes(content))
    if chance.random() < 0.5:
        victim.put(MANIFEST, victim.get(MANIFEST))
        accept(victim.folder)


def header_entry(victim: Victim, chance: random.Random) -> None:
    """Dtype, shape, offsets or name of one tensor."""
    name = chance.choice(victim.weights)
    header, data = victim.header(name)
    tensor = chance.choice([key for key in header if key != "__metadata__"])
    entry = header[tensor]
    match chance.choice(("dtype", "shape", "offsets", "rename", "drop", "add", "field")):
        case "dtype":
            entry["dtype"] = chance.choice(
                ("BF16", "F16", "F32", "I32", "I16", "U16", "F64", "I64", "BOOL", "Q4", "", 7)
            )
        case "shape":
            size = int(np.prod(entry["shape"]))
            shapes = ([size], [1, *entry["shape"]], entry["shape"][::-1], [], [0], [size + 1], [-1], [2**40, 2**40],
                      [2**64], [10**30], [1.5], None, "x", [size // 2, 2])  # fmt: skip
            entry["shape"] = chance.choice(shapes)
        case "offsets":
            start, end = entry["data_offsets"]
            size, after = len(data), len(data) + end - start
            pairs = ([end, start], [start, start], [0, end], [start, end + 8], [start - 8, end], [0, 2**63], [-8, 0])
            entry["data_offsets"] = chance.choice((*pairs, [start], None, [size, after]))
        case "rename":
            changes = (tensor + "x", tensor[:-1], tensor.replace(".0.", ".1.", 1), "", "a\nb" + tensor, "x" * 70_000)
            header[chance.choice(changes)] = header.pop(tensor)
        case "drop":
            del header[tensor]
        case "add":
            header[chance.choice(("extra", f"{tensor}.x"))] = {
                "dtype": "F32", "shape": [2], "data_offsets": [len(data), len(data) + 8],
            }  # fmt: skip
            data += bytes(8)
        case _:
            change_tree(header, (tensor,), chance)
    victim.put_weights(name, header, data, chance)


def between_files(victim: Victim, chance: random.Random) -> None:
    """A tensor in both files, or moved to the other; files swapped, or one in the place of the other."""
    here, there = chance.sample(victim.weights, 2)
    header, data = victim.header(here)
    other, more = victim.header(there)
    tensor = chance.choice([key for key in header if key != "__metadata__"])
    match chance.choice(("both", "moved", "swapped", "one for the other", "index moved")):
        case "swapped":
            contents = victim.get(here), victim.get(there)
            victim.put(here, contents[1])
            victim.put(there, contents[0])
        case "one for the other":
            victim.put(here, victim.get(there))
        case "index moved":
            index = victim.json(INDEX)
            index["weight_map"][tensor] = there
            victim.put_json(INDEX, index)
        case what:
            start, end = header[tensor]["data_offsets"]
            offsets = [len(more), len(more) + end - start]
            other[tensor] = {**header[tensor], "data_offsets": offsets}
            victim.put_weights(there, other, more + data[start:end], chance)
            if what == "moved":  # the last one leaves no gap behind
                tensor = max((key for key in header if key != "__metadata__"), key=lambda k: header[k]["data_offsets"])
                start, _ = header.pop(tensor)["data_offsets"]
                victim.put_weights(here, header, data[:start], chance)


def integers(victim: Victim, chance: random.Random) -> None:
    """Values of base_columns, delta_columns or u_index; the manifest agrees, so that nothing else is wrong."""
    name = victim.weights[-1]
    header, data = victim.header(name)
    tensor = chance.choice([key for key, entry in header.items() if entry.get("dtype") == "I32"])
    start, end = header[tensor]["data_offsets"]
    values = np.frombuffer(data[start:end], "<i4").copy()
    one, two = chance.randrange(len(values)), chance.randrange(len(values))
    match chance.choice(("set", "swap", "copy", "shift", "reverse", "next", "shuffle")):
        case "set":
            values[one] = chance.choice((-1, -2, 0, 3, 7, 8, 127, 128, 255, 256, 2**31 - 1, -(2**31)))
        case "swap":
            values[[one, two]] = values[[two, one]]
        case "copy":
            values[one] = values[two]
        case "shift":
            values += chance.choice((-16, -1, 1, 16))
        case "reverse":
            values = values[::-1]
        case "next":
            values[one] += chance.choice((-1, 1))
        case _:
            values = np.array(chance.sample(values.tolist(), len(values)), "<i4")
    victim.put(name, victim.get(name)[: -len(data)] + data[:start] + values.tobytes() + data[end:])
    victim.put(MANIFEST, victim.get(MANIFEST))
    accept(victim.folder)


KINDS: dict[str, Callable[[Victim, random.Random], None]] = {
    "JSON that is nonsense, cut or overwritten": text,
    "config: a field missing, added or wrong": config_field,
    "config: layers": config_layer,
    "manifest: a field missing, added or wrong": manifest_field,
    "index: an entry missing, added or wrong": index_field,
    "index: paths": path_in_index,
    "a name twice": twice,
    "links, pipes, devices, folders": special_file,
    "weight file cut, lengthened, header overwritten": cut_weights,
    "header: dtype, shape, offsets, name": header_entry,
    "tensors in the wrong file, or in two": between_files,
    "columns and indices": integers,
}
