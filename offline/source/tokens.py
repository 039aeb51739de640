"""Text -> tokens, checked to be the text, and token windows, chosen reproducibly and hashed."""

from __future__ import annotations

import codecs
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import re
import tempfile
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from offline.errors import InputError
from offline.source.families import lookup
from offline.source.text import Cursor, Text

_A = TypeVar("_A")
_B = TypeVar("_B")
WHOLE, SPREAD = 1 << 20, 16
"""Characters of a text, and for each token that the windows need, from which on it is not tokenized as a whole."""
AHEAD = 8
"""Characters for each token of a window that are tokenized for it, where the whole text is not."""
LINE = 4096
"""Characters in which the beginning of a line is looked for."""
REMEMBERED = 4
"""Pieces of text whose tokens are kept."""
CONFIG, EXACT = "tokenizer_config.json", "tokenizer.json"
GENERIC = "PreTrainedTokenizerFast"
"""transformers' class that takes tokenizer.json as it is."""
FILES = (EXACT, "tokenizer.model", "spiece.model", "tiktoken.model", "*.tiktoken", "tekken.json", "vocab.json")
"""One of them a tokenizer needs, where it is not code."""
PROBE = (
    "def fib(n):\n    return n if n < 2 else fib(n - 1)\n\nIn 1984, naïve Zoë paid 1,234.50 € (世界, мир) - isn't it?"
)
"""What tells tokenizers apart: spaces, indentation, numbers, accents, other scripts, contractions."""


@dataclass(frozen=True)
class Windows:
    """tokens: int64 [windows, seq_len]; sha256: of the chosen tokens."""

    tokens: Tensor

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.tokens.to(torch.int32).numpy().tobytes()).hexdigest()


class _Codec(Protocol):
    """Reads text, without special tokens, and writes it again."""

    name: str

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...


class _Loaded:
    """A tokenizer as transformers loads it."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self.name = tokenizer, type(tokenizer).__name__

    def encode(self, text: str) -> list[int]:
        # verbose=False: a whole text is longer than the model's limit on purpose, it is cut into windows.
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    @property
    def count(self) -> int:
        """Tokens, added ones included; 0 where code does not say."""
        try:
            return len(self._tokenizer)
        except Exception:
            return 0

    @property
    def special(self) -> tuple[str, ...]:
        return tuple(str(token) for token in getattr(self._tokenizer, "added_tokens_decoder", {}).values())


class _Exact:
    """A tokenizer as tokenizer.json describes it. Raises InputError where the file cannot be read."""

    name = EXACT

    def __init__(self, file: Path) -> None:
        from tokenizers import Tokenizer as Described

        try:
            self._tokenizer = Described.from_file(str(file))
            # What a model's own limit would cut off.
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
        except Exception as error:  # the library raises Exception itself
            if _json(file):
                raise InputError(
                    f"{file} cannot be read by tokenizers {importlib.metadata.version('tokenizers')} ({_line(error)}); "
                    "pip install --upgrade tokenizers transformers, or name another tokenizer with --tokenizer DIR"
                ) from None
            mark = file.read_bytes()[:3] == codecs.BOM_UTF8
            what = "begins with a byte-order mark; save it without" if mark else "is no JSON object; copy it again"
            raise InputError(f"{file} {what}") from None

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False)
        return text


@dataclass(frozen=True)
class Tokenizer:
    """What reads a model's texts.

    folder: where it lies; vocabulary: ids that the model has, None where it does not say; notes: what a user should
    know; config: what has to be written into the tokenizer_config.json of a copy for others to read as this does, None
    where they do already.
    """

    folder: Path
    vocabulary: int | None
    codec: _Codec
    special: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    config: dict[str, Any] | None = None
    _last: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def encode(self, text: str) -> Tensor:
        """All tokens of a piece of text, without special tokens, int64 [tokens]; not to be changed.

        Raises InputError where decoded again they are not the text, or where the model has no such tokens.
        """
        # A comparison asks for the same texts row by row.
        if text not in self._last:
            ids = _called(self.folder, self.codec.encode, text)
            if ids and not all(isinstance(one, int) for one in ids):
                raise InputError(f"{self.folder}: its tokenizer has no token for a part of the text; "
                                 "name another with --tokenizer DIR")  # fmt: skip
            if ids and self.vocabulary and not (min(ids) >= 0 and max(ids) < self.vocabulary):
                raise InputError(
                    f"{self.folder}: its tokenizer gives the token {max(ids)}, and the model has {self.vocabulary} "
                    "(config.json: vocab_size); it is another model's: name the right one with --tokenizer DIR"
                )
            self._check(text, _called(self.folder, self.codec.decode, ids))
            while len(self._last) >= REMEMBERED:
                del self._last[next(iter(self._last))]
            self._last[text] = torch.tensor(ids, dtype=torch.int64)
        return self._last[text]

    def bytes_behind_first(self, window: Tensor) -> int:
        """UTF-8 bytes of the text that a window's tokens but the first stand for; window: int64 [tokens]. A character
        that the window's ends cut counts as three."""
        ids = window.tolist()
        whole, first = (_called(self.folder, self.codec.decode, part) for part in (ids, ids[:1]))
        return len(whole.encode()) - len(first.encode())

    def _check(self, text: str, decoded: str) -> None:
        """Raises InputError where text came back as another one."""
        if decoded == text:
            return
        read, wrote = (_folded(one, self.special) for one in (text, decoded))
        if read == wrote:
            return
        at = next((n for n, (a, b) in enumerate(zip(read, wrote, strict=False)) if a != b), min(len(read), len(wrote)))
        start = max(at - 12, 0)
        raise InputError(
            f"{self.folder}: its tokenizer reads {read[start : at + 20]!r} as {wrote[start : at + 20]!r}, so "
            "what it gives is another text; mend it, or name another with --tokenizer DIR"
        )


def _folded(text: str, special: Sequence[str]) -> str:
    """Without what tokenizers may change and mean the same text: forms of one character, a space in front of all,
    and white space around special tokens."""
    found = [token for token in special if token and token in text]
    if found:
        text = re.sub(rf"\s*({'|'.join(map(re.escape, found))})\s*", r"\1", text)
    return unicodedata.normalize("NFKC", text).removeprefix(" ")


@dataclass(frozen=True)
class TokenizerChoice:
    """folder: that holds the tokenizer's files, None for the model's own; trust: code that comes with it may be run."""

    folder: str | None = None
    trust: bool = False


OWN = TokenizerChoice()


def open_tokenizer(model: Path, choice: TokenizerChoice = OWN) -> Tokenizer:
    """The tokenizer of a model folder. Raises InputError where there is none, where it cannot be read, and where it is
    code that may not be run."""
    folder = Path(choice.folder).expanduser() if choice.folder else model
    if not folder.is_dir():
        raise InputError(f"--tokenizer {choice.folder} is no folder; give one that holds a tokenizer's files")
    folder = folder.resolve()
    state = tuple((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.iterdir())
                  if path.suffix != ".safetensors" and path.is_file())  # fmt: skip
    config = _json(model / "config.json")
    family = lookup(config)
    vocabulary = (family.settings(config) if family else config).get("vocab_size")
    known = vocabulary if isinstance(vocabulary, int) else None
    return _open(folder, state, known, choice.trust, choice.folder is not None)


@functools.lru_cache(maxsize=2)
def _open(
    folder: Path, state: tuple[tuple[str, int, int], ...], vocabulary: int | None, trust: bool, given: bool
) -> Tokenizer:
    """state: of all that a tokenizer may be read from."""
    code = _code(folder)
    exact = _Exact(folder / EXACT) if (folder / EXACT).is_file() else None
    if code and not trust and not exact:
        raise InputError(
            f"{folder}: its tokenizer is code ({code}); look at it, and add --trust-remote-code to run it, or name "
            "another with --tokenizer DIR"
        )
    loaded = _Loaded(_load(folder, trust=trust and code is not None))
    codec: _Codec = loaded
    notes, config = [], None
    if vocabulary and (count := loaded.count) and count > vocabulary:
        notes.append(
            f"{folder}: its tokenizer has {count} tokens, the model {vocabulary}: text with one of the others cannot "
            "be served"
        )
    if code and not trust:
        notes.append(f"{folder}: {code} is code and is not run, {EXACT} is read (--trust-remote-code would run it)")
    if exact and not (code and trust) and _called(folder, loaded.encode, PROBE) != exact.encode(PROBE):
        codec = exact
        note = f"{folder}: transformers' {loaded.name} does not read as {EXACT} says, which is taken"
        if not given and not code:
            config = {**_json(folder / CONFIG), "tokenizer_class": GENERIC}
            _check_generic(folder, config, exact)
            note += f"; a result's {CONFIG} names {GENERIC}, which reads so too"
        notes.append(note)
    return Tokenizer(folder, vocabulary, codec, loaded.special, tuple(notes), config)


def forget_tokenizers() -> None:
    """Of a run that has read its texts: a vocabulary is a hundred megabytes and more."""
    _open.cache_clear()


def _check_generic(folder: Path, config: dict[str, Any], exact: _Exact) -> None:
    """Raises InputError unless transformers reads as tokenizer.json says with this tokenizer_config.json."""
    with tempfile.TemporaryDirectory(prefix="d2moe-tokenizer-") as name:
        copy = Path(name)
        for file in (EXACT, "config.json"):
            if (folder / file).is_file():
                (copy / file).symlink_to(folder / file)
        (copy / CONFIG).write_text(json.dumps(config), encoding="utf-8")
        if _called(folder, _Loaded(_load(copy, trust=False)).encode, PROBE) != exact.encode(PROBE):
            raise InputError(
                f"{folder}: transformers does not read as {EXACT} says, and so vLLM would not; mend {CONFIG}, or name "
                "another tokenizer with --tokenizer DIR"
            )


def _load(folder: Path, *, trust: bool) -> Any:
    """By transformers. Raises InputError."""
    from transformers import AutoTokenizer

    if not trust and not any(any(folder.glob(pattern)) for pattern in FILES):
        raise InputError(
            f"{folder}: no usable tokenizer (none of {', '.join(FILES)}); copy the tokenizer's files next to the "
            "model, or name it with --tokenizer DIR"
        )
    if not (folder / EXACT).exists() and not trust:
        if (folder / "tokenizer.model").exists() and importlib.util.find_spec("sentencepiece") is None:
            raise InputError(f"{folder}: tokenizer.model needs sentencepiece, which is not installed; "
                             "pip install sentencepiece")  # fmt: skip
        if split := next((file for file in (*folder.glob("tiktoken.model"), *folder.glob("*.tiktoken"))), None):
            # transformers would guess a pattern, and read otherwise than the model was trained.
            raise InputError(
                f"{split} does not say how text is split into words, the model's own code does; name a folder with its "
                f"{EXACT}, or with its code, by --tokenizer DIR"
            )
    try:
        # Left open, transformers asks on the terminal whether to run code that came with the model.
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
    except Exception as error:  # of many types, and of code that came with the model
        what = "its code fails" if trust else "no usable tokenizer"
        raise InputError(
            f"{folder}: {what} ({_line(error)}); mend its files, pip install --upgrade transformers, or name another "
            "with --tokenizer DIR"
        ) from None


def _code(folder: Path) -> str | None:
    """The code that a tokenizer is, as transformers finds it, None where it is none."""
    for file in (CONFIG, "config.json"):
        found = _json(folder / file).get("auto_map")
        named = found.get("AutoTokenizer") if isinstance(found, dict) else found if file == CONFIG else None
        # A slow one and a fast one, either of which may be missing.
        names = [name for name in (named if isinstance(named, list) else [named]) if isinstance(name, str)]
        if names:
            return f"{names[-1].split('--')[-1].split('.')[0]}.py"
    return None


def _json(path: Path) -> dict[str, Any]:
    """An object, or nothing where there is none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _called(folder: Path, function: Callable[[_A], _B], argument: _A) -> _B:
    """Raises InputError for whatever a tokenizer raises."""
    try:
        return function(argument)
    except Exception as error:
        raise InputError(
            f"{folder}: its tokenizer fails on the text ({_line(error)}); name another with --tokenizer DIR"
        ) from None


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def choose_windows(tokenizer: Tokenizer, text: Text, count: int, seq_len: int, seed: int) -> Windows:
    """`count` windows of a text that do not overlap, drawn reproducibly, in text order.

    Of a text that is not much longer than the windows need, all is tokenized and cut into windows, of which some are
    drawn without replacement. A longer one is cut into `count` parts of as many characters, and a window begins at a
    drawn place of each, at the beginning of a line where there is one near: only what the windows need is tokenized.
    Raises InputError where the text is too short, and as `Text.characters` and `Tokenizer.encode` do.
    """
    length = text.length()
    generator = torch.Generator().manual_seed(seed)
    if length > max(WHOLE, SPREAD * count * seq_len):
        starts = (torch.arange(count) + torch.rand(count, generator=generator, dtype=torch.float64)) * (length / count)
        drawn = list(_excerpts(tokenizer, text, starts.long().tolist(), seq_len))
        if not len(drawn[-1]):  # its place was too near the end; so much before it no other window lies
            drawn[-1:] = _excerpts(tokenizer, text, [length - AHEAD * seq_len], seq_len)
        found = [window for window in drawn if len(window)]
        if len(found) < count:
            raise _too_short(
                text, f"at {count} drawn places it has {len(found)} windows of {seq_len} tokens", len(found)
            )
        return Windows(torch.stack(found))
    pieces = [tokenizer.encode(piece) for piece in text.pieces()]
    tokens = torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int64)
    available = len(tokens) // seq_len
    if available < count:
        what = f"{len(tokens)} tokens are {available} windows of {seq_len}, {count} are needed"
        raise _too_short(text, what, available, len(tokens))
    chosen = torch.randperm(available, generator=generator)[:count].sort().values
    return Windows(tokens[: available * seq_len].view(available, seq_len)[chosen])


def _too_short(text: Text, what: str, windows: int, tokens: int = 0) -> InputError:
    """windows: that there are of the wanted length; tokens: of a text that has none."""
    mend = f", or --windows {windows}" if windows else f", or --windows 1 --seq-len {tokens}" if tokens > 1 else ""
    return InputError(f"the text is too short ({text}): {what}; give more text{mend}")


def _excerpts(tokenizer: Tokenizer, text: Text, starts: Sequence[int], seq_len: int) -> Iterator[Tensor]:
    """A window [seq_len] from about each place on, empty where the text ends before it is full."""
    cursor = Cursor(text)
    for start in starts:
        cursor.go(start)
        near = cursor.ahead(LINE)
        # Behind a line's end, else in front of a word.
        cursor.go(cursor.position + (near.find("\n") + 1 or max(near.find(" "), 0)))
        wanted = AHEAD * seq_len
        # One token more than is needed: the last may be half of one.
        while len(tokens := tokenizer.encode(piece := cursor.ahead(wanted))) <= seq_len and len(piece) == wanted:
            wanted *= 2
        cursor.go(cursor.position + len(piece))
        yield tokens[: seq_len if len(tokens) >= seq_len else 0]
