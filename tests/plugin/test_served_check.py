"""The check of a backend against the reference, where vLLM loads a layer (tests/ops/test_selfcheck.py has the rest)."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from one_layer import fill, layer_tensors, make_loader
from torch import Tensor

pytest.importorskip("vllm")

from engine import run_engine
from test_quantization import create, moe, routed_experts, vllm_config  # noqa: F401 - a fixture
from test_quantization import fill as fill_layer
from vllm.config import VllmConfig

from d2moe_vllm import ops
from d2moe_vllm.format.config import CheckpointConfig
from d2moe_vllm.format.files import read_config
from d2moe_vllm.ops import Backend, reference, selfcheck
from d2moe_vllm.ops.selfcheck import SelfCheckError, against_reference
from d2moe_vllm.serving.experts import D2MoEMethod


@pytest.fixture(autouse=True)
def _nothing_checked_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selfcheck, "_DONE", set())


def wrong(*inputs: Any) -> Tensor:
    return -reference.fused_experts(*inputs)


def test_a_wrong_backend_stops_loading(
    config: CheckpointConfig,
    vllm_config: VllmConfig,  # noqa: F811 - the fixture
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vllm_config.load_config.load_format = "dummy"
    for backend in (ops.BACKENDS["cpu"], Backend(wrong)):
        monkeypatch.setitem(ops.BACKENDS, "new", backend._replace(check=True))
        method, layer = D2MoEMethod(moe(), config, 1, "batch", "new"), routed_experts()
        create(method, layer)
        fill_layer(layer)
        if backend.pack is not None:
            method.process_weights_after_loading(layer)
            selfcheck._DONE.clear()
            continue
        with pytest.raises(SelfCheckError, match="backend 'new' does not compute what the reference does on this cpu"):
            method.process_weights_after_loading(layer)


@pytest.mark.parametrize("ranks", [{}, {"tp": (1, 2)}, {"ep": (0, 2)}, {"ep": (1, 4)}, {"ep": (0, 8)}])
@pytest.mark.parametrize("layer", range(4))
def test_every_variant_on_every_kind_of_rank(
    variants: Path, monkeypatch: pytest.MonkeyPatch, layer: int, ranks: dict[str, tuple[int, int]]
) -> None:
    """The right backend passes, one that forgets the gates does not."""
    config = read_config(variants)
    loader = make_loader(config, layer=layer, **ranks)
    found = fill(loader, layer_tensors(variants, layer))
    spec = loader.spec("batch", activation="silu", prune_down="ep" not in ranks)

    def load(backend: Backend) -> None:
        monkeypatch.setitem(ops.BACKENDS, "new", backend._replace(check=True))
        parameters = [None if name not in found else found[name].clone() for name in ops.PARAMETERS]
        dtype = next(tensor.dtype for tensor in found.values() if tensor.is_floating_point())
        sizes = {"hidden_size": config.hidden_size, "top_k": 2, "dtype": dtype}
        with against_reference(lambda: parameters, "new", spec, **sizes):
            if backend.pack is not None:
                parameters = ops.flat(*backend.pack(*ops.halves(parameters), spec))

    with pytest.raises(SelfCheckError):
        load(Backend(lambda x, gates, *rest: reference.fused_experts(x, torch.ones_like(gates), *rest)))
    load(ops.BACKENDS["cpu"])


@pytest.mark.slow
def test_the_engine_does_not_start(checkpoint: Path, tmp_path: Path) -> None:
    """With vLLM's own loading: exit code 1, and the log says what to do. The switch it names then serves."""
    (tmp_path / "sitecustomize.py").write_text(
        "import d2moe_vllm.ops as ops\n"
        "from d2moe_vllm.ops import Backend, reference\n"
        "ops.BACKENDS['cpu'] = Backend(lambda *i: -reference.fused_experts(*i), ('cpu',), check=True)\n"
    )
    env = {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    for extra, served in (({}, False), ({"additional_config": {"d2moe": {"backend": "reference"}}}, True)):
        llm = {"enforce_eager": True, **extra}
        code, log, output = run_engine(tmp_path, checkpoint, env, prompts=["Lists are"], max_tokens=2, llm=llm)
        assert (code == 0) == served, log[-3000:]
        assert ("""start with --additional-config '{"d2moe": {"backend": "reference"}}'""" in log) != served
        assert output.exists() == served
