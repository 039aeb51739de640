"""Puts tests/, benchmarks/ and examples/ on sys.path, and makes one real compression that all tests share."""

import gc
import json
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

# As the d2moe command does: threads that wait must sleep, spinning ones starve each other on two cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# One thread, as the other core has tests of its own, and as last bits depend on the number.
os.environ.setdefault("OMP_NUM_THREADS", "1")
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), *(str(HERE.parent / name) for name in ("benchmarks", "examples"))]
MODULES = tempfile.TemporaryDirectory(prefix="d2moe-test-modules-")
"""Where transformers copies modeling files, and reads them again: of this session alone."""
os.environ["HF_MODULES_CACHE"] = MODULES.name
# A shell lets what it starts in the background ignore Ctrl-C; what tests interrupt would ignore it too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The tiers, and which tests one worker of xdist runs together, the longest first."""
    import tiers

    config.stash[tiers.EVERY_TEST] = [item.nodeid for item in items]
    for item in items:
        if tiers.is_slow(item.nodeid):
            item.add_marker(pytest.mark.slow)
    place = {name: number for number, name in enumerate(tiers.FIRST)}
    items.sort(key=lambda item: place.get(tiers.group(item.nodeid), len(place)))


def pytest_collection_finish() -> None:
    """What is there by now stays to the end: no collection of garbage need look at it again."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Tests that share a server, and those of a file, go to one worker."""
    import tiers
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return tiers.group(nodeid)

    return ByGroup(config, log)


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Calibration and held-out text: Python's language reference, split by topic."""
    import language_reference

    return language_reference.write(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="session")
def compressed(tmp_path_factory: pytest.TempPathFactory, texts: tuple[Path, Path]) -> Path:
    """The bundled model at 40 %, by the default recipe on few windows. Not to be changed."""
    from compression import COMPRESS, TINY, d2moe_here

    out = tmp_path_factory.mktemp("compressed") / "tiny-d2-40"
    done = d2moe_here("compress", TINY, out, "--calibration", texts[0], *COMPRESS, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["path"] == str(out)
    return out


@pytest.fixture(scope="session")
def pruned(tmp_path_factory: pytest.TempPathFactory, texts: tuple[Path, Path]) -> Path:
    """The same with uniform ranks and a pruned base in every layer: what the default recipe may do without."""
    from compression import COMPRESS, TINY, d2moe_here

    folder = tmp_path_factory.mktemp("pruned")
    (folder / "recipe.yaml").write_text("allocation: uniform\n")
    recipe = ("--recipe", folder / "recipe.yaml", "--calibration", texts[0])
    done = d2moe_here("compress", TINY, folder / "tiny", *COMPRESS, *recipe)
    assert done.returncode == 0, done.stderr
    return folder / "tiny"
