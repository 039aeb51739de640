"""A small original of another family than the bundled model's, to be spoilt."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from families import write_family


@pytest.fixture(scope="session")
def olmoe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family(tmp_path_factory.mktemp("olmoe") / "olmoe", "olmoe")


@pytest.fixture
def source(olmoe: Path, tmp_path: Path) -> Path:
    """A copy to be spoilt."""
    return shutil.copytree(olmoe, tmp_path / "source")
