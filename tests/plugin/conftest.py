from __future__ import annotations

from pathlib import Path

import pytest
import torch
from synthetic import Synthetic, write_checkpoint

from d2moe_vllm.checkfiles import read_config
from d2moe_vllm.checkpoint import CheckpointConfig


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 checkpoint, read-only: copy it to change it."""
    folder = tmp_path_factory.mktemp("synthetic") / "checkpoint"
    write_checkpoint(folder, Synthetic(dtype=torch.float32))
    return folder


@pytest.fixture(scope="session")
def config(checkpoint: Path) -> CheckpointConfig:
    return read_config(checkpoint)
