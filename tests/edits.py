"""Changes to a written checkpoint that leave everything but the change itself consistent."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def accept(folder: Path) -> None:
    """Makes the manifest agree with the weight files as they are."""
    path = folder / "d2moe_manifest.json"
    manifest = json.loads(path.read_text())
    for name in manifest["files"]:
        content = (folder / name).read_bytes()
        manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    path.write_text(json.dumps(manifest))


def edit(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Changes one tensor where it lies, and the manifest with it."""
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            tensors[name] = change(tensors[name].clone()).contiguous()
            save_file(tensors, file, {"format": "pt"})
    accept(folder)


def add_records(
    folder: Path,
    layers: tuple[int, ...] = (0, 1, 2, 3),
    *,
    num_experts: int = 8,
    parameters: int | None = None,
    **more: object,
) -> None:
    """Recipe and statistics for a checkpoint that was not written by `compress`; `more` goes into the statistics.

    parameters: the source's true number, where the checkpoint does not say it.
    """
    (folder / "d2moe_recipe.yaml").write_text("ratio: 0.4\n")
    report = {
        "tokens": [1] * num_experts,
        "relative_error": {role: [0.5] * num_experts for role in ("gate", "up", "down")},
    }
    content = {"layers": {str(number): report for number in layers}, **more}
    (folder / "d2moe_stats.json").write_text(json.dumps(content))
    if parameters:
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"]["source"]["parameters"] = parameters
        (folder / "config.json").write_text(json.dumps(config))
