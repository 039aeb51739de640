"""Memory of a compression, predicted from shapes; and how much to take at once so that memory holds. Its working
folder: disk.py; its time: duration.py.

What memory can hold is decided by two sizes: how many tokens run through a layer together, and how many rows of
one expert are taken together. Everything else (one layer's weights in their stored dtype, one expert's
statistics) is fixed by the model.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from d2moe_vllm.format.kinds import TensorSpec
from offline.algebra.products import Products, has_bfloat16
from offline.errors import InputError
from offline.io.units import FLOAT32
from offline.plan.disk import final_bytes, work_bytes
from offline.plan.plan import Plan, Resources
from offline.source.family import Family, predicts_further

ROWS = (4096, 2048, 1024, 512, 256)
"""Of one expert at once, by how much memory there is."""
PROCESS_BYTES = 720_000_000
"""A Python process with torch and transformers imported, and with scikit-learn and pandas, which transformers imports
where they are installed (lm-eval brings them); after a text was tokenized, and rates were measured."""


def machine_memory() -> int:
    """Bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_resources(plan: Plan, memory: int | None, processes: int, device: str = "cpu") -> Plan:
    """The plan with as much at once as fits into `memory` bytes for all processes of this machine together, with
    products as the device has them, and with as many hidden states kept as leave the working folder no larger than the
    source.

    None means what the machine has. Raises InputError where even the smallest steps
    need more, or where the device has no such products.
    """
    products = _products(plan, device)
    available = machine_memory()
    limit = (memory or available) // processes
    step = max(plan.windows[1], 1)
    # Every process gets a batch of windows.
    most = -(-plan.windows[0] // processes) * step
    sizes = (min(size, most) for size in ROWS)
    batches = sorted({max(step, size // step * step) for size in sizes}, reverse=True)
    smallest = replace(plan, resources=Resources(batches[-1], ROWS[-1], False, processes, products))
    if (needed := peak_memory(smallest)) > limit:
        raise InputError(_too_small(smallest, memory, available, needed))
    choices = itertools.product((True, False), batches, ROWS)
    sizes_at_once = (Resources(batch, rows, hold, processes, products) for hold, batch, rows in choices)
    fitting = (replace(plan, resources=resources) for resources in sizes_at_once)
    return keeping_states(next(chosen for chosen in fitting if peak_memory(chosen) <= limit), plan.model.reader.nbytes)


def keeping_states(plan: Plan, most: int) -> Plan:
    """The plan with as many of the layers' inputs kept as leave the working folder within `most` bytes, or where none
    does, with as many as leave it smallest.

    What is kept need not be computed anew: the time depends on it, no byte of the result.
    """
    fewest = replace(plan, resources=replace(plan.resources, every=0))
    if not plan.needs_gradient:
        return fewest
    more = [replace(plan, resources=replace(plan.resources, every=every)) for every in range(1, fewest.states.every)]
    final = final_bytes(plan)
    sizes = [(work_bytes(chosen, final), chosen) for chosen in (*more, fewest)]
    return next((chosen for size, chosen in sizes if size <= most), min(sizes, key=lambda pair: pair[0])[1])


def _products(plan: Plan, device: str) -> Products:
    """Raises InputError for bfloat16 where the device has none."""
    asked = plan.recipe.calibration.products
    if asked == "auto":
        return "bfloat16" if has_bfloat16(device) else "float32"
    if asked == "bfloat16" and not has_bfloat16(device):
        raise InputError(
            "calibration.products bfloat16: this processor has no bfloat16 products (AMX, AVX-512 BF16 or SVE BF16); "
            "leave it out of the recipe"
        )
    return asked


def _too_small(plan: Plan, memory: int | None, available: int, needed: int) -> str:
    whose = "--memory" if memory else "this machine's memory"
    processes = plan.resources.processes
    each = f" by each of {processes} processes" if processes > 1 else ""
    largest = max(phases(plan).items(), key=lambda item: item[1])[0]
    mend = "fewer processes" if processes > 1 else "a higher --memory" if memory else "a machine with more"
    return (
        f"{whose} of {(memory or available) / 1e9:.2f} GB does not suffice: {needed / 1e9:.2f} GB are needed{each}, "
        f"most of it in the phase {largest!r}; use {mend}"
        + ("" if plan.windows[1] <= 256 else ", or a lower --seq-len")
    )


def outside_and_inside(tensors: Mapping[str, TensorSpec], family: Family, num_layers: int) -> tuple[int, int, int]:
    """Of all tensors but routed experts': parameters outside of the decoder layers; the most that one layer has; the
    widest of its tensors' outputs. What predicts further tokens, or is beside the language model, never runs."""
    outside, widest = 0, 0
    inside: dict[int, int] = {}
    for name, spec in tensors.items():
        if predicts_further(name) or family.beside(name):
            continue
        if (layer := family.layer_of(name)) is None:
            outside += spec.numel
        elif layer < num_layers:
            inside[layer] = inside.get(layer, 0) + spec.numel
            widest = max(widest, spec.shape[0] if spec.shape else 0)
    return outside, max(inside.values(), default=0), widest


def _outside_and_inside(plan: Plan) -> tuple[int, int, int]:
    return outside_and_inside(plan.model.other_tensors, plan.model.family, plan.model.num_layers)


def scores(family: Family, config: Mapping[str, Any], length: int, batch: int, *, backwards: bool) -> int:
    """Bytes of attention scores while `batch` tokens in windows of `length` run through a layer: none where torch's
    fused attention works, all of them where query heads are wider than value heads (multi-head latent attention), or
    where the family's code has no other way."""
    queries = int(config.get("qk_nope_head_dim") or 0) + int(config.get("qk_rope_head_dim") or 0)
    if family.fused and (not queries or queries == config.get("v_head_dim")):
        return 0
    heads = int(config.get("num_attention_heads") or 0)
    kept = 6 if backwards else 4  # scores, mask and softmax, and their gradients
    return FLOAT32 * heads * length * batch * kept


def phases(plan: Plan) -> dict[str, int]:
    """Bytes resident on one process at the worst moment of each phase of a run."""
    backwards = plan.needs_gradient
    hidden, vocabulary = plan.model.shape.model_hidden_size, int(plan.model.settings.get("vocab_size", 0))
    outside, _, _ = _outside_and_inside(plan)
    length = plan.windows[1]
    result = {"embeddings": FLOAT32 * (outside + 2 * plan.resources.batch_tokens * hidden), **_running(plan)}
    if backwards:
        result["head"] = FLOAT32 * (outside + 4 * length * vocabulary + 8 * length * hidden)
    result |= plan.layers.phases(plan)
    return {name: PROCESS_BYTES + size for name, size in result.items()}


def _running(plan: Plan) -> dict[str, int]:
    """A layer while a batch of windows runs through it: as it was, and as it is compressed where that is needed."""
    shape, batch, backwards = plan.model.shape, plan.resources.batch_tokens, plan.needs_gradient
    hidden, middle = shape.hidden_size, shape.intermediate_size
    matrix, width = hidden * middle, plan.torch_dtype.itemsize
    _, inside, widest = _outside_and_inside(plan)
    # A decoder layer's own tensors: normed, projected and attended states, and their gradients.
    states = FLOAT32 * batch * (shape.model_hidden_size * (20 if backwards else 12) + 3 * widest)
    states += scores(plan.model.family, plan.model.settings, plan.windows[1], batch, backwards=backwards)
    # Routed rows, of which autograd keeps three tensors of an expert's width and what it gives; then the mix, and one
    # expert at work.
    kept = shape.experts_per_token * (3 * middle + 2 * hidden if backwards else hidden)
    routed = FLOAT32 * batch * (kept + 4 * middle + 3 * hidden)
    held = (len(shape.roles) * shape.num_experts if plan.resources.hold_layer else 1) * matrix * width
    result = {"layer": FLOAT32 * (inside + matrix) + held + states + routed}
    if plan.follows:
        first = shape.layers[0]
        stored = sum(s.numel for role in shape.roles for s in plan.config.projection_tensors(first, role).values())
        result["compressed layer"] = FLOAT32 * (inside + stored) + states + routed
    return result


def peak_memory(plan: Plan) -> int:
    """Bytes resident on one process at the worst moment."""
    return max(phases(plan).values())
