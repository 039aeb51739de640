"""`d2moe verify`: is a compressed checkpoint whole, unchanged, finite, and close to its source?"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from d2moe_vllm.format.config import MANIFEST_FILE, RECIPE_FILE, CheckpointConfig, CheckpointError, Manifest
from d2moe_vllm.format.files import check_checkpoint, read_config, read_manifest, refuse_special
from d2moe_vllm.format.kinds import Role
from offline.checkpoint.inspect import read_statistics
from offline.checkpoint.reconstruction import Reconstruction
from offline.checkpoint.remotecode import check_code
from offline.errors import InputError
from offline.io.progress import Steps
from offline.io.shards import Reader, all_finite
from offline.methods import find_method
from offline.plan.recipe import load_recipe
from offline.source.dense import DenseModel, read_model_config
from offline.source.families import find_family, read_shape
from offline.source.layerwise import check_parameters, read_hf_config
from offline.source.original import open_original
from offline.source.stored import expert_tensors

CHUNK = 1 << 22
"""Bytes hashed at a time."""
NORM_TOLERANCE = 1e-4
"""Relative; norms are float32 sums, whose order differs between machines."""


class Findings:
    """problems: what makes the checkpoint unsound; notes: what may be intended. One line each."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.notes: list[str] = []

    @contextlib.contextmanager
    def collect(self) -> Iterator[None]:
        """Notes an error of the block as a problem and goes on behind it."""
        try:
            yield
        except (CheckpointError, InputError) as error:
            message = " ".join(str(error).split())
            if message not in self.problems:
                self.problems.append(message)


def verify(folder: Path, source: str | None, steps: Callable[[float], Steps]) -> dict[str, Any]:
    """Everything `d2moe verify --json` prints; `sound` is the verdict, `problems` what speaks against it.

    source: the dense original to compare with; all that is not an expert must be equal byte by byte, and the
    experts' relative errors ||W - W'|| / ||W|| (Frobenius, plain) are reported per layer and projection.
    One tensor in memory at a time. Raises InputError where CKPT is no folder or SRC another model.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; give a compressed checkpoint")
    found = Findings()
    config, manifest = None, None
    with found.collect():
        config = read_config(folder)
    with found.collect():
        manifest = read_manifest(folder)
    model = open_original(source, config) if source and config else None
    whole = False
    if config and manifest:
        with found.collect():
            check_checkpoint(folder, config)
            whole = True
    files = _weight_files(folder, manifest, found)
    layers: dict[str, Any] = {}
    sizes = sum(file.stat().st_size for file in files)
    with steps(max(2 * sizes + _comparison_work(model), 1)) as progress:
        _check_hashes(folder, manifest, files, found, progress)
        for file in files:
            _check_values(file, found, progress)
        _check_records(folder, config, found)
        problems, notes = check_code(folder, config, manifest)
        found.problems += problems
        found.notes += notes
        if config and whole:
            reader = Reader(folder)
            _check_places(config, reader, found)
            _check_norms(config, reader, found)
            if model:
                _compare_others(config, reader, model, found, progress)
                layers = _compare_experts(config, reader, model, found, progress)
    if source and not whole:
        found.notes.append("not compared with the source: the checkpoint is not whole")
    return {
        "path": str(folder),
        "source": source,
        "sound": not found.problems,
        "problems": found.problems,
        "notes": found.notes,
        "files": len(files),
        "bytes": sizes,
        "layers": layers,
    }


def _weight_files(folder: Path, manifest: Manifest | None, found: Findings) -> list[Path]:
    """Those that can be read; the others are problems: a link that leads nowhere, a folder, a pipe."""
    files = []
    for file in sorted(folder.glob("*.safetensors")):
        message = ""
        try:
            refuse_special(file)
            files.append(file)
        except FileNotFoundError:
            # One that the manifest lists is named with all that are missing.
            if not manifest or file.name not in manifest.files:
                message = f"{file}: a link that leads nowhere; remove it"
        except OSError as error:
            message = f"{file}: damaged or truncated ({error}); copy it again"
        if message and message not in found.problems:
            found.problems.append(message)
    return files


def _check_hashes(folder: Path, manifest: Manifest | None, files: list[Path], found: Findings, progress: Steps) -> None:
    """SHA-256 of every weight file against the manifest, and files that are only on one side."""
    progress.label("hashing the weight files")
    entries = manifest.files if manifest else {}
    for file in files:
        digest = hashlib.sha256()
        with file.open("rb") as opened:
            while chunk := opened.read(CHUNK):
                digest.update(chunk)
                progress.advance(len(chunk))
        if manifest and file.name not in entries:
            found.problems.append(f"{file}: a weight file that {MANIFEST_FILE} does not list; remove it")
        elif manifest and digest.hexdigest() != entries[file.name].sha256:
            found.problems.append(f"{file}: its SHA-256 is not that of {MANIFEST_FILE}; copy the file again")
    for name in sorted(set(entries) - {file.name for file in folder.glob("*.safetensors") if file.exists()}):
        message = f"{folder}: weight file {name} is missing; copy it again"
        if message not in found.problems:
            found.problems.append(message)


def _check_values(file: Path, found: Findings, progress: Steps) -> None:
    """NaN and infinity in every floating tensor of a file, by name."""
    progress.label(f"checking the numbers of {file.name}")
    done = 0
    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dict
                tensor = opened.get_tensor(name)
                if not all_finite(tensor):
                    bad = int((~torch.isfinite(tensor)).sum())
                    found.problems.append(f"{file}: {name} holds {bad} NaN or infinite values; compress again")
                done += tensor.nbytes
                progress.advance(tensor.nbytes)
    except (SafetensorError, OSError) as error:
        message = f"{file}: damaged or truncated ({error}); copy it again"
        if message not in found.problems:
            found.problems.append(message)
    progress.advance(max(file.stat().st_size - done, 0))


def _check_places(config: CheckpointConfig, reader: Reader, found: Findings) -> None:
    """Whether the model that config.json describes has a place for every tensor, and a tensor for every place."""
    with found.collect():
        content = read_model_config(reader.folder)
        family = find_family(content)
        shape = read_shape(family, content)
        dense = [layer for layer in shape.layers if layer not in config.layers]
        experts = {*config.expert_tensors(), *(name for name, _ in expert_tensors(shape, family.layouts[0], dense))}
        for name in sorted(check_parameters(family, read_hf_config(reader.folder), reader, shape.layers, experts)):
            found.problems.append(
                f"{reader.folder / reader.weight_map[name]}: {name} has no place in the model, and vLLM would not load "
                "it; compress again"
            )


def _check_norms(config: CheckpointConfig, reader: Reader, found: Findings) -> None:
    """base_norms are those of the base as it is stored, of a packed one of what its codes stand for. Which columns
    belong where `check_checkpoint` has checked."""
    stands_for = Reconstruction(reader, config)
    for layer in config.layers:
        for role in config.roles:
            if not config.layers[layer][role].kept_columns:
                continue
            try:
                computed = stands_for.numbers(layer, 0, role, "base").norm(dim=0)
            except CheckpointError:  # not finite, which is reported by itself
                continue
            name = config.tensor_name(layer, 0, role, "base_norms")
            stored = reader.tensor(name)
            if not torch.allclose(stored, computed, rtol=NORM_TOLERANCE, atol=1e-12):
                column = int((stored - computed).abs().nan_to_num(float("inf")).argmax())
                found.problems.append(
                    f"{reader.folder / reader.weight_map[name]}: {name}[{column}] is {float(stored[column]):.6g}, the "
                    f"base's column has norm {float(computed[column]):.6g}; copy the checkpoint again"
                )


def _check_records(folder: Path, config: CheckpointConfig | None, found: Findings) -> None:
    """Recipe and statistics, which no weight depends on."""
    with found.collect():
        load_recipe(folder / RECIPE_FILE, {})
    if config:
        with found.collect():
            find_method(config.method)
    with found.collect():
        statistics = read_statistics(folder)
        if config and (lacking := {str(layer) for layer in config.layers} - set(statistics["layers"])):
            raise CheckpointError(f"{folder}: the statistics lack layer {min(lacking, key=int)}; copy them again")


def _comparison_work(model: DenseModel | None) -> int:
    """Bytes of the source that are compared."""
    return sum(spec.nbytes for spec in model.reader.specs.values()) if model else 0


def _compare_others(
    config: CheckpointConfig, reader: Reader, model: DenseModel, found: Findings, progress: Steps
) -> None:
    """All that was not compressed: the same names, and the same bytes (of an fp8 source the dequantised ones)."""
    progress.label("comparing what was not compressed")
    expected = dict(model.other_tensors)
    for layer in set(model.shape.layers) - set(config.layers):
        expected |= model.kept_experts(layer)
    experts = config.expert_tensors()
    for name in [name for name in reader.specs if name not in expected and name not in experts]:
        found.problems.append(f"{reader.folder / reader.weight_map[name]}: {name} is not in the source; compress again")
    for name, spec in expected.items():
        if name not in reader.specs:
            found.problems.append(f"{reader.folder}: {name} of the source is not in the checkpoint; compress again")
            continue
        path = reader.folder / reader.weight_map[name]
        if reader.specs[name] != spec:
            found.problems.append(f"{path}: {name} is {reader.specs[name]}, in the source {spec}; compress again")
        elif not _equal(reader.tensor(name), model.other_tensor(name)):
            found.problems.append(f"{path}: {name} differs from the source; compress again, or give the right source")
        progress.advance(spec.nbytes)


def _equal(first: Tensor, second: Tensor) -> bool:
    """Byte by byte: NaN equals itself, 0 is not -0."""
    return torch.equal(*(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (first, second)))


def _compare_experts(
    config: CheckpointConfig, reader: Reader, model: DenseModel, found: Findings, progress: Steps
) -> dict[str, Any]:
    """Per compressed layer and role the relative error: mean over experts, and the worst with its number."""
    rebuilt = Reconstruction(reader, config)
    layers: dict[str, Any] = {}
    for layer in config.layers:
        progress.label(f"layer {layer}: reconstruction against the source")
        errors: dict[Role, list[float]] = {role: [] for role in config.roles}
        with found.collect():  # a tensor with NaN: named already, and the layer has no error
            for role in config.roles:
                for expert in range(config.num_experts):
                    weight = model.weight(layer, expert, role)
                    errors[role].append(relative_error(weight.float(), rebuilt.weight(layer, expert, role)))
                    progress.advance(weight.nbytes)
            layers[str(layer)] = {role: _summary(values) for role, values in errors.items()}
    return layers


def _summary(errors: list[float]) -> dict[str, float]:
    worst = max(range(len(errors)), key=errors.__getitem__)
    return {"mean": sum(errors) / len(errors), "worst": errors[worst], "worst_expert": worst}


def relative_error(weight: Tensor, approximation: Tensor) -> float:
    """||W - W'||_F / ||W||_F, plain, norms in float64; of a W of zeros 0 if W' is zero too, else 1."""
    difference = float(torch.linalg.vector_norm(weight - approximation, dtype=torch.float64))
    total = float(torch.linalg.vector_norm(weight, dtype=torch.float64))
    return difference / total if total > 0 else float(difference > 0)
