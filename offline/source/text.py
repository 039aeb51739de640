"""Texts as streams of characters: plain text, JSON Lines or one JSON array, several files one behind the other.

However long a text is, a piece of it is in memory at a time.
"""

from __future__ import annotations

import codecs
import hashlib
import io
import itertools
import json
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from offline.errors import InputError

PIECE = 1 << 18
"""Characters that are tokenized together, which takes some 200 bytes for each."""
ENTRY = 1 << 23
"""Characters that one entry of a JSON text may have; plain text has no such bound."""
_WHITE = re.compile(r"\s*")
BYTES = 1 << 16
"""Read at a time."""
BETWEEN = "\n\n"
"""Stands between the entries of a JSON text, and between two files."""
JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
WANTED = "expected a JSON object with a `text` field"
MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16's, which is its beginning
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
PACKED = {
    b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip",
    b"PAR1": "Parquet", b"ARROW1": "Arrow", b"%PDF-": "PDF",
}  # fmt: skip


@dataclass(frozen=True)
class Text:
    """One or several files, read as one text in their order."""

    paths: tuple[Path, ...]

    def __str__(self) -> str:
        return ", ".join(map(str, self.paths))

    @property
    def nbytes(self) -> int:
        """Of the files on disk. Raises InputError where one is none that can be read as often as needed."""
        return sum(_size(path) for path in self.paths)

    def characters(self) -> Iterator[str]:
        """The text in parts of any length, line ends as `\\n`.

        Raises InputError, by file and line, for what is no text or no Unicode.
        """
        for number, path in enumerate(self.paths):
            if number:
                yield BETWEEN
            yield from _entries(path) if path.suffix.lower() in JSON_SUFFIXES else _prose(path)

    def pieces(self) -> Iterator[str]:
        """The text in parts of at most PIECE characters, cut before the beginning of a line where there is one, else
        of a word. Raises as `characters` does."""
        held = ""
        for part in self.characters():
            held += part
            while len(held) > PIECE:
                end = _cut(held)
                yield held[:end]
                held = held[end:]
        if held:
            yield held

    def length(self) -> int:
        """Characters. Raises as `characters` does."""
        return sum(map(len, self.characters()))

    def sha256(self) -> str:
        """Of the whole text in UTF-8. Raises as `characters` does."""
        digest = hashlib.sha256()
        for part in self.characters():
            digest.update(part.encode())
        return digest.hexdigest()


def as_text(paths: Path | Sequence[Path]) -> Text:
    """The text of one file or of several."""
    return Text((paths,) if isinstance(paths, Path) else tuple(paths))


class Cursor:
    """Goes through a text forwards, and looks ahead."""

    def __init__(self, text: Text) -> None:
        self._parts = text.characters()
        self._held = ""
        self.position = 0

    def ahead(self, count: int) -> str:
        """The next `count` characters, or those that are left."""
        held = [self._held]
        length = len(self._held)
        while length < count and (part := next(self._parts, None)) is not None:
            held.append(part)
            length += len(part)
        self._held = "".join(held)
        return self._held[:count]

    def go(self, position: int) -> None:
        """Forwards to the character of this number, or to the end."""
        while self.position + len(self._held) < position and (part := next(self._parts, None)) is not None:
            self.position += len(self._held)
            self._held = part
        step = min(max(position - self.position, 0), len(self._held))
        self._held = self._held[step:]
        self.position += step


def _cut(text: str) -> int:
    """Where to cut: tokenizers split words and lines from one another, but may join white space to one token."""
    for mark in ("\n", " "):
        end = text.rfind(mark, PIECE // 2, PIECE)
        while end > 0 and (text[end - 1].isspace() or text[end + 1].isspace()):
            end = text.rfind(mark, PIECE // 2, end)
        if end > 0:
            # A line's end belongs to the line, a space to the word behind it.
            return end + (mark == "\n")
    return PIECE


def _size(path: Path) -> int:
    try:
        status = path.stat()
    except OSError as error:
        raise InputError(f"text {path} cannot be read: {error.strerror}; give a UTF-8 text or JSONL file") from None
    if stat.S_ISDIR(status.st_mode):
        raise InputError(f"text {path} is a folder; give the files in it")
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"text {path} is no regular file, and texts are read more than once; save it as a file first")
    return status.st_size


def _plain(path: Path) -> Iterator[str]:
    """The characters of a file. Raises InputError."""
    _size(path)
    lines = 1
    try:
        with path.open("rb") as file:
            start = file.read(8)
            if kind := next((kind for magic, kind in PACKED.items() if start.startswith(magic)), None):
                raise InputError(f"text {path} is a {kind} file; unpack it to plain text or JSONL first")
            mark, encoding = next(((m, e) for m, e in MARKS if start.startswith(m)), (b"", "utf-8"))
            file.seek(len(mark))
            decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder(encoding)(), translate=True)
            ended = False
            while not ended:
                content = file.read(BYTES)
                ended = not content
                part = decoder.decode(content, final=ended)
                if "\0" in part:
                    line = lines + part[: part.index("\0")].count("\n")
                    raise InputError(f"text {path}, line {line}: holds NUL, so it is no text; save it as UTF-8")
                lines += part.count("\n")
                yield part
    except UnicodeDecodeError as error:
        line = lines + error.object[: error.start].decode(error.encoding, errors="replace").count("\n")
        raise InputError(f"text {path}, line {line}: no valid {error.encoding.upper()} ({error.reason}); "
                         "save it as UTF-8") from None  # fmt: skip
    except OSError as error:
        raise InputError(f"text {path} cannot be read: {error.strerror}; give a UTF-8 text or JSONL file") from None


def _prose(path: Path) -> Iterator[str]:
    """The characters of a file that is called no JSON. Raises InputError where it is some."""
    for number, part in enumerate(_plain(path)):
        if not number and _looks_like_json(part):
            raise InputError(f"text {path} holds JSON; call it .jsonl or .json, so that only the texts in it are read")
        yield part


def _looks_like_json(start: str) -> bool:
    """Whether a text begins as a JSON text does: with two lines that are entries, or one that is all, or an array."""
    if re.match(r"\s*\[\s*\{\s*\"", start):
        return True
    if "\n" not in start and re.match(r"\s*\{\s*\"", start):  # the rest of a long line is not here yet
        return bool(re.search(r"\"text\"\s*:\s*\"", start))
    lines = [line for line in start.split("\n") if line.strip()][:2]
    try:
        return bool(lines) and all(isinstance(json.loads(line)["text"], str) for line in lines)
    except (ValueError, TypeError, KeyError, RecursionError):
        return False


def _entries(path: Path) -> Iterator[str]:
    """The texts of a JSON file's entries, and what stands between them. Raises InputError."""
    parts = _plain(path)
    start = next((part for part in parts if part.strip()), "")
    read = _array if start.lstrip().startswith("[") else _lines
    for number, text in enumerate(read(path, itertools.chain([start], parts))):
        if number:
            yield BETWEEN
        yield text


def _lines(path: Path, parts: Iterable[str]) -> Iterator[str]:
    """The texts of JSON Lines."""
    held, number = "", 0
    for part in itertools.chain(parts, ["\n"]):
        *lines, held = (held + part).split("\n")
        for line in lines:
            number += 1
            if line.strip():
                try:
                    content = json.loads(line)
                except (ValueError, RecursionError):  # ValueError: also a number of too many digits
                    raise InputError(f"{path}, line {number}: {WANTED}; this is no JSON") from None
                yield _text_of(content, path, number)
        if len(held) > ENTRY:
            raise _too_long(path, number + 1)


def _array(path: Path, parts: Iterable[str]) -> Iterator[str]:
    """The texts of one JSON array, which may be all in one line."""
    decoder, source = json.JSONDecoder(), iter(parts)
    held, at, line = "", 0, 1

    def more() -> bool:
        """Holds at least twice as much, as an entry is looked at anew each time; False at the end."""
        nonlocal held, at
        found = [held[at:]]
        least = 2 * len(found[0]) + 1
        while sum(map(len, found)) < least and (part := next(source, None)) is not None:
            found.append(part)
        held, at = "".join(found), 0
        return len(found) > 1

    def take(wanted: str, what: str) -> str:
        """The next character that is no white space, one of `wanted`. Raises InputError."""
        nonlocal at, line
        found = peek()
        if not found or found not in wanted:
            raise InputError(f"{path}, line {line}: expected {what} in the JSON array")
        at += 1
        return found

    def peek() -> str:
        """The next character that is no white space, empty at the end."""
        nonlocal at, line
        while True:
            end = _WHITE.match(held, at).end()  # type: ignore[union-attr]
            line, at = line + held.count("\n", at, end), end
            if at < len(held) or not more():
                return held[at : at + 1]

    take("[", "[")
    ended = take("]", "]") if peek() == "]" else ""
    while not ended:
        if peek() not in ("{", ""):
            raise InputError(f"{path}, line {line}: {WANTED} as each entry of the array")
        try:
            content, end = decoder.raw_decode(held, at)
        except (ValueError, RecursionError) as error:
            if len(held) - at > ENTRY:
                raise _too_long(path, line) from None
            if _is_wrong(error, len(held)) or not more():
                raise InputError(f"{path}, line {line}: {WANTED}; this is no JSON") from None
            continue
        yield _text_of(content, path, line)
        line, at = line + held.count("\n", at, end), end
        ended = take(",]", "a comma or ]").strip(",")
    if peek():
        raise InputError(f"{path}, line {line}: more behind the end of the array; give one array, or JSON Lines")


def _is_wrong(error: Exception, length: int) -> bool:
    """Whether more of the file would not mend it."""
    if not isinstance(error, json.JSONDecodeError):
        return True
    # An escape sequence may be cut off in the middle.
    return not error.msg.startswith("Unterminated string") and error.pos < length - 12


def _text_of(content: object, path: Path, line: int) -> str:
    if not isinstance(content, dict):
        raise InputError(f"{path}, line {line}: {WANTED}; it is {type(content).__name__}")
    text = content.get("text")
    if "text" not in content:
        names = ", ".join(repr(name) for name in list(content)[:5]) or "nothing"
        raise InputError(f"{path}, line {line}: {WANTED}; it has {names}")
    if not isinstance(text, str):
        raise InputError(f"{path}, line {line}: {WANTED}; `text` is {type(text).__name__}, no string")
    if len(text) > ENTRY:
        raise _too_long(path, line)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise InputError(f"{path}, line {line}: the text holds {half}, half of a surrogate pair, which is no Unicode; "
                         "mend or drop this entry") from None  # fmt: skip
    return text


def _too_long(path: Path, line: int) -> InputError:
    return InputError(f"{path}, line {line}: an entry of more than {ENTRY:,} characters; split it, or save it as plain "
                      "text, which may be of any length")  # fmt: skip
