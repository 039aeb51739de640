"""What is counted and how it reaches the front-end, without a server."""

from __future__ import annotations

import asyncio
import logging.handlers
import subprocess
import sys
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forks
import pytest
import torch
from fastapi import FastAPI
from fastapi.testclient import TestClient
from few_bits import SETS, write_few
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("vllm")

from vllm.forward_context import override_forward_context

from d2moe_vllm import compat
from d2moe_vllm.format.config import CheckpointConfig
from d2moe_vllm.format.files import read_config
from d2moe_vllm.observability import collector, files, recorder
from d2moe_vllm.observability import endpoint as endpoint_module
from d2moe_vllm.observability.endpoint import Endpoint
from d2moe_vllm.observability.info import describe
from d2moe_vllm.observability.metrics import EXPERT_TOKENS, MAX_GROUPS, columns_used_ratio, layer_groups

REQUEST = SimpleNamespace(attn_metadata={}, is_padding=None)
PROFILING = SimpleNamespace(attn_metadata=None, is_padding=None)


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, config: CheckpointConfig) -> Iterator[Path]:
    """A recorder of two layers with 4 experts here (global 2 to 5), which writes often."""
    monkeypatch.setattr(compat, "global_rank", lambda: 0)
    monkeypatch.setattr(recorder, "INTERVAL", 0.05)
    monkeypatch.setattr(recorder, "_recorder", None)
    recorder.start(str(tmp_path), config)
    for layer in (0, 1):
        known = {"experts": (2, 3, 4, 5), "delta_bytes": 100, "used": {"gate_up": 0.5}, "masked": True}
        assert recorder.add_layer(config, layer, **known) == layer
    yield tmp_path
    recorder._recorder = None  # ends the thread


def record(layer: int, ids: Any, context: Any = REQUEST) -> None:
    with override_forward_context(context):
        recorder.record(layer, torch.tensor(ids, dtype=torch.int32), 0.25)


def published(folder: Path, name: str) -> dict[tuple[str, ...], float]:
    """Samples by label values, in the order of the labels' names, once something was written after now."""
    time.sleep(0.2)
    found = {}
    for family in files.collect(str(folder)):
        for sample in family.samples:
            if sample.name == name:
                found[tuple(value for _, value in sorted(sample.labels.items()))] = sample.value
    return found


@given(
    ids=st.lists(st.lists(st.integers(-3, 12), min_size=2, max_size=2), min_size=1, max_size=20),
    dtype=st.sampled_from([torch.int32, torch.int64]),
    seed=st.none() | st.integers(0, 99),
)
def test_tokens_are_counted_in_place_and_padding_is_not(ids: list, dtype: torch.dtype, seed: int | None) -> None:
    """Against Python's Counter; ids outside the 8 experts go to the bins at the ends, and stay as they were."""
    topk_ids = torch.tensor(ids, dtype=dtype)
    mask = None if seed is None else torch.rand(len(ids), generator=torch.Generator().manual_seed(seed)) < 0.5
    counts = torch.full((10,), 7)
    recorder.count_tokens(counts, topk_ids, mask, torch.ones(1, dtype=torch.int64))
    real = [row for i, row in enumerate(ids) if mask is None or not mask[i]]
    expected = Counter(expert for row in real for expert in row)
    assert (counts[1:9] - 7).tolist() == [expected[expert] for expert in range(8)]
    assert int(counts.sum()) == 70 + 2 * len(ids)
    assert topk_ids.tolist() == ids


def test_counting_needs_no_values() -> None:
    """Fake tensors have shapes only: a synchronisation, or a shape that depends on data, would raise."""
    with FakeTensorMode():
        mask = torch.empty(16, dtype=torch.bool)
        counts, one = torch.empty(10, dtype=torch.int64), torch.empty(1, dtype=torch.int64)
        recorder.count_tokens(counts, torch.empty(16, 2, dtype=torch.int32), mask, one)


@pytest.mark.parametrize("number", [1, 4, 8, 9, 27, 32, 58, 61])
def test_layers_are_grouped_in_order_and_evenly(config: CheckpointConfig, number: int) -> None:
    layers = dict.fromkeys(range(3, 3 + number), next(iter(config.layers.values())))
    groups = layer_groups(config.model_copy(update={"layers": layers}))
    labels = list(dict.fromkeys(groups.values()))
    assert list(groups) == list(layers)
    assert len(labels) <= MAX_GROUPS
    covered = []
    for label in labels:
        first, _, last = label.partition("-")
        covered += [(layer, label) for layer in range(int(first), int(last or first) + 1)]
    assert covered == list(groups.items())


def test_share_of_columns(config: CheckpointConfig) -> None:
    layer, (number, _) = next(iter(config.layers.values())), next(iter(config.layers.items()))
    kept, used = layer.gate.kept_columns / 128, layer.gate.used_columns / 128
    down_kept, down_used = layer.down.kept_columns / 256, layer.down.used_columns / 256
    assert used < kept
    assert columns_used_ratio(config, number, "off", prune_down=True) == {"gate_up": kept, "down": down_kept}
    assert columns_used_ratio(config, number, "token", prune_down=True) == {"gate_up": used, "down": down_used}
    assert columns_used_ratio(config, number, "batch", prune_down=False) == {"gate_up": used, "down": down_kept}


def test_calls_reach_the_files(recording: Path) -> None:
    """Local experts appear under their global numbers, other ranks' experts and padding not at all."""
    record(0, [[0, 3], [-1, 3]])
    record(1, [[1, 2], [0, 0]], SimpleNamespace(attn_metadata={}, is_padding=torch.tensor([False, True])))
    tokens = published(recording, "d2moe_expert_tokens_total")
    assert {labels: n for labels, n in tokens.items() if n} == {
        ("2", "0"): 1, ("5", "0"): 2, ("3", "1"): 1, ("4", "1"): 1,
    }  # fmt: skip
    assert len(tokens) == 8
    assert published(recording, "d2moe_experts_seconds_sum") == {("0", "0"): 0.25, ("1", "0"): 0.25}
    assert published(recording, "d2moe_experts_seconds_count") == {("0", "0"): 1, ("1", "0"): 1}
    assert published(recording, "d2moe_delta_bytes") == {("0", "0"): 100, ("1", "0"): 100}
    assert published(recording, "d2moe_base_columns_used_ratio") == {("gate_up", "0"): 0.5, ("gate_up", "1"): 0.5}


def test_profiling_is_not_counted(recording: Path) -> None:
    record(0, [[0, 1]], PROFILING)
    assert set(published(recording, "d2moe_expert_tokens_total").values()) == {0}
    assert published(recording, "d2moe_experts_seconds_count") == {}


def test_layers_that_nobody_added_are_ignored(recording: Path) -> None:
    record(2, [[0, 1]])
    assert set(published(recording, "d2moe_expert_tokens_total").values()) == {0}


def test_a_second_model_in_the_process_is_not_mixed_with_the_first(
    recording: Path, tmp_path: Path, config: CheckpointConfig
) -> None:
    """A compressed draft model, say; once the first is gone, the next one is recorded."""
    other = config.model_copy()
    recorder.start(str(tmp_path), other)
    place = recorder.add_layer(other, 0, experts=(0, 1), delta_bytes=7, used={}, masked=True)
    assert place == recorder.NOT_RECORDED
    record(place, [[0, 1]])
    assert set(published(recording, "d2moe_expert_tokens_total").values()) == {0}
    assert published(recording, "d2moe_delta_bytes") == {("0", "0"): 100, ("1", "0"): 100}


def test_a_file_has_its_blocks_and_room_for_all_series(tmp_path: Path) -> None:
    """Written through a mapping, a block that a full disk cannot give would end the worker by SIGBUS."""
    series = [
        files.Sample(EXPERT_TOKENS, "_total", (f"{1000 + group}-{1001 + group}", str(expert)), 1)
        for group in range(MAX_GROUPS)
        for expert in range(256)
    ]
    files.Writer(tmp_path).write(series)
    (path,) = tmp_path.glob("counter*.db")
    status = path.stat()
    assert status.st_size == files.SIZE
    assert status.st_blocks * 512 >= files.SIZE
    assert len(published(tmp_path, "d2moe_expert_tokens_total")) == 2048


def test_a_failure_warns_once_and_stops_counting(recording: Path) -> None:
    """A padding mask that does not fit is one; the caller sees none of it."""
    # vLLM's loggers may or may not pass on what they get: a handler of our own sees it once.
    lines = logging.handlers.BufferingHandler(capacity=100)
    recorder.logger.addHandler(lines)
    broken = SimpleNamespace(attn_metadata={}, is_padding=torch.tensor([True]))
    record(0, [[0, 1], [0, 1]], broken)
    record(0, [[0, 1], [0, 1]], broken)
    recorder.logger.removeHandler(lines)
    (warning,) = [r.getMessage() for r in lines.buffer if "metrics stand still" in r.getMessage()]
    assert "serving goes on" in warning
    assert recorder._recorder is None


def test_no_folder_no_recorder(config: CheckpointConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None where metrics could not be prepared; a folder that is not here where workers run on another host."""
    monkeypatch.setattr(recorder, "_recorder", None)
    for folder in (None, str(tmp_path / "elsewhere")):
        recorder.start(folder, config)
        assert recorder._recorder is None
    record(0, [[0, 1]])


def test_processes_add_up_and_dead_ones_leave(tmp_path: Path) -> None:
    sample = files.Sample(EXPERT_TOKENS, "_total", ("0", "3"), 5)
    files.Writer(tmp_path).write([sample])
    code = (
        "import sys; from pathlib import Path; from d2moe_vllm.observability import files, metrics\n"
        "files.Writer(Path(sys.argv[1])).write([files.Sample(metrics.EXPERT_TOKENS, '_total', ('0', '3'), 2)])"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert sorted(published(tmp_path, "d2moe_expert_tokens_total").items()) == [(("3", "0"), 7)]
    files.remove_dead(str(tmp_path))
    assert sorted(published(tmp_path, "d2moe_expert_tokens_total").items()) == [(("3", "0"), 5)]
    # The same process again, as with a second engine in it: it starts from nothing.
    files.Writer(tmp_path).write([sample._replace(value=1)])
    assert sorted(published(tmp_path, "d2moe_expert_tokens_total").items()) == [(("3", "0"), 1)]


PREPARE = """
import os, pathlib, sys
from d2moe_vllm.serving.quantization import D2MoEConfig
from d2moe_vllm.format.files import read_config

def folder():
    config = D2MoEConfig(read_config(pathlib.Path(sys.argv[1])))
    config.maybe_update_config(sys.argv[1])
    return config.metrics_folder

os.environ["PROMETHEUS_MULTIPROC_DIR"] = sys.argv[2]
print(folder())
del os.environ["PROMETHEUS_MULTIPROC_DIR"]
own = folder()
assert folder() == own
# Another server's start leaves a folder in use alone, and removes one whose owner was killed.
import d2moe_vllm.observability.collector as collector
abandoned = pathlib.Path(own).with_name("d2moe-metrics-abandoned")
abandoned.mkdir()
(abandoned / "lock").touch()
collector._remove_abandoned()
assert os.path.isdir(own) and not abandoned.exists()
if os.fork() == 0:
    sys.exit()  # runs the exit handlers it inherited
os.wait()
print(own, oct(os.stat(own).st_mode)[-3:])
"""


def test_the_folder_is_vllms_own_or_private_and_gone_at_the_end(checkpoint: Path, tmp_path: Path) -> None:
    """Of a front-end process; the end of a child that it forked changes nothing."""
    shared, temporary = tmp_path / "shared", tmp_path / "temporary"
    shared.mkdir()
    temporary.mkdir()
    (shared / "counter_1.db").touch()
    done = forks.python(PREPARE, checkpoint, shared, imports=forks.VLLM, env={"TMPDIR": str(temporary)})
    assert done.returncode == 0, done.stderr
    first, own, mode = done.stdout.split()
    assert first == str(shared)
    assert [path.name for path in shared.iterdir()] == ["counter_1.db"]
    assert Path(own).parent == temporary
    assert mode == "700"
    assert list(temporary.glob("d2moe*")) == []


def test_files_that_cannot_be_read_leave_the_other_metrics_alone(tmp_path: Path) -> None:
    (tmp_path / "counter_d2moe-1.db").write_bytes(b"no such format")
    assert list(collector._WorkersCollector(str(tmp_path)).collect()) == []


def test_a_server_without_an_engine_has_nothing_to_show() -> None:
    """vLLM's render server, which attaches the routes too."""
    app, endpoint = FastAPI(), Endpoint()
    endpoint.attach_router(app)
    asyncio.run(endpoint.init_state(None, app.state, Namespace()))
    for path in ("/v1/d2moe", "/v1/d2moe/info"):
        answer = TestClient(app).get(path)
        assert answer.status_code == 404
        assert "no d2moe checkpoint" in answer.text


def test_info_follows_the_scope_and_does_without_files(config: CheckpointConfig) -> None:
    """As with `--load-format dummy`, or a Hub id that has not been downloaded to this machine."""
    for model in ("nobody/nothing", "no/hub/id"):
        served = compat.Served("name", model, None, None, {}, 1, 1)
        assert endpoint_module._checkpoint_folder(served) is None
    info = describe(config, model="m", folder=None, scope="token", backend="cpu", tp_size=2, ep_size=2)
    assert (info.parameters, info.bytes, info.stored_ratio, info.recipe) == (None, None, None, None)
    for number, layer in config.layers.items():
        assert info.layers[number].gate.columns_in_use == layer.gate.used_columns < layer.gate.kept_columns
        assert info.layers[number].down.columns_in_use == layer.down.kept_columns  # expert parallelism
    assert info.counters.tokens == {}


def test_info_says_bits_and_channels_in_words(tmp_path: Path) -> None:
    folder = tmp_path / "few"
    write_few(folder, SETS[0])
    config = read_config(folder)
    info = describe(config, model="m", folder=folder, scope="off", backend="reference", tp_size=1, ep_size=1)
    based, plain = info.layers[0], info.layers[1]
    assert (based.stores, based.channels) == ("4-bit base, 2-bit deltas", "0 to 60 of 256")
    assert (plain.stores, plain.channels) == (
        "no base, 3-bit experts in gate and up, 4-bit experts in down",
        "0 to 256 of 256",
    )
    assert based.gate.base_storage is not None
    assert (based.gate.base_storage.type, based.gate.base_storage.group_size) == ("int4", 64)
    assert plain.down.delta_storage is not None
    assert (plain.down.delta_storage.type, plain.down.base_storage) == ("int4", None)
    assert based.stores in info.stores
    assert info.experts.bytes < info.experts.dense_bytes
