"""The finished checkpoint: written next to its final name, renamed at the very end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import d2moe_vllm
from d2moe_vllm.families import MODELING_FILE, auto_map, checkpoint_modeling_source
from d2moe_vllm.format.config import MANIFEST_FILE, RECIPE_FILE, STATS_FILE, Layer, Manifest
from d2moe_vllm.format.files import check_checkpoint
from d2moe_vllm.format.kinds import FORMAT_VERSION
from offline.checkpoint.assembly import Assembly
from offline.checkpoint.card import model_card
from offline.checkpoint.remotecode import modeling_sha256
from offline.io.folders import new_folder
from offline.io.shards import write_file, write_shards
from offline.plan.budget import Budget
from offline.plan.plan import Plan
from offline.source.tokens import CONFIG as TOKENIZER_CONFIG
from offline.source.tokens import Windows
from offline.work.workdir import WorkDir


def publish(
    plan: Plan,
    windows: Windows,
    work: WorkDir,
    out: Path,
    last_check: Callable[[], None],
    tokenizer_config: dict[str, Any] | None = None,
) -> None:
    """Put the layers of `work` and all that stays as it was together under `out`, all or nothing.

    plan: settled; tokenizer_config: what tokenizer_config.json has to say in place of the source's, None for what it
    says; last_check: called when all is written and has no name yet; what it raises leaves nothing behind.
    Raises InputError where `out` has come into being meanwhile.
    """
    model, budget, assembly = plan.model, plan.budget, Assembly(plan, work)

    def produce(name: str) -> Tensor:
        return assembly.tensor(name) if name in assembly else model.other_tensor(name)

    with new_folder(out) as folder:
        files = write_shards(folder, budget.shards, produce)
        written = {name: spec for shard in budget.shards for name, spec in shard.tensors.items()}
        others = {name: (spec.dtype, spec.shape) for name, spec in written.items() if name not in assembly}
        manifest = Manifest(other_tensors=others, files=files, modeling_sha256=modeling_sha256())
        write_file(folder / MANIFEST_FILE, manifest.model_dump_json(indent=1) + "\n")
        write_file(folder / "config.json", _json(_model_config(plan, budget)))
        write_file(folder / RECIPE_FILE, plan.recipe.dump())
        statistics = _stats(plan, windows, assembly)
        write_file(folder / STATS_FILE, _json(statistics))
        write_file(folder / MODELING_FILE, checkpoint_modeling_source())
        write_file(folder / "README.md", model_card(plan, budget, statistics))
        model.companions.copy(model.folder, folder)
        if tokenizer_config is not None:
            write_file(folder / TOKENIZER_CONFIG, _json(tokenizer_config))
        check_checkpoint(folder)
        last_check()


def _entry(layer: Layer) -> dict[str, Any]:
    """What a projection does not have is left out."""
    entry = layer.model_dump(mode="json", exclude_defaults=True)
    for role in layer.roles:
        if layer[role].kept_columns:
            entry[role]["used_columns"] = layer[role].used_columns
    return entry


def _model_config(plan: Plan, budget: Budget) -> dict[str, Any]:
    quantization = budget.config.model_dump(mode="json")
    if quantization["family_row"] is None:
        del quantization["family_row"]
    quantization["layers"] = {str(number): _entry(layer) for number, layer in budget.config.layers.items()}
    return {
        **plan.model.config,
        "auto_map": auto_map(plan.model.family.model_type),
        "quantization_config": quantization,
    }


def _stats(plan: Plan, windows: Windows, assembly: Assembly) -> dict[str, Any]:
    calibration = plan.recipe.calibration
    selection = assembly.selection()
    return {
        "format_version": FORMAT_VERSION,
        "written_by": f"d2moe-vllm {d2moe_vllm.__version__}",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "calibration": {
            "tokens_sha256": windows.sha256,
            "windows": calibration.windows,
            "seq_len": calibration.seq_len,
            "seed": calibration.seed,
        },
        # What `d2moe export` puts back.
        "source_auto_map": plan.model.config.get("auto_map"),
        **({"selection": selection} if selection else {}),
        "layers": assembly.reports(),
    }


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
