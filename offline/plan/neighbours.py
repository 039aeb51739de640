"""What other wishes than --fit's would take: scaled from its plan, and about right."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from d2moe_vllm.format.config import CheckpointConfig
from offline.plan.needs import Needs, beside, needs, uncompressed
from offline.plan.recipe import Recipe
from offline.plan.resident import expert_bytes, other_bytes, parallel_problem
from offline.plan.serving import Resolved
from offline.source.dense import DenseModel

DEVICES = (16, 24, 40, 48, 80)
"""GB of usual devices, for the neighbours of a result."""


@dataclass(frozen=True)
class Neighbour:
    """Another wish and what it would take. what: the change; device_bytes: of one device; ratio, files: about; None
    where `verdict` says why not."""

    what: str
    device_bytes: int
    ratio: float | None
    files: int | None
    verdict: str


def neighbours(
    model: DenseModel, recipe: Recipe, wanted: Needs, files: int, config: CheckpointConfig, least: int
) -> Iterator[Neighbour]:
    """Half and twice of what was asked, twice the devices, and usual ones.

    files, config: of the plan; least: bytes of the smallest files.
    """
    serving, positions = wanted.serving, model.max_positions
    wishes: list[tuple[str, Mapping[str, Any]]] = []
    for what, field in (("--max-model-len", "max_model_len"), ("--max-num-seqs", "max_num_seqs")):
        value = getattr(serving, field)
        for other in (value // 2, value * 2):
            most = positions if field == "max_model_len" else serving.max_num_batched_tokens
            if other and (not most or other <= most):
                wishes.append((f"{what} {other}", {field: other}))
    if serving.kv_cache_dtype == "auto":
        wishes.append(("--kv-cache-dtype fp8", {"kv_cache_dtype": "fp8"}))
    ranks = 2 * serving.tensor_parallel_size
    whole = serving.expert_parallel
    if not parallel_problem(model.settings, model.family, recipe.base.groups, ranks, expert_parallel=whole):
        wishes.append((f"--tensor-parallel-size {ranks}", {"tensor_parallel_size": ranks}))
    for device in DEVICES:
        if device * 10**9 != serving.device_bytes:
            wishes.append((f"--fit {device}GB", {"device_bytes": device * 10**9}))
    for what, changes in wishes:
        other_serving = serving.changed(model.settings, **changes)
        ranks = other_serving.tensor_parallel_size
        # Experts' bytes on a rank for each byte of files.
        share = expert_bytes(config, ranks, expert_parallel=whole) / (files - beside(model))
        yield _neighbour(model, recipe, other_serving, what, share, least)


def _neighbour(model: DenseModel, recipe: Recipe, serving: Resolved, what: str, share: float, least: int) -> Neighbour:
    ranks, source = serving.tensor_parallel_size, model.reader.nbytes
    room = needs(model, recipe, serving).weights
    others = other_bytes(model.other_tensors, model.settings, model.family, ranks)
    if room >= uncompressed(model, ranks):
        return Neighbour(what, serving.device_bytes, None, None, "fits uncompressed")
    files = beside(model) + int((room - others) / share)
    if files < least or room < others:
        return Neighbour(what, serving.device_bytes, None, None, "does not fit")
    most = _most(model, recipe)
    verdict = ""
    if most < files:
        verdict = "more bytes would save nothing" if most < source else "hardly smaller than the original"
    files = min(files, most)
    return Neighbour(what, serving.device_bytes, round(1 - files / source, 3), files, verdict)


def _most(model: DenseModel, recipe: Recipe) -> int:
    """Bytes of files from which on more save nothing: experts whole in the most bits of the recipe, and scales."""
    bits = 8 if recipe.bits == "auto" else recipe.bits
    if bits == 16 or not recipe.priced:
        return model.reader.nbytes
    numbers = len(model.shape.layers) * model.shape.num_experts * model.shape.expert_parameters
    return min(
        beside(model) + numbers * (bits * recipe.group_size + 16) // (8 * recipe.group_size), model.reader.nbytes
    )
