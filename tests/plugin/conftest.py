from __future__ import annotations

from pathlib import Path

import pytest
import torch
from synthetic import Synthetic, every_variant, write_checkpoint

from d2moe_vllm.format.config import CheckpointConfig
from d2moe_vllm.format.files import read_config


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 checkpoint, read-only: copy it to change it."""
    folder = tmp_path_factory.mktemp("synthetic") / "checkpoint"
    write_checkpoint(folder, Synthetic(dtype=torch.float32))
    return folder


@pytest.fixture(scope="session")
def config(checkpoint: Path) -> CheckpointConfig:
    return read_config(checkpoint)


@pytest.fixture(scope="session")
def variants(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Likewise, with every variant of the format in one of its layers."""
    folder = tmp_path_factory.mktemp("variants") / "checkpoint"
    write_checkpoint(folder, every_variant(dtype=torch.float32))
    return folder


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(6, 128), torch.stack([torch.randperm(8)[:2] for _ in range(6)])
