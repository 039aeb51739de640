"""Markdown as the tests of the documents see it: fenced blocks with their marks, inline code, links and headings."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from compression import ROOT

DOCUMENTS = sorted(
    path
    for pattern in ("README.md", "SECURITY.md", "docs/*.md", "deploy/*/README.md", "examples/*/README.md")
    for path in ROOT.glob(pattern)
)
"""Whose command blocks are run. Decisions (docs/adr) are history, and only their links are checked."""

_MARK = re.compile(r"^\s*<!--\s*needs:\s*([\w, -]*?)\s*-->\s*$")
_FENCE = re.compile(r"^(\s*)(`{3,})\s*(\S*)\s*$")


class MarkupError(Exception):
    """What no reader would see as it was meant: a fence without an end, a mark before nothing."""


@dataclass(frozen=True)
class Block:
    """line: of the opening fence, from 1. needs: the words of the mark `<!-- needs: a, b -->` directly before it."""

    file: Path
    line: int
    language: str
    text: str
    needs: frozenset[str] = field(default_factory=frozenset)

    @property
    def place(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line}"

    @property
    def kind(self) -> str:
        """commands, session (commands with what they print), formula, or the language. Raises MarkupError."""
        if self.language in ("sh", "bash"):
            return "commands"
        if self.language in ("python", "yaml", "json"):
            return self.language
        if self.language in ("", "console"):
            return "session" if self.text.startswith("$ ") else "formula"
        raise MarkupError(f"{self.place}: nothing here knows what to do with {self.language!r}")


def blocks(file: Path, content: str | None = None) -> list[Block]:
    """Every fenced block of a document. Raises MarkupError."""
    lines = (file.read_text(encoding="utf-8") if content is None else content).split("\n")
    found, number = [], 0
    while number < len(lines):
        mark = _MARK.match(lines[number])
        if mark:
            number += 1
        opening = _FENCE.match(lines[number]) if number < len(lines) else None
        if mark and not opening:
            raise MarkupError(f"{file.name}:{number}: a mark that no block follows")
        if opening:
            indent, ticks, language = opening.groups()
            ends = [at for at in range(number + 1, len(lines)) if lines[at].strip() == ticks]
            if not ends:
                raise MarkupError(f"{file.name}:{number + 1}: a block without an end")
            text = "\n".join(line.removeprefix(indent) for line in lines[number + 1 : ends[0]])
            needs = frozenset(re.split(r"[,\s]+", mark[1])) - {""} if mark else frozenset()
            if mark and not needs:
                raise MarkupError(f"{file.name}:{number}: an empty mark")
            found.append(Block(file, number + 1, language, text, needs))
            number = ends[0]
        number += 1
    return found


def prose(file: Path) -> str:
    """A document without its fenced blocks and comments."""
    kept, inside = [], False
    for line in file.read_text(encoding="utf-8").split("\n"):
        if _FENCE.match(line):
            inside = not inside
        elif not inside:
            kept.append(line)
    return re.sub(r"<!--.*?-->", "", "\n".join(kept), flags=re.DOTALL)


def inline_code(file: Path) -> Iterator[str]:
    """What stands between single backticks."""
    yield from (found.replace("\n", " ") for found in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose(file)))


def links(file: Path) -> list[str]:
    """Targets of links and pictures, those of reference definitions and HTML included."""
    text = re.sub(r"(?<!`)`[^`]+`(?!`)", "code", prose(file))
    inline = re.findall(r"\]\(\s*<?([^)\s>]+)>?[^)]*\)", text)
    references = re.findall(r"^\s{0,3}\[[^\]]+\]:\s*(\S+)", text, re.MULTILINE)
    html = re.findall(r"<(?:img|a|source)\b[^>]*?\b(?:src|href|srcset)=\"([^\"]+)\"", text)
    return [*inline, *references, *html]


def anchors(file: Path) -> set[str]:
    """What `#...` can name in a document, by GitHub's rule."""
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6}\s+(.+?)\s*#*\s*$", prose(file), re.MULTILINE):
        plain = re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        number = 0
        while (slug if not number else f"{slug}-{number}") in found:
            number += 1
        found.add(slug if not number else f"{slug}-{number}")
    return found | set(re.findall(r"<a\s+(?:id|name)=\"([^\"]+)\"", prose(file)))
