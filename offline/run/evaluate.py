"""Token perplexity of dense and compressed checkpoints, layer by layer: the model is never whole in memory."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from d2moe_vllm.format.config import CheckpointConfig, Layer, Scope
from d2moe_vllm.format.files import check_checkpoint
from offline.checkpoint.experts import compressed_experts
from offline.errors import InputError
from offline.io.progress import Steps
from offline.run.sweep import Experts, Scratch, Sweep, Visitor
from offline.source.dense import open_dense, read_model_config, resolve_folder
from offline.source.families import FAMILIES, Family, read_shape
from offline.source.layerwise import LayerwiseModel, read_hf_config
from offline.source.stored import SourceReader, find_experts
from offline.source.text import all_windows, read_text, tokenize
from offline.work.statistics import DenseExperts

LARGEST_LOSS = 700.0
"""Nats a token whose exponential is still a float; a uniform guess among a million tokens is 14."""


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood over every token but each window's first.

    scope: of the dynamic column selection, None for a dense model.
    """

    perplexity: float
    negative_log_likelihood: float
    tokens: int
    windows: int
    seq_len: int
    scope: Scope | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Evaluated:
    """A checkpoint that can be run layer by layer; experts builds one layer's experts, None where it has none."""

    folder: Path
    model: LayerwiseModel
    experts: Experts
    scope: Scope | None


def evaluate(
    source: str,
    text: Path,
    seq_len: int | None,
    scope: Scope | None,
    steps: Callable[[float], Steps],
    trim: Mapping[int, Sequence[int]] | None = None,
) -> Perplexity:
    """Perplexity of the checkpoint on a text's non-overlapping windows, in float32, no special tokens.

    seq_len: None means 2048, or the model's limit if that is less; scope: overrides the checkpoint's own; trim: as for
    `open_evaluated`. Raises InputError or CheckpointError.
    """
    tokens = text_windows(source, text, seq_len)
    length = tokens.shape[1]
    evaluated = open_evaluated(source, scope, trim)
    layers = evaluated.model.num_layers
    with steps((layers + 1) * len(tokens)) as progress, tempfile.TemporaryDirectory(prefix="d2moe-eval-") as folder:
        sweep = Sweep(evaluated.model, evaluated.experts, tokens, Scratch(Path(folder)), progress, len(tokens))
        sweep.run(Visitor(), layers)
        total = sweep.loss()
    count = tokens.shape[0] * (tokens.shape[1] - 1)
    mean = total / count
    if not math.isfinite(mean) or mean > LARGEST_LOSS:
        raise InputError(
            f"{source} gives a negative log-likelihood of {mean} a token on {text}: its weights are broken"
        )
    return Perplexity(math.exp(mean), mean, count, len(tokens), length, evaluated.scope)


def text_windows(source: str, text: Path, seq_len: int | None) -> Tensor:
    """The windows that `evaluate` measures on, int64 [windows, seq_len]. Raises InputError."""
    folder = resolve_folder(source)
    limit = read_model_config(folder).get("max_position_embeddings")
    if seq_len is not None and (seq_len < 2 or (limit and seq_len > limit)):
        raise InputError(f"--seq-len {seq_len} is not between 2 and the model's {limit} positions")
    return all_windows(tokenize(folder, read_text(text)), seq_len or min(2048, limit or 2048))


def open_evaluated(
    source: str, scope: Scope | None = None, trim: Mapping[int, Sequence[int]] | None = None
) -> Evaluated:
    """A dense or compressed checkpoint, ready to run. Raises InputError or CheckpointError.

    trim: layer -> experts of a compressed checkpoint that are to run on the base alone, as if they were stored so.
    """
    folder = resolve_folder(source)
    quantization = read_model_config(folder).get("quantization_config") or {}
    hf_config, cpu = read_hf_config(folder), torch.device("cpu")
    if quantization.get("quant_method") == "d2moe":
        config = _trimmed(check_checkpoint(folder), trim or {})
        reader, family = SourceReader(folder, ours=config.expert_tensors()), _family(config)
        scope = scope or config.pruning.scope
        layerwise = LayerwiseModel(reader, family, hf_config)
        shape = read_shape(family, read_model_config(folder))
        left = [layer for layer in shape.layers if layer not in config.layers]
        kept = find_experts(family, shape, reader, left) if left else None

        def compressed(layer: int) -> nn.Module | None:
            if layer in config.layers:
                return compressed_experts(config, layer, reader.finite, layerwise.activation, scope)
            return DenseExperts(shape, kept.held(layer, cpu), layerwise.activation) if kept and layer in left else None

        return Evaluated(folder, layerwise, compressed, scope)
    if scope is not None:
        raise InputError(f"--scope {scope} makes no sense for the dense model {source}")
    model = open_dense(source)
    layerwise = LayerwiseModel(model.reader, model.family, hf_config)

    def dense(layer: int) -> nn.Module | None:
        return (
            DenseExperts(model.shape, model.experts.held(layer, cpu), layerwise.activation)
            if layer in model.shape.layers
            else None
        )

    return Evaluated(folder, layerwise, dense, None)


def _trimmed(config: CheckpointConfig, trim: Mapping[int, Sequence[int]]) -> CheckpointConfig:
    """Raises pydantic's ValidationError for a layer without a base, or whose U's are shared by too few experts."""
    layers = dict(config.layers)
    for number, experts in trim.items():
        trimmed = sorted({*layers[number].trimmed, *experts})
        layers[number] = Layer.model_validate(layers[number].model_dump() | {"trimmed": trimmed})
    return config.model_copy(update={"layers": layers})


def _family(config: CheckpointConfig) -> Family:
    if config.family not in FAMILIES:
        raise InputError(f"family {config.family!r} is not supported; this d2moe-vllm is older than the checkpoint")
    return FAMILIES[config.family]
