"""Memory and disk of an evaluation, predicted from shapes; and how much to take at once so that memory holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from d2moe_vllm.format.kinds import DTYPE_BYTES, TensorSpec
from offline.errors import InputError
from offline.io.units import FLOAT32
from offline.plan.plan import BATCH_TOKENS
from offline.plan.resources import PROCESS_BYTES, machine_memory, outside_and_inside, scores
from offline.source.families import MoEShape
from offline.source.family import Family


@dataclass(frozen=True)
class Evaluated:
    """What an evaluation's memory depends on.

    settings: the language model's in config.json; others: every tensor but routed experts'; stored: parameters of a
    compressed layer's experts at most, which run in float32, 0 where none is compressed; dense: of a layer that holds
    them dense, safetensors' name of their dtype, None where none does; length: tokens in a window.
    """

    family: Family
    settings: Mapping[str, Any]
    shape: MoEShape
    others: Mapping[str, TensorSpec]
    stored: int
    dense: str | None
    length: int


@dataclass(frozen=True)
class AtOnce:
    """batch_tokens: that run through a layer together, at least one window; hold_layer: a dense layer's experts are all
    in memory while it runs, else each is read when it is needed; nbytes: resident at the worst moment; phase: which."""

    batch_tokens: int
    hold_layer: bool
    nbytes: int
    phase: str


def fit(evaluated: Evaluated, memory: int | None) -> AtOnce:
    """As much at once as fits into `memory` bytes, None for what the machine has. Raises InputError where even one
    window at a time needs more."""
    step = evaluated.length
    batches = [max(step, size // step * step) for size in (BATCH_TOKENS, BATCH_TOKENS // 2, BATCH_TOKENS // 4, 1)]
    limit = memory or machine_memory()
    for hold in (True, False):
        for batch in dict.fromkeys(batches):
            phases = _phases(evaluated, batch, hold=hold)
            phase = max(phases, key=phases.__getitem__)
            if phases[phase] <= limit:
                return AtOnce(batch, hold, phases[phase], phase)
    whose, mend = ("--memory", "a higher --memory") if memory else ("this machine's memory", "a machine with more")
    raise InputError(
        f"{whose} of {limit / 1e9:.2f} GB does not suffice: {phases[phase] / 1e9:.2f} GB are needed, most of it in the "
        f"phase {phase!r}; use {mend}" + (", or a lower --seq-len" if step > 256 else "")
    )


def _phases(evaluated: Evaluated, batch: int, *, hold: bool) -> dict[str, int]:
    """Bytes resident at the worst moment of each phase."""
    shape = evaluated.shape
    hidden, middle = shape.hidden_size, shape.intermediate_size
    matrix = hidden * middle
    layers = int(evaluated.settings["num_hidden_layers"])
    outside, inside, widest = outside_and_inside(evaluated.others, evaluated.family, layers)
    outer = shape.model_hidden_size
    states = FLOAT32 * batch * (outer * 12 + 3 * widest)
    states += scores(evaluated.family, evaluated.settings, evaluated.length, batch, backwards=False)
    # The mix, one expert at work, and all rows that are routed.
    states += FLOAT32 * batch * (4 * middle + (3 + shape.experts_per_token) * hidden)
    vocabulary = int(evaluated.settings.get("vocab_size", 0))
    phases = {
        "embeddings": FLOAT32 * (outside + 2 * batch * outer),
        # Logits, those of all but the last token, their logarithms.
        "head": FLOAT32 * (outside + 3 * evaluated.length * vocabulary + 8 * evaluated.length * outer),
    }
    if evaluated.stored:
        phases["compressed layer"] = FLOAT32 * (inside + evaluated.stored) + states
    if evaluated.dense:
        held = (len(shape.roles) * shape.num_experts if hold else 1) * matrix * DTYPE_BYTES[evaluated.dense]
        phases["layer"] = FLOAT32 * (inside + matrix) + held + states
    return {name: PROCESS_BYTES + size for name, size in phases.items()}


def disk_bytes(evaluated: Evaluated, tokens: int) -> int:
    """On disk while it runs: the tokens, and their hidden states."""
    return FLOAT32 * tokens * (1 + evaluated.shape.model_hidden_size)
