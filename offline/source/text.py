"""Text -> token windows, chosen reproducibly and hashed."""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offline.errors import InputError

REMEMBERED = 1 << 22
"""Characters of the longest text whose tokens are remembered."""


@dataclass(frozen=True)
class Windows:
    """tokens: int64 [windows, seq_len]; sha256: of the chosen tokens; available: windows the text has."""

    tokens: Tensor
    available: int

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.tokens.to(torch.int32).numpy().tobytes()).hexdigest()


def read_text(path: Path) -> str:
    """A text file, or the `text` fields of a JSONL file. Raises InputError."""
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"text {path} cannot be read: {error}; give a UTF-8 text or JSONL file") from None
    if path.suffix.lower() != ".jsonl":
        return content
    texts = []
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
            if not isinstance(text, str):
                raise TypeError
            texts.append(text)
        except (json.JSONDecodeError, KeyError, TypeError):
            raise InputError(f"{path}, line {number}: expected a JSON object with a `text` field") from None
    return "\n\n".join(texts)


def load_tokenizer(folder: Path) -> Any:
    """Raises InputError where the model folder has none."""
    from transformers import AutoTokenizer

    try:
        # Left open, transformers asks on the terminal whether to run code that came with the model.
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{folder}: no usable tokenizer ({reason}); copy tokenizer files next to the model") from None


def tokenize(folder: Path, text: str) -> Tensor:
    """All tokens of a text, without special tokens, int64 [tokens]; not to be changed.

    What was asked last is remembered, but for long texts, which would stay in memory: a comparison asks for the same
    ones row by row. Raises InputError where the model folder has no tokenizer.
    """
    files = [(path.name, path.stat()) for path in sorted(folder.iterdir()) if path.suffix != ".safetensors"]
    find = _tokens if len(text) <= REMEMBERED else _tokens.__wrapped__
    return find(folder, tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in files), text)


@functools.lru_cache(maxsize=4)
def _tokens(folder: Path, files: tuple[tuple[str, int, int], ...], text: str) -> Tensor:
    """files: the state of all that a tokenizer may be read from."""
    tokenizer = load_tokenizer(folder)
    # verbose=False: a whole text is longer than the model's limit on purpose, it is cut into windows.
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)


def choose_windows(tokens: Tensor, count: int, seq_len: int, seed: int) -> Windows:
    """`count` of the text's non-overlapping windows, drawn without replacement, in text order.

    Raises InputError where the text is too short.
    """
    available = len(tokens) // seq_len
    if available < count:
        raise InputError(
            f"the calibration text is too short: {len(tokens)} tokens are {available} windows of {seq_len}, "
            f"{count} are needed; give more text, or --windows {available or 1}"
            + (f" --seq-len {len(tokens)}" if not available else "")
        )
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(available, generator=generator)[:count].sort().values
    return Windows(tokens[: available * seq_len].view(available, seq_len)[chosen], available)


def all_windows(tokens: Tensor, seq_len: int) -> Tensor:
    """Every non-overlapping window of `seq_len` tokens, int64 [windows, seq_len]; the rest is dropped.

    Raises InputError where there is none.
    """
    count = len(tokens) // seq_len
    if not count:
        raise InputError(f"the text has {len(tokens)} tokens, less than one window of {seq_len}; lower --seq-len")
    return tokens[: count * seq_len].view(count, seq_len)
