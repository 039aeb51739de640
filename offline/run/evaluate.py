"""Token perplexity of dense and compressed checkpoints, layer by layer: the model is never whole in memory."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from d2moe_vllm.format.config import CheckpointConfig, Layer, Scope
from d2moe_vllm.format.files import check_checkpoint
from d2moe_vllm.ops.reference import Gated
from offline.checkpoint.experts import compressed_experts
from offline.errors import InputError
from offline.io.progress import Steps
from offline.plan.evaluation import Evaluated, disk_bytes, fit
from offline.run.sweep import Scratch, StoredWindows, Sweep, Visitor, Windows
from offline.source.dense import open_dense, read_model_config
from offline.source.families import family_of, find_family, read_shape
from offline.source.folder import locate
from offline.source.layerwise import LayerwiseModel, read_hf_config
from offline.source.stored import SourceReader, StoredExperts, find_experts
from offline.source.text import Text
from offline.source.tokens import OWN, Tokenizer, TokenizerChoice, choose_windows, forget_tokenizers, open_tokenizer
from offline.work.statistics import DenseExperts

LARGEST_LOSS = 700.0
"""Nats a token whose exponential is still a float; a uniform guess among a million tokens is 14."""


@dataclass(frozen=True)
class Measure:
    """What perplexity is measured on, and with how much memory.

    seq_len: tokens in a window, None for 2048, or the model's limit if that is less; windows: how many are drawn by
    `seed`, None for all there are; memory: bytes to stay within, None for what the machine has.
    """

    text: Text
    seq_len: int | None = None
    windows: int | None = None
    seed: int = 0
    tokenizer: TokenizerChoice = OWN
    memory: int | None = None


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood over every token but each window's first.

    bytes: UTF-8, of the text that these tokens stand for; scope: of the dynamic column selection, None for a dense
    model; predicted: bytes of memory at the worst moment.
    """

    perplexity: float
    negative_log_likelihood: float
    tokens: int
    windows: int
    seq_len: int
    bytes: int
    scope: Scope | None
    predicted: int

    @property
    def bits_per_byte(self) -> float | None:
        """The negative log-likelihood in bits, over the text's bytes: comparable between tokenizers. None where the
        tokens stand for no text."""
        return self.negative_log_likelihood * self.tokens / math.log(2) / self.bytes if self.bytes > 0 else None

    def to_json(self) -> dict[str, Any]:
        """With `bits_per_byte`."""
        predicted = {"peak_memory_bytes": self.predicted}
        return asdict(self) | {"bits_per_byte": self.bits_per_byte, "predicted": predicted}


@dataclass(frozen=True)
class Opened:
    """A checkpoint that can be run layer by layer.

    experts: builds one layer's experts, held in memory or read when they are needed, as the second argument says; None
    where it has none; sizes: what memory depends on, but `length`; remarks: what a user should know of it.
    """

    folder: Path
    model: LayerwiseModel
    experts: Callable[..., nn.Module | None]
    scope: Scope | None
    sizes: Evaluated
    remarks: Sequence[str] = ()


def evaluate(
    source: str,
    measure: Measure,
    scope: Scope | None,
    steps: Callable[[float], Steps],
    trim: Mapping[int, Sequence[int]] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Perplexity:
    """Perplexity of the checkpoint on a text's non-overlapping windows, in float32, no special tokens.

    scope: overrides the checkpoint's own; trim: as for `open_evaluated`; say: is told what a user should know.
    Raises InputError or CheckpointError.
    """
    opened = open_evaluated(source, scope, trim)
    length = _length(opened.sizes.settings, measure.seq_len)
    sizes = replace(opened.sizes, length=length)
    at_once = fit(sizes, measure.memory)
    tokenizer = open_tokenizer(opened.folder, measure.tokenizer)
    for note in (*opened.remarks, *tokenizer.notes):
        say(note)
    measure.text.length()  # what is wrong in it is said before anything else is
    layers = opened.model.num_layers
    with tempfile.TemporaryDirectory(prefix="d2moe-eval-") as name:
        folder = Path(name)
        if measure.windows is None:
            with steps(max(measure.text.nbytes, 1)) as progress:
                tokens: Windows = write_windows(tokenizer, measure.text, length, folder, progress)
        else:
            tokens = choose_windows(tokenizer, measure.text, measure.windows, length, measure.seed).tokens
        count = len(tokens)
        size = sum(tokenizer.bytes_behind_first(tokens[n : n + 1][0]) for n in range(count))
        del tokenizer
        forget_tokenizers()
        _check_disk(folder, disk_bytes(sizes, count * length))
        with steps((layers + 1) * count) as progress:

            def experts(layer: int) -> nn.Module | None:
                return opened.experts(layer, at_once.hold_layer)

            sweep = Sweep(opened.model, experts, tokens, Scratch(folder), progress, count,
                          batch_tokens=at_once.batch_tokens)  # fmt: skip
            sweep.run(Visitor(), layers)
            total = sweep.loss()
    mean = total / (count * (length - 1))
    if not math.isfinite(mean) or mean > LARGEST_LOSS:
        raise InputError(
            f"{source} gives a negative log-likelihood of {mean} a token on {measure.text}: its weights are broken"
        )
    return Perplexity(math.exp(mean), mean, count * (length - 1), count, length, size, opened.scope, at_once.nbytes)


def check_measure(source: str, measure: Measure) -> None:
    """All that `evaluate` refuses without computing anything but the tokens of one window: the whole text is read.
    Raises InputError."""
    folder = locate(source).folder
    config = read_model_config(folder)
    length = _length(find_family(config).settings(config), measure.seq_len)
    tokenizer = open_tokenizer(folder, measure.tokenizer)
    found = 0
    for piece in measure.text.pieces():
        found += len(tokenizer.encode(piece)) if found < length else 0
    if found < length:
        raise _no_window(measure.text, found, length)


def _length(config: Mapping[str, Any], seq_len: int | None) -> int:
    limit = config.get("max_position_embeddings")
    if seq_len is not None and (seq_len < 2 or (limit and seq_len > limit)):
        raise InputError(f"--seq-len {seq_len} is not between 2 and the model's {limit} positions")
    return seq_len or min(2048, limit or 2048)


def _no_window(text: Text, tokens: int, length: int) -> InputError:
    mend = "lower --seq-len" if tokens > 1 else "give another"
    return InputError(f"the text ({text}) has {tokens} tokens, less than one window of {length}; {mend}")


def write_windows(tokenizer: Tokenizer, text: Text, length: int, folder: Path, steps: Steps) -> StoredWindows:
    """Every non-overlapping window of `length` tokens, in a file of `folder`; the rest of the text is dropped.

    steps: of the text's bytes. Raises InputError where there is no window.
    """
    steps.label("tokens")
    path, count = folder / "tokens.rows", 0
    with path.open("wb") as file:
        for piece in text.pieces():
            tokens = tokenizer.encode(piece)
            file.write(tokens.to(torch.int32).numpy().tobytes())
            count += len(tokens)
            steps.advance(len(piece.encode()))
    if count < length:
        raise _no_window(text, count, length)
    return StoredWindows(path, count // length, length)


def _check_disk(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"No space left for {needed:,} bytes of hidden states under {folder.parent}: {free:,} are free; set TMPDIR "
            "to a folder with more, or measure on fewer --windows"
        )


def open_evaluated(source: str, scope: Scope | None = None, trim: Mapping[int, Sequence[int]] | None = None) -> Opened:
    """A dense or compressed checkpoint, ready to run. Raises InputError or CheckpointError.

    trim: layer -> experts of a compressed checkpoint that are to run on the base alone, as if they were stored so.
    """
    folder = locate(source).folder
    content = read_model_config(folder)
    quantization = content.get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "d2moe":
        if scope is not None:
            raise InputError(f"--scope {scope} makes no sense for the dense model {source}")
        return _open_dense(source)
    config = _trimmed(check_checkpoint(folder), trim or {})
    ours, family = config.expert_tensors(), family_of(config)
    reader, scope = SourceReader(folder, ours=ours), scope or config.pruning.scope
    layerwise = LayerwiseModel(reader, family, read_hf_config(folder))
    shape = read_shape(family, content)
    left = [layer for layer in shape.layers if layer not in config.layers]
    kept = find_experts(family, shape, reader, left) if left else None

    def experts(layer: int, hold: bool = True) -> nn.Module | None:
        if layer in config.layers:
            return compressed_experts(config, layer, reader.finite, layerwise.activation, scope)
        return _dense_experts(kept, layer, layerwise.gated, hold) if kept and layer in left else None

    beside = {name: spec for name, spec in reader.specs.items() if not (name in ours or (kept and name in kept.names))}
    stored = max(sum(one.spec.numel for one in config.stored(layer).values()) for layer in config.layers)
    sizes = Evaluated(family, family.settings(content), shape, beside, stored, kept.dtype if kept else None, 0)
    return Opened(folder, layerwise, experts, scope, sizes)


def _open_dense(source: str) -> Opened:
    model = open_dense(source)
    layerwise = LayerwiseModel(model.reader, model.family, read_hf_config(model.folder))

    def experts(layer: int, hold: bool = True) -> nn.Module | None:
        return _dense_experts(model.experts, layer, layerwise.gated, hold) if layer in model.shape.layers else None

    others, dense = model.other_tensors, model.experts.dtype
    sizes = Evaluated(model.family, model.settings, model.shape, others, 0, dense, 0)
    return Opened(model.folder, layerwise, experts, None, sizes, model.remarks)


def _dense_experts(stored: StoredExperts, layer: int, gated: Gated, hold: bool) -> DenseExperts:
    read, device = stored.held if hold else stored.fetched, torch.device("cpu")
    return DenseExperts(stored.shape, read(layer, device), gated, biases=stored.biases(layer, device))


def _trimmed(config: CheckpointConfig, trim: Mapping[int, Sequence[int]]) -> CheckpointConfig:
    """Raises pydantic's ValidationError for a layer without a base, or whose U's are shared by too few experts."""
    layers = dict(config.layers)
    for number, experts in trim.items():
        trimmed = sorted({*layers[number].trimmed, *experts})
        layers[number] = Layer.model_validate(layers[number].model_dump() | {"trimmed": trimmed})
    return config.model_copy(update={"layers": layers})
