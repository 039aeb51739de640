"""Every relative link and anchor of the documents leads somewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
from blocks import DOCUMENTS, anchors, links
from compression import ROOT

ALL = [*DOCUMENTS, ROOT / "CHANGELOG.md", *sorted(ROOT.glob("docs/adr/*.md"))]


def broken(file: Path) -> list[str]:
    """Its links to files or headings that are not there; links to other machines are not followed."""
    found = []
    for link in links(file):
        if "://" in link or link.startswith("mailto:"):
            continue
        path, _, anchor = link.partition("#")
        target = (file.parent / path).resolve() if path else file
        if not target.exists() or not target.is_relative_to(ROOT):
            found.append(f"{link}: no such file")
        elif anchor and (target.suffix != ".md" or anchor not in anchors(target)):
            found.append(f"{link}: no such heading")
    return found


@pytest.mark.parametrize("file", ALL, ids=lambda file: str(file.relative_to(ROOT)))
def test_links_lead_somewhere(file: Path) -> None:
    assert broken(file) == []


def test_a_dead_link_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check itself: of six links three lead nowhere."""
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "there.md").write_text("# A `name` (of 2)!\n# Twice\n# Twice\n```\n# No heading\n```\n")
    good = "[a](there.md#a-name-of-2) [b](there.md#twice-1) [c](https://example.org/x#y) `[d](code.md)`"
    (tmp_path / "file.md").write_text(f"{good}\n[e](gone.md) [f](there.md#no-heading) ![g](gone.svg)\n")
    assert [line.split(":")[0] for line in broken(tmp_path / "file.md")] == [
        "gone.md", "there.md#no-heading", "gone.svg",
    ]  # fmt: skip


def test_every_document_is_in_the_index() -> None:
    """README's last section names each file of docs/, and SECURITY.md."""
    named = {(ROOT / link.partition("#")[0]).resolve() for link in links(ROOT / "README.md")}
    expected = {ROOT / "SECURITY.md", ROOT / "CHANGELOG.md", *ROOT.glob("docs/*.md")}
    assert {str(path.relative_to(ROOT)) for path in expected - named} == set()
