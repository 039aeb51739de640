"""Baselines for `d2moe compare`: the experts' weights rounded to 8, 4, 3 or 2 bits, each to the nearest level (rtn) or
with feedback (gptq), with one 16-bit scale for every 64 inputs (METHODS 4.1).

What is written is a checkpoint of the original architecture and size that holds the rounded numbers in the source's
dtype, which stock transformers and vLLM load; what codes and scales would take is counted. Their size is what it is,
whatever ratio is asked for.
"""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from d2moe_vllm.format.kinds import DTYPES, GROUP_SIZE, ROLES, SCALE_DTYPE, Role, storage_tensors
from offline.algebra.rounding import Rounded, round_matrix
from offline.compare.baselines import ROUNDED
from offline.compare.rewriting import Rewrite, dense_shards
from offline.io.progress import Steps
from offline.io.shards import TORCH_DTYPES
from offline.methods.layer import LayerJob
from offline.methods.settings import Base
from offline.methods.settings import Calibration as CalibrationSettings
from offline.plan.duration import layer_seconds
from offline.plan.make import make_plan
from offline.plan.plan import Plan
from offline.plan.recipe import Recipe
from offline.run.calibration import Calibration, open_sweep
from offline.run.sweep import Sweep
from offline.source.dense import DenseModel
from offline.source.sites import SITES
from offline.source.tokens import Windows
from offline.work.workdir import WorkDir, fingerprint


def rounded_expert_bytes(model: DenseModel, name: str) -> int:
    """Of all codes and scales."""
    shape, bits = model.shape, ROUNDED[name].bits
    stored = sum(
        spec.nbytes
        for role in ROLES
        for spec in storage_tensors(f"int{bits}", GROUP_SIZE, shape.projection(role)).values()
    )
    return len(shape.layers) * shape.num_experts * stored


def rounded_bytes(model: DenseModel, name: str) -> int:
    """Of the files, where experts are codes and scales."""
    written = sum(shard.nbytes for shard in dense_shards(model, model.shape.num_experts))
    return written - model.expert_bytes + rounded_expert_bytes(model, name)


def rounded_ratio(model: DenseModel, name: str) -> float:
    """Share of the source's bytes that is gone."""
    return round(1 - rounded_bytes(model, name) / model.reader.nbytes, 4)


def rounding_plan(model: DenseModel, calibration: CalibrationSettings, memory: int | None, device: str) -> Plan:
    """How the calibrating sweep runs on a device of this type: as that of a compression that needs no gradients, of
    which nothing else counts. Raises InputError where memory does not suffice."""
    # Any ratio that can be reached.
    ratio = round(min(model.expert_bytes / model.reader.nbytes, 1) / 2, 3)
    base = Base(kind="none", groups=1)
    recipe = Recipe(ratio=ratio, bits=16, allocation="uniform", base=base, calibration=calibration)
    return make_plan(model, recipe, memory=memory, device=device, allow_larger=True)


class Rounding(Calibration):
    """Rounds every layer's experts with feedback."""

    name = "rounded"

    def __init__(self, plan: Plan, work: WorkDir, sweep: Sweep, bits: int) -> None:
        super().__init__(plan, work, sweep)
        self.bits = bits

    def work_on(self, job: LayerJob) -> None:
        self.sweep.label(job.number, f"round to {self.bits} bits")
        work = layer_seconds(self.plan, self.sweep.model.device.type).write
        for expert in range(job.experts):
            weights = job.weights(expert)
            grams = {site: job.shrunk_gram(expert, weights, site) for site in dict.fromkeys(SITES.values())}
            found = {role: _round(weights[role], grams[SITES[role]], self.bits) for role in weights}
            job.save(f"{expert:05d}", {role: one.dense().to(self.plan.torch_dtype) for role, one in found.items()})
            self.sweep.steps.advance(work / job.experts)


def _round(weight: Tensor, gram: Tensor | None, bits: int) -> Rounded:
    return round_matrix(weight.float(), gram, bits, dtype=TORCH_DTYPES[SCALE_DTYPE])


def write_rounded(
    plan: Plan, name: str, windows: Windows, out: Path, folder: Path, device: torch.device, console: Console
) -> None:
    """The model rounded as the baseline `name` says, as a dense checkpoint in the new folder `out`. What is calibrated
    lies in `folder`, where an interrupted run is continued. Raises InputError where `out` exists."""
    model, (bits, feedback) = plan.model, ROUNDED[name]
    shards = dense_shards(model, model.shape.num_experts)
    record = {
        "baseline": name,
        "counted": {
            "bytes": rounded_bytes(model, name),
            "expert_bytes": rounded_expert_bytes(model, name),
            "parameters": sum(spec.numel for shard in shards for spec in shard.tensors.values()),
        },
    }
    if not feedback:
        dtype = TORCH_DTYPES[DTYPES[model.dtype]]

        def nearest(layer: int, expert: int, role: Role) -> Tensor:
            return _round(model.weight(layer, expert, role), None, bits).dense().to(dtype)

        Rewrite(model, model.shape.num_experts, nearest).write(out, record)
        return
    machine = {"device": device.type, "products": plan.resources.products}
    mark = fingerprint(model, plan.recipe.to_json(), windows.sha256, machine) | {"what": name}
    work = WorkDir(folder, mark, restart=True)
    try:
        costs = layer_seconds(plan, device.type)
        total = model.num_layers * costs.forward + len(model.shape.layers) * costs.write
        with Steps(total, console) as steps:
            sweep = open_sweep(plan, windows.tokens, work, steps, device)
            sweep.run(Rounding(plan, work, sweep, bits), work=total)

        def rounded(layer: int, expert: int, role: Role) -> Tensor:
            return work.load_part(layer, f"{expert:05d}", role)[role]

        Rewrite(model, model.shape.num_experts, rounded).write(out, record)
        work.remove()
    finally:
        work.close()
