"""What a compression will give and cost, before any work is done."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from d2moe_vllm.checkpoint import ROLES, CheckpointConfig, Pruning, Source
from offline.budget import Budget, Problem, draft_layers, solve_paper, solve_stored
from offline.errors import InputError
from offline.merging import NEEDS_FISHER
from offline.recipe import Recipe
from offline.shards import SHARD_BYTES
from offline.source import DenseModel

BATCH_TOKENS = 4096
"""Tokens that run through a layer at once during calibration and evaluation."""
PROCESS_BYTES = 600_000_000
"""A Python process with torch and transformers imported."""


@dataclass(frozen=True)
class Plan:
    """recipe: with every `auto` decided; budget: exact files, bytes and ranks."""

    model: DenseModel
    recipe: Recipe
    budget: Budget

    @property
    def config(self) -> CheckpointConfig:
        return self.budget.config

    @property
    def needs_fisher(self) -> bool:
        return self.recipe.base.merge in NEEDS_FISHER

    @property
    def windows(self) -> tuple[int, int, int]:
        """Shape of one set of activations: [windows, seq, hidden]."""
        calibration = self.recipe.calibration
        return calibration.windows, int(calibration.seq_len), self.model.shape.hidden_size

    def summary(self) -> dict[str, Any]:
        """What `plan --json` prints."""
        source, shape = self.config.source, self.model.shape
        experts = shape.num_experts * shape.expert_parameters * len(shape.layers)
        kept = sum(spec.numel for spec in self.config.expert_tensors().values())
        first = self.config.layers[shape.layers[0]]
        return {
            "source": {"name": source.name, "parameters": source.parameters, "bytes": source.bytes},
            "result": {
                "parameters": self.budget.parameters,
                "bytes": self.budget.nbytes,
                "stored_ratio": self.budget.stored_ratio,
                "expert_ratio": 1 - kept / experts,
                "files": len(self.budget.shards),
            },
            "kept_share_of_deltas": {role: self.budget.kept_share[role] for role in ROLES},
            "first_layer": {role: first[role].model_dump() for role in ROLES},
            "peak_memory_bytes": peak_memory(self),
            "disk_bytes": {"work": work_bytes(self), "result": self.budget.nbytes},
            "estimated_seconds": estimate_seconds(self),
            "recipe": self.recipe.model_dump(),
        }


def make_plan(model: DenseModel, recipe: Recipe, shard_bytes: int = SHARD_BYTES) -> Plan:
    """Decide ranks and columns. Raises InputError where the ratio cannot be reached."""
    recipe = recipe.resolve(model.shape.hidden_size, model.max_positions)
    base, shape = recipe.base, model.shape
    sparsity = None if base.merge == "none" else base.sparsity
    for role in ROLES:
        if shape.projection(role)[1] % base.groups:
            raise InputError(f"base.groups {base.groups} does not divide {role}'s {shape.projection(role)[1]} inputs")
    draft = CheckpointConfig(
        family=model.family.model_type,
        experts=model.family.experts,
        projections=dict(model.family.projections),
        num_experts=shape.num_experts,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        dtype=model.dtype,
        pruning=Pruning(scope=recipe.scope, groups=base.groups),
        layers=draft_layers(shape, sparsity, base.groups, int(base.column_multiple)),
        source=Source(
            name=model.name, revision=model.revision, parameters=model.reader.parameters, bytes=model.reader.nbytes
        ),
    )
    problem = Problem(draft, shape, model.other_tensors, int(recipe.delta.rank_multiple), shard_bytes)
    if recipe.accounting == "paper":
        # Without a base, all of it is saved.
        budget = solve_paper(problem, recipe.ratio, 1.0 if sparsity is None else sparsity)
    else:
        budget = solve_stored(problem, recipe.ratio)
    if budget.nbytes >= model.reader.nbytes:
        raise InputError(f"ratio {recipe.ratio:g} would not make the model smaller; choose a higher one")
    return Plan(model, recipe, budget)


def _layer_bytes(plan: Plan) -> int:
    width = 4 if plan.config.dtype == "float32" else 2
    return plan.model.shape.num_experts * plan.model.shape.expert_parameters * width


def peak_memory(plan: Plan) -> int:
    """Bytes resident at the worst moment: one layer's weights, its statistics and the eigenproblems' workspace."""
    shape = plan.model.shape
    hidden, middle = shape.hidden_size, shape.intermediate_size
    in_layers = "model.layers."
    outside = [spec.numel for name, spec in plan.model.other_tensors.items() if not name.startswith(in_layers)]
    inside = [spec.numel for name, spec in plan.model.other_tensors.items() if name.startswith(in_layers)]
    statistics = shape.num_experts * 4 * (hidden**2 + middle**2)
    fisher = shape.num_experts * 4 * shape.expert_parameters if plan.needs_fisher else 0
    bases = 4 * shape.expert_parameters
    small, large = min(hidden, middle), max(hidden, middle)
    workspace = 8 * (2 * large**2 + 4 * hidden * middle + 6 * small**2)
    vocabulary = 4 * 3 * BATCH_TOKENS * int(plan.model.config.get("vocab_size", 0))
    activations = 4 * BATCH_TOKENS * (24 * hidden + 12 * middle * shape.experts_per_token)
    return int(
        PROCESS_BYTES
        + 4 * sum(outside)
        + max(
            4 * sum(inside) // max(len(shape.layers), 1)
            + _layer_bytes(plan)
            + statistics
            + max(fisher + activations, bases + workspace, fisher + bases),
            vocabulary,
        )
    )


def work_bytes(plan: Plan) -> int:
    """Bytes on disk while running, besides the result: hidden states of every layer, two gradients, layer results."""
    windows, length, hidden = plan.windows
    arrays = len(plan.model.shape.layers) + 1 + (2 if plan.needs_fisher else 0)
    return arrays * windows * length * hidden * 4 + sum(s.nbytes for s in plan.config.expert_tensors().values())


def layer_work(plan: Plan) -> tuple[float, float, float]:
    """Floating-point operations of one layer: forward sweep, statistics sweep, merge + factor (as float32 ones)."""
    shape = plan.model.shape
    hidden, middle = shape.hidden_size, shape.intermediate_size
    windows, length, _ = plan.windows
    rows = windows * length * shape.experts_per_token
    others = [s.numel for name, s in plan.model.other_tensors.items() if name.startswith("model.layers.")]
    attention = 2 * windows * length * (sum(others) / len(shape.layers) + 2 * length * hidden)
    forward = 2 * rows * shape.expert_parameters + attention
    grams = 2 * rows * (hidden**2 + middle**2)
    # Input gradients cost as much as the forward pass, Fisher's squared products as much again.
    statistics = grams + forward * (3 if plan.needs_fisher else 1)
    small = min(hidden, middle)
    # One root and three eigenproblems an expert at about 25 n^3 each, and the products around them; in float64.
    factor = shape.num_experts * 2 * (4 * 25 * small**3 + 12 * hidden * middle * (hidden + middle))
    return forward, statistics, factor


def estimate_seconds(plan: Plan) -> float:
    """A rough wall-clock prediction from a short measurement of this machine's matrix product."""
    a = torch.randn(1024, 1024)
    a @ a
    start = time.perf_counter()
    for _ in range(4):
        a @ a
    rate = 4 * 2 * 1024**3 / (time.perf_counter() - start)
    # Small matrices and memory traffic keep real layers well below the peak.
    efficiency = 0.5
    return len(plan.model.shape.layers) * sum(layer_work(plan)) / (rate * efficiency) + 5
