"""Which layers are compressed, of methods that leave some as they are: those that matter least.

How many is known from the ratio alone, which ones after every layer has been looked at: see offline/plan/selection.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from offline.methods import METHODS
from offline.methods.layer import LayerJob
from offline.work.workdir import WorkDir

PART = "selection"
"""A layer's part that holds its sensitivity."""


def look_at(job: LayerJob) -> None:
    """Writes the part `selection`: float64 [1], how much the layer matters."""
    choice = METHODS[job.plan.recipe.method].choice
    assert choice is not None, "the method compresses all layers"
    total = torch.tensor([choice.sensitivity(job)], dtype=torch.float64)
    job.work.group.sum([total])
    if job.work.group.first:
        job.save(PART, {"sensitivity": total})
    job.work.group.barrier()


def sensitivities(work: WorkDir, layers: Sequence[int]) -> dict[int, float]:
    """Of every layer, once all have been looked at."""
    return {layer: float(work.load_part(layer, PART)["sensitivity"]) for layer in layers}


def least_sensitive(found: Mapping[int, float], count: int) -> tuple[int, ...]:
    """The `count` layers with the lowest figure, ascending; of equals the lower number."""
    return tuple(sorted(sorted(found, key=lambda layer: (found[layer], layer))[:count]))
