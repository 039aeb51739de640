"""What one device has to hold, the compressed weights that fit beside it, and the ratio that makes them so small.

A plan's budget is solved for real at every step, so what is found fits to the byte of what is counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from offline.errors import InputError
from offline.io.units import size, size_above
from offline.plan.make import First, first_budget
from offline.plan.needs import STEP, Held, Needs, beside, held, highest_ratio, needs, ratio_of, told, uncompressed
from offline.plan.neighbours import Neighbour, neighbours
from offline.plan.plan import Plan
from offline.plan.recipe import Recipe
from offline.plan.resident import other_bytes
from offline.plan.serving import Resolved, Serving
from offline.source.dense import DenseModel

CLOSE = 0.001
"""Share of the room that may be left over."""
TRIES = 10
UNMEASURED = "by formula, never measured on a GPU"


@dataclass(frozen=True)
class Fit:
    """A wish that came true. ratio: of the plan; around: what other wishes would take."""

    needs: Needs
    held: Held
    ratio: float
    around: tuple[Neighbour, ...]

    @property
    def spare(self) -> int:
        """What the weights leave of their room; vLLM makes it KV cache."""
        return self.needs.weights - self.held.weights

    def of(self, plan: Plan) -> Fit:
        """The same with the files of a settled plan, whose choices differ from those of a typical model's layers."""
        return replace(self, held=held(plan.model, plan.problem, plan.budget, self.needs.serving))

    def to_json(self) -> dict[str, Any]:
        serving, cache = self.needs.serving, self.needs.cache
        return {
            "device_bytes": serving.device_bytes,
            "usable_bytes": serving.usable_bytes,
            "gpu_memory_utilization": serving.gpu_memory_utilization,
            "max_model_len": serving.max_model_len,
            "max_num_seqs": serving.max_num_seqs,
            "max_num_batched_tokens": serving.max_num_batched_tokens,
            "tensor_parallel_size": serving.tensor_parallel_size,
            "expert_parallel": serving.expert_parallel,
            "kv_cache_dtype": serving.kv_cache_dtype,
            "kv_cache_bytes": self.needs.kv_cache,
            "kv_cache_bytes_per_token": cache.token_bytes,
            "kv_cache_block_tokens": cache.block_tokens,
            "kv_cache_blocks": cache.blocks(self.needs.kv_cache),
            "sliding_window": cache.window,
            "window_layers": cache.windowed or (cache.layers if cache.window else 0),
            "state_layers": cache.states,
            "activation_bytes": self.needs.activations,
            "cuda_graph_bytes": self.needs.graphs,
            "cuda_graph_sizes": serving.captured(),
            "unmeasured": ["activation_bytes", "cuda_graph_bytes"],
            "weight_bytes": {"others": self.held.others, "experts": self.held.experts, "room": self.needs.weights},
            "spare_bytes": self.spare,
            "ratio": self.ratio,
            "lines": [{"what": what, "bytes": count, "how": how} for what, count, how in self.lines()],
            "around": [vars(one) for one in self.around],
            "serve": serving.flags(),
        }

    def lines(self) -> Iterator[tuple[str, int, str]]:
        """The arithmetic: (what, bytes, how); what is taken away is negative."""
        serving, cache, steps = self.needs.serving, self.needs.cache, self.needs.serving.captured()
        yield "the device", serving.device_bytes, _ranks(serving)
        share = f"that --gpu-memory-utilization {serving.gpu_memory_utilization:g} leaves free"
        yield "reserve", serving.usable_bytes - serving.device_bytes, share
        per_request = cache.request_blocks(serving.max_model_len, serving.max_num_batched_tokens)
        window = f", window {cache.window:,}" if cache.window else ""
        window += f" in {cache.windowed} layers" if cache.windowed else ""
        states = f", and states in {cache.states} layers" if cache.states else ""
        yield (
            "KV cache",
            -self.needs.kv_cache,
            f"{serving.max_num_seqs} requests x {serving.max_model_len:,} tokens{window}: each {per_request:,} blocks "
            f"of {cache.block_tokens} tokens, {cache.token_bytes:,} bytes a token{states}",
        )
        yield (
            "activations",
            -self.needs.activations,
            f"a step of {serving.max_num_batched_tokens:,} tokens; {UNMEASURED}",
        )
        yield "CUDA graphs", -self.needs.graphs, f"{len(steps)} sizes up to {steps[-1]} tokens; {UNMEASURED}"
        yield "weights, not compressed", -self.held.others, "attention, embeddings, norms, routers, shared experts"
        yield "room for experts", self.needs.weights - self.held.others, ""
        yield "experts, compressed", -self.held.experts, "codes, scales and masks as the plugin allocates them"
        yield "spare", self.spare, "vLLM makes it KV cache"


def _ranks(serving: Resolved) -> str:
    if serving.tensor_parallel_size == 1:
        return "holds all of the model"
    how = "expert" if serving.expert_parallel else "tensor"
    return f"one of {serving.tensor_parallel_size}, {how} parallel"


def solve_fit(model: DenseModel, recipe: Recipe, asked: Serving) -> tuple[Fit, First]:
    """The lowest ratio whose weights fit, to CLOSE of their room, and its budget.

    Raises InputError, with the mend: where weights fit uncompressed, where not even the smallest do, where the cache is
    not known, and where the ranks do not divide the model.
    """
    wanted = needs(model, recipe, asked.resolve(model.settings))
    serving, room = wanted.serving, wanted.weights
    ranks = serving.tensor_parallel_size
    others = other_bytes(model.other_tensors, model.settings, model.family, ranks)
    if room >= (whole := uncompressed(model, ranks)):
        raise InputError(
            f"--fit {size(serving.device_bytes)} is enough for {model.name} as it is: its weights are "
            f"{size(whole)} of the {size(room)} that are left for them; serve it uncompressed, or choose a smaller "
            "--fit or more requests"
        )
    smallest = _smallest(model, recipe, others, ranks)
    if smallest.weights > room:
        raise InputError(_too_small(model, recipe, wanted, smallest))
    first, chosen = _search(model, recipe, wanted, smallest)
    around = tuple(neighbours(model, recipe, wanted, chosen.files, first.budget.config, smallest.files))
    return Fit(wanted, chosen, first.problem.recipe.ratio, around), first


def _search(model: DenseModel, recipe: Recipe, wanted: Needs, smallest: Held) -> tuple[First, Held]:
    """The largest files that fit whatever calibration chooses within them, and what the plan's become on a device.

    Of the files all that is no other tensor counts as experts, headers too, in the share that a rank has of the plan's:
    on one device that is all of them. On several it depends a little on what is chosen, as ranks repeat some of it.
    """
    serving, room, source = wanted.serving, wanted.weights, model.reader.nbytes
    best: tuple[First, Held] | None = None
    ranks = serving.tensor_parallel_size
    target = beside(model) + (room - smallest.others) * ranks
    fits, too_large = smallest.files, source + 1
    highest = told(1 - smallest.files / source)
    for _ in range(TRIES):
        ratio = min(ratio_of(min(target, source), source), highest)
        first = first_budget(model, recipe.model_copy(update={"ratio": ratio}))
        found, asked = held(model, first.problem, first.budget, serving), int((1 - ratio) * source)
        other = sum(spec.nbytes for spec in first.problem.other_tensors.values())
        share = found.experts / first.budget.config.expert_bytes
        experts = math.ceil((asked - other) * share)
        left = room - found.others - experts
        if left < 0:
            too_large = min(too_large, asked)
        else:
            best, fits = (first, found), asked
        if left < 0 and ratio >= highest:
            smallest = Held(asked, found.others, experts)
            break
        close = 0 <= left <= CLOSE * room or asked >= source - 2 * source // STEP
        target = int(asked + left / share)
        if close or too_large - fits <= max(CLOSE * room, 2 * source / STEP):
            if best is not None:
                break
            target = smallest.files
        elif not fits < target < too_large:
            target = (fits + too_large) // 2
    if best is None:
        raise InputError(_too_small(model, recipe, wanted, smallest))
    return best


def _smallest(model: DenseModel, recipe: Recipe, others: int, ranks: int) -> Held:
    """The files of the highest ratio; of what they become on a device, headers included, a little more than is so."""
    files = math.ceil((1 - highest_ratio(model, recipe)) * model.reader.nbytes)
    return Held(files, others, max(files - beside(model), 0) // ranks)


def _too_small(model: DenseModel, recipe: Recipe, wanted: Needs, smallest: Held) -> str:
    serving, utilization = wanted.serving, wanted.serving.gpu_memory_utilization
    parts = {
        "KV cache": wanted.kv_cache,
        "activations": wanted.activations,
        "CUDA graphs": wanted.graphs,
        "what is not compressed": smallest.others,
        "the fewest experts' bytes that this method reaches": smallest.experts,
    }
    needed = sum(parts.values()) / utilization
    mends = [f"--fit {size_above(math.ceil(needed))}"]
    shorter = next(_fitting(model, recipe, wanted, smallest), None)
    mends += [shorter] if shorter else []
    told = ", ".join(f"{what} {size(count)}" for what, count in parts.items())
    return (
        f"--fit {size(serving.device_bytes)} does not suffice: of {size(serving.usable_bytes)} that vLLM may use, "
        f"needed are {told}; use {' or '.join(mends)}, or more devices by --tensor-parallel-size"
    )


def _fitting(model: DenseModel, recipe: Recipe, wanted: Needs, smallest: Held) -> Iterator[str]:
    """What else fits into the device: fewer requests, shorter steps, or one request that is shorter."""
    serving = wanted.serving

    def fits(**changes: int) -> bool:
        return needs(model, recipe, serving.changed(model.settings, **changes)).weights >= smallest.weights

    for requests in _halves(serving.max_num_seqs):
        if fits(max_num_seqs=requests):
            yield f"--max-num-seqs {requests}"
    for tokens in _halves(serving.max_num_batched_tokens):
        if tokens >= serving.max_num_seqs and fits(max_num_batched_tokens=tokens):
            yield f"--max-num-batched-tokens {tokens}"
    for length in _halves(serving.max_model_len):
        if length >= wanted.cache.block_tokens and fits(max_num_seqs=1, max_model_len=length):
            yield f"--max-num-seqs 1 --max-model-len {length}"


def _halves(number: int) -> Iterator[int]:
    while number > 1:
        number //= 2
        yield number
