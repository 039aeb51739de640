"""What of a checkpoint's own Python vLLM runs: with --trust-remote-code, and without."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engine import assert_same, generate
from families import CONFIGS, write_exact, write_family
from synthetic import Synthetic, write_checkpoint

from d2moe_vllm.families import MODELING_FILE

pytest.importorskip("vllm")

READ_CONFIG = (
    "import sys\n"
    "from vllm.plugins import load_general_plugins\n"
    "from vllm.transformers_utils.config import get_config\n"
    "load_general_plugins()\n"
    "for folder in sys.argv[2:]:\n"
    "    print(get_config(folder, trust_remote_code=sys.argv[1] == 'yes').model_type)\n"
)
FORGED = "from transformers import MixtralConfig\n\n\nclass Config(MixtralConfig):\n    pass\n"


def plant(file: Path, marker: Path) -> None:
    """Makes a Python file leave a marker where it is run."""
    before = file.read_text() if file.exists() else ""
    file.write_text(f"{before}\nopen({str(marker)!r}, 'a').close()\n")


def read_configs(modules: Path, trust: bool, *folders: Path) -> list[str]:
    """Configurations as vLLM's server reads them, the plugin loaded as there; their model types."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(modules)}
    command = [sys.executable, "-c", READ_CONFIG, "yes" if trust else "no", *map(str, folders)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [line for line in done.stdout.split() if line in CONFIGS]


@pytest.mark.slow
def test_no_familys_modeling_file_is_run_for_its_configuration(tmp_path: Path) -> None:
    """With the flag, and none needs it; `auto_map` names a configuration class for two."""
    folders = [write_exact(tmp_path / name, write_family(tmp_path / f"{name}-dense", name)) for name in CONFIGS]
    for folder in folders:
        plant(folder / MODELING_FILE, tmp_path / "marker")
    for trust in (True, False):
        assert read_configs(tmp_path / "modules", trust, *folders) == list(CONFIGS)
    assert not (tmp_path / "marker").exists()


@pytest.mark.slow
def test_the_engine_runs_no_file_of_the_checkpoint_and_needs_no_trust(tmp_path: Path) -> None:
    """The same answers with the flag and without it, and the planted line of the modeling file never runs."""
    folder = tmp_path / "checkpoint"
    write_checkpoint(folder, Synthetic(dtype=torch.float32))
    plant(folder / MODELING_FILE, tmp_path / "marker")
    modules = {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    settings = {"dtype": "float32", "enforce_eager": True}
    trusting = generate(tmp_path / "with", folder, modules, trust_remote_code=True, **settings)
    careful = generate(tmp_path / "without", folder, modules, trust_remote_code=False, **settings)
    assert_same(careful, trusting, tolerance=0)
    assert not (tmp_path / "marker").exists()


@pytest.mark.slow
@pytest.mark.parametrize("trust", [True, False], ids=["trusted", "not trusted"])
def test_a_forged_auto_map_is_run_with_the_flag_alone(tmp_path: Path, trust: bool) -> None:
    """What SECURITY.md warns of: the flag is vLLM's and transformers', and holds for more than our file.

    A checkpoint that d2moe wrote names no configuration class for Mixtral. Whoever forges one names his own.
    """
    folder, marker = tmp_path / "checkpoint", tmp_path / "marker"
    write_checkpoint(folder, Synthetic())
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"]["AutoConfig"] = "forged.Config"
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "forged.py").write_text(FORGED)
    plant(folder / "forged.py", marker)
    assert read_configs(tmp_path / "modules", trust, folder) == ["mixtral"]
    assert marker.exists() is trust
