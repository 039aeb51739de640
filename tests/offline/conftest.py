"""What several files of this folder share: an original of another family than the bundled model's, a short text, and a
checkpoint with records."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from edits import add_records
from families import write_family
from synthetic import Synthetic, write_checkpoint


@pytest.fixture(scope="session")
def olmoe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family(tmp_path_factory.mktemp("olmoe") / "olmoe", "olmoe")


@pytest.fixture(scope="session")
def few_words(tmp_path_factory: pytest.TempPathFactory, texts: tuple[Path, Path]) -> Path:
    """Enough to calibrate with where it does not matter with what: most of a small run is reading its text."""
    path = tmp_path_factory.mktemp("words") / "few.txt"
    path.write_text(texts[0].read_text()[:20_000])
    return path


@pytest.fixture
def source(olmoe: Path, tmp_path: Path) -> Path:
    """A copy to be spoilt."""
    return shutil.copytree(olmoe, tmp_path / "source")


@pytest.fixture(scope="module")
def with_records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint without weights of meaning, with records. Not to be changed but for its statistics."""
    folder = tmp_path_factory.mktemp("records") / "model"
    write_checkpoint(folder, Synthetic())
    add_records(folder, parameters=4_396_160)
    return folder
