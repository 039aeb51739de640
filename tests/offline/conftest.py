"""One real compression of the bundled model, shared by all tests that only look at it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "examples" / "tiny-mixtral"
COMPRESS = ["--ratio", "0.4", "--windows", "32", "--seq-len", "128"]


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Calibration and held-out text: Python's language reference, split by topic."""
    import language_reference

    return language_reference.write(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="session")
def d2moe() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the installed command as a user would."""

    def run(*arguments: object, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        command = [str(Path(sys.executable).with_name("d2moe")), *(str(a) for a in arguments)]
        return subprocess.run(command, check=False, capture_output=True, text=True, timeout=timeout, cwd=ROOT)

    return run


@pytest.fixture(scope="session")
def compressed(tmp_path_factory: pytest.TempPathFactory, texts: tuple[Path, Path], d2moe: Callable) -> Path:
    """The bundled model at 40 %, by the default recipe on few windows. Not to be changed."""
    out = tmp_path_factory.mktemp("compressed") / "tiny-d2-40"
    done = d2moe("compress", TINY, out, "--calibration", texts[0], *COMPRESS, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["path"] == str(out)
    return out
