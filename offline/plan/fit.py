"""What one device has to hold, the compressed weights that fit beside it, and the ratio that makes them so small.

Sizes are decimal where people read them. A plan's budget is solved for real at every step, so what is found fits to the
byte of what is counted; the neighbours of a result are scaled from it and are about right.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from offline.errors import InputError, UnreachableError
from offline.io.units import size, size_above
from offline.plan.budget import Budget, Problem
from offline.plan.kv_cache import KVCache
from offline.plan.make import First, first_budget
from offline.plan.plan import Plan
from offline.plan.recipe import Recipe
from offline.plan.resident import check_parallel, expert_bytes, other_bytes, parallel_problem
from offline.plan.serving import Resolved, Serving, activation_bytes, graph_bytes
from offline.source.dense import DenseModel

STEP = 1_000_000
"""Ratios are found to so many parts of the whole, rounded up: a ratio that is read off a card gives the same files."""
CLOSE = 0.001
"""Share of the room that may be left over."""
TRIES = 10
DEVICES = (16, 24, 40, 48, 80)
"""GB of usual devices, for the neighbours of a result."""
UNMEASURED = "by formula, never measured on a GPU"


def ratio_of(target: int, source: int) -> float:
    """The smallest ratio, of those that are told, whose files are at most `target` of `source` bytes."""
    parts = math.ceil((source - target) * STEP / source)
    return min(max(parts, 1), STEP - 1) / STEP


@dataclass(frozen=True)
class Needs:
    """Bytes of one device besides weights."""

    serving: Resolved
    cache: KVCache
    kv_cache: int
    activations: int
    graphs: int

    @property
    def weights(self) -> int:
        """What is left for weights; negative where the rest alone is too much."""
        return self.serving.usable_bytes - self.kv_cache - self.activations - self.graphs


def needs(model: DenseModel, recipe: Recipe, serving: Resolved) -> Needs:
    """Raises InputError where the cache is not known, or the ranks do not divide the model."""
    config, family = model.config, model.family
    cache = serving.cache(family, config)
    ranks, whole = serving.tensor_parallel_size, serving.expert_parallel
    check_parallel(config, family, recipe.base.groups, ranks, expert_parallel=whole)
    step = serving.max_num_batched_tokens
    return Needs(
        serving,
        cache,
        serving.kv_cache_bytes(cache),
        activation_bytes(serving, family, config, model.shape, recipe, step),
        graph_bytes(serving, family, config, model.shape, recipe),
    )


@dataclass(frozen=True)
class Held:
    """Bytes of weights. files: on disk; others, experts: on the rank that holds most, what is not compressed and what
    is."""

    files: int
    others: int
    experts: int

    @property
    def weights(self) -> int:
        return self.others + self.experts


def held(model: DenseModel, problem: Problem, budget: Budget, serving: Resolved) -> Held:
    """What a budget's files become on one device."""
    ranks, whole = serving.tensor_parallel_size, serving.expert_parallel
    others = other_bytes(problem.other_tensors, model.config, model.family, ranks)
    return Held(budget.nbytes, others, expert_bytes(budget.config, ranks, expert_parallel=whole))


@dataclass(frozen=True)
class Neighbour:
    """Another wish and what it would take. what: the change; device_bytes: of one device; ratio, files: about; None
    where `verdict` says why not."""

    what: str
    device_bytes: int
    ratio: float | None
    files: int | None
    verdict: str


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
        yield (
            "KV cache",
            -self.needs.kv_cache,
            f"{serving.max_num_seqs} requests x {serving.max_model_len:,} tokens{window}: each {per_request:,} blocks "
            f"of {cache.block_tokens} tokens, {cache.token_bytes:,} bytes a token",
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
    wanted = needs(model, recipe, asked.resolve(model.config))
    serving, room = wanted.serving, wanted.weights
    ranks = serving.tensor_parallel_size
    others = other_bytes(model.other_tensors, model.config, model.family, ranks)
    if room >= others + -(-model.expert_bytes // ranks):
        raise InputError(
            f"--fit {size(serving.device_bytes)} is enough for {model.name} as it is: its weights are "
            f"{size(others + model.expert_bytes // ranks)} of the {size(room)} that are left for them; serve it "
            "uncompressed, or choose a smaller --fit or more requests"
        )
    smallest = _smallest(model, recipe, others, ranks)
    if smallest.weights > room:
        raise InputError(_too_small(model, recipe, wanted, smallest))
    first, chosen = _search(model, recipe, wanted, smallest)
    around = tuple(_around(model, recipe, wanted, chosen, smallest.files))
    return Fit(wanted, chosen, first.problem.recipe.ratio, around), first


def _search(model: DenseModel, recipe: Recipe, wanted: Needs, smallest: Held) -> tuple[First, Held]:
    """The largest files that fit whatever calibration chooses within them, and what the plan's become on a device.

    Of the files all that is no other tensor counts as experts, headers too, in the share that a rank has of the plan's:
    on one device that is all of them. On several it depends a little on what is chosen, as ranks repeat some of it.
    """
    serving, room, source = wanted.serving, wanted.weights, model.reader.nbytes
    best: tuple[First, Held] | None = None
    ranks = serving.tensor_parallel_size
    target = _beside(model) + (room - smallest.others) * ranks
    fits, too_large = smallest.files, source + 1
    highest = _told(1 - smallest.files / source)
    for _ in range(TRIES):
        ratio = min(ratio_of(min(target, source), source), highest)
        first = first_budget(model, recipe.model_copy(update={"ratio": ratio}))
        found, asked = held(model, first.problem, first.budget, serving), int((1 - ratio) * source)
        beside = sum(spec.nbytes for spec in first.problem.other_tensors.values())
        share = found.experts / first.budget.config.expert_bytes
        left = room - found.others - math.ceil((asked - beside) * share)
        if left < 0:
            too_large = min(too_large, asked)
        else:
            best, fits = (first, found), asked
        if left < 0 and ratio >= highest:
            break
        close = 0 <= left <= CLOSE * room or asked >= source - 2 * source // STEP
        if close or too_large - fits <= max(CLOSE * room, 2 * source / STEP):
            break
        target = int(asked + left / share)
        if not fits < target < too_large:
            target = (fits + too_large) // 2
    if best is None:
        raise InputError(_too_small(model, recipe, wanted, smallest))
    return best


def _told(ratio: float) -> float:
    """The highest ratio, of those that are told, that is no higher."""
    return math.floor(ratio * STEP) / STEP


def highest_ratio(model: DenseModel, recipe: Recipe) -> float:
    """That a method can reach, of those that are told."""
    try:
        first_budget(model, recipe.model_copy(update={"ratio": (STEP - 1) / STEP}))
    except UnreachableError as error:
        return _told(error.most)
    return (STEP - 1) / STEP


def _smallest(model: DenseModel, recipe: Recipe, others: int, ranks: int) -> Held:
    """The files of the highest ratio; of what they become on a device, headers included, a little more than is so."""
    files = math.ceil((1 - highest_ratio(model, recipe)) * model.reader.nbytes)
    return Held(files, others, max(files - _beside(model), 0) // ranks)


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
        return needs(model, recipe, serving.changed(model.config, **changes)).weights >= smallest.weights

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


def _around(model: DenseModel, recipe: Recipe, wanted: Needs, chosen: Held, least: int) -> Iterator[Neighbour]:
    """Half and twice of what was asked, one more way to share it out, and usual devices."""
    serving, positions = wanted.serving, model.max_positions
    wishes: list[tuple[str, Mapping[str, Any]]] = []
    for what, field in (("--max-model-len", "max_model_len"), ("--max-num-seqs", "max_num_seqs")):
        value = getattr(serving, field)
        for other in (value // 2, value * 2):
            if other and not (field == "max_model_len" and positions and other > positions):
                wishes.append((f"{what} {other}", {field: other}))
    if serving.kv_cache_dtype == "auto":
        wishes.append(("--kv-cache-dtype fp8", {"kv_cache_dtype": "fp8"}))
    ranks = 2 * serving.tensor_parallel_size
    whole = serving.expert_parallel
    if not parallel_problem(model.config, model.family, recipe.base.groups, ranks, expert_parallel=whole):
        wishes.append((f"--tensor-parallel-size {ranks}", {"tensor_parallel_size": ranks}))
    for device in DEVICES:
        if device * 10**9 != serving.device_bytes:
            wishes.append((f"--fit {device}GB", {"device_bytes": device * 10**9}))
    for what, changes in wishes:
        yield _neighbour(model, recipe, serving.changed(model.config, **changes), what, chosen, least, wanted)


def _neighbour(
    model: DenseModel, recipe: Recipe, serving: Resolved, what: str, chosen: Held, least: int, wanted: Needs
) -> Neighbour:
    ranks, source = serving.tensor_parallel_size, model.reader.nbytes
    room = needs(model, recipe, serving).weights
    others = other_bytes(model.other_tensors, model.config, model.family, ranks)
    if room >= others + -(-model.expert_bytes // ranks):
        return Neighbour(what, serving.device_bytes, None, None, "fits uncompressed")
    # Experts' bytes on a rank for each byte of files, scaled by how many ranks there are.
    scale = wanted.serving.tensor_parallel_size / ranks
    per_file = chosen.experts * scale / max(chosen.files - _beside(model), 1)
    files = _beside(model) + int((room - others) / per_file)
    if files < least or room < others:
        return Neighbour(what, serving.device_bytes, None, None, "does not fit")
    most = _most(model, recipe)
    verdict = "more bytes would save nothing" if most < files else ""
    files = min(files, most)
    return Neighbour(what, serving.device_bytes, round(1 - files / source, 3), files, verdict)


def _most(model: DenseModel, recipe: Recipe) -> int:
    """Bytes of files from which on more save nothing: experts whole in the most bits of the recipe, and scales."""
    bits = 8 if recipe.bits == "auto" else recipe.bits
    if bits == 16:
        return model.reader.nbytes
    numbers = len(model.shape.layers) * model.shape.num_experts * model.shape.expert_parameters
    return min(
        _beside(model) + numbers * (bits * recipe.group_size + 16) // (8 * recipe.group_size), model.reader.nbytes
    )


def _beside(model: DenseModel) -> int:
    return sum(spec.nbytes for spec in model.other_tensors.values())
