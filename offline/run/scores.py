"""Scores of the experts' intermediate channels on the calibration text: sum (dL/dh * h)² (METHODS, Baselines)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from d2moe_vllm.format.kinds import DTYPE_BYTES, DTYPES
from offline.errors import InputError
from offline.io.progress import Steps
from offline.methods.layer import LayerJob
from offline.methods.settings import Base
from offline.methods.settings import Calibration as CalibrationSettings
from offline.plan.make import make_plan
from offline.plan.plan import Plan
from offline.plan.recipe import Recipe
from offline.plan.resources import backward_work, layer_work
from offline.run.calibration import Calibration, open_sweep
from offline.source.dense import DenseModel
from offline.source.tokens import Windows
from offline.work.statistics import gradients
from offline.work.workdir import WorkDir, fingerprint

PART = "channels"
"""A layer's part that holds its scores."""

Scores = Mapping[int, Tensor]
"""Layer -> float64 [experts, intermediate]."""


class Scoring(Calibration):
    """Scores every layer's channels."""

    name = "scored"
    backwards = True

    def work_on(self, job: LayerJob) -> None:
        self.sweep.label(job.number, "channel scores")
        scores, work = [], layer_work(self.plan).merge
        for expert in range(job.experts):
            weighted = self.plan.recipe.delta.gate_weighted
            found = gradients(
                job.weights(expert), job.routing, expert, job.activation, fisher=False, gate_weighted=weighted
            )
            scores.append(found.channels.cpu())
            self.sweep.steps.advance(work / job.experts)
        every = torch.stack(scores)
        if not torch.isfinite(every).all():
            raise InputError(f"layer {job.number}: gradients overflow on the calibration text; use another")
        self.work.save_part(job.number, PART, {"scores": every})


def sweep_plan(model: DenseModel, calibration: CalibrationSettings, memory: int | None, *, backwards: bool) -> Plan:
    """How a sweep runs that only looks: as that of a compression that needs gradients, or none, of which nothing else
    counts. Raises InputError where memory does not suffice."""
    shape, width = model.shape, DTYPE_BYTES[DTYPES[model.dtype]]
    share = len(shape.layers) * shape.num_experts * shape.expert_parameters * width / model.reader.nbytes
    # Any ratio that can be reached.
    ratio = round(min(share, 1) / 2, 3)
    recipe = Recipe(
        ratio=ratio,
        bits=16,
        allocation="adaptive" if backwards else "uniform",
        base=Base(kind="none", groups=1),
        calibration=calibration,
    )
    return make_plan(model, recipe, memory=memory, allow_larger=True)


def score_channels(plan: Plan, windows: Windows, folder: Path, device: torch.device, console: Console) -> Scores:
    """Scores of all channels over the calibration windows, by a plan of `sweep_plan`; activations lie in `folder`,
    where an interrupted run is continued. Raises InputError where gradients overflow."""
    model, costs = plan.model, layer_work(plan)
    mark = fingerprint(model, plan.recipe.to_json(), windows.sha256, {"device": device.type}) | {"what": PART}
    work = WorkDir(folder, mark, restart=True)
    try:
        total = backward_work(plan, first=True) + len(model.shape.layers) * costs.merge
        with Steps(total, console) as steps:
            sweep = open_sweep(plan, windows.tokens, work, steps, device)
            sweep.run(Scoring(plan, work, sweep), work=total)
        found = {layer: work.load_part(layer, PART)["scores"] for layer in model.shape.layers}
        work.remove()
    finally:
        work.close()
    return found
