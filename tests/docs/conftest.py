"""The reader's models, and one server for all commands of the documents that talk to one."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("vllm")

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "deploy")]

from reader import Models, lay_out, make_models  # noqa: E402
from service import DocumentedServer  # noqa: E402


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory, compressed: Path, texts: tuple[Path, Path]) -> Models:
    return make_models(tmp_path_factory.mktemp("reader"), compressed, texts)


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables are cut to the terminal's width."""
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, models: Models) -> Iterator[DocumentedServer]:
    """As docs/serving.md starts it for the info endpoint."""
    folder = tmp_path_factory.mktemp("documented")
    lay_out(folder, models, set())
    command = "VLLM_PLUGINS=d2moe vllm serve ./mixtral-d2-40 --trust-remote-code"
    with DocumentedServer(command, folder, folder / "log") as running:
        yield running
