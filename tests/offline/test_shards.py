"""The streaming writer, held against the safetensors library, and readers of damaged files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from d2moe_vllm.format.config import CheckpointError
from d2moe_vllm.format.kinds import TensorSpec
from offline.io.shards import TORCH_DTYPES, Reader, natural_key, plan_shards, write_shards

NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def specs_of(tensors: dict[str, torch.Tensor]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(NAMES[t.dtype], tuple(t.shape)) for name, t in tensors.items()}


tensors = st.dictionaries(
    st.from_regex(r"[a-z]{1,4}\.[0-9]{1,2}\.[a-z]{1,3}", fullmatch=True),
    st.tuples(
        st.sampled_from([torch.float32, torch.bfloat16, torch.int32, torch.uint8]),
        st.lists(st.integers(0, 5), min_size=0, max_size=3),
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=tensors, limit=st.integers(1, 400))
def test_what_is_written_is_what_is_read(tmp_path_factory: pytest.TempPathFactory, content: dict, limit: int) -> None:
    folder = tmp_path_factory.mktemp("shards")
    made = {n: torch.randint(0, 100, shape).to(dtype) for n, (dtype, shape) in content.items()}
    plan = plan_shards(specs_of(made), limit)
    files = write_shards(folder, plan, made.__getitem__)
    assert {f.name for f in folder.glob("*.safetensors")} == set(files) == {shard.file for shard in plan}
    for shard in plan:
        size = (folder / shard.file).stat().st_size
        assert size == shard.nbytes == files[shard.file].bytes
        assert len(shard.tensors) == 1 or sum(s.nbytes for s in shard.tensors.values()) <= limit
    read = {n: t for shard in plan for n, t in load_file(folder / shard.file).items()}
    assert read.keys() == made.keys()
    assert all(torch.equal(read[n], made[n]) and read[n].dtype == made[n].dtype for n in made)
    reader = Reader(folder)
    assert reader.nbytes == sum(shard.nbytes for shard in plan)
    assert reader.specs == specs_of(made)


def test_bytes_are_the_librarys_own(tmp_path: Path) -> None:
    made = {"a": torch.arange(6).float().view(2, 3), "b": torch.arange(4).to(torch.bfloat16)}
    save_file(made, tmp_path / "library.safetensors", metadata={"format": "pt"})
    (shard,) = plan_shards(specs_of(made))
    write_shards(tmp_path, [shard], made.__getitem__)
    assert (tmp_path / shard.file).read_bytes() == (tmp_path / "library.safetensors").read_bytes()


def test_every_tensor_is_aligned_to_its_element_size() -> None:
    shard = plan_shards({"a": TensorSpec("BF16", (3,)), "b": TensorSpec("F32", (1,)), "c": TensorSpec("U8", (5,))})[0]
    header = json.loads(shard.header[8:])
    for name, spec in shard.tensors.items():
        assert header[name]["data_offsets"][0] % (spec.nbytes // spec.numel) == 0
    assert len(shard.header) % 8 == 0


def test_layer_10_comes_after_layer_2() -> None:
    assert sorted(["l.10.a", "l.2.b", "l.2.a"], key=natural_key) == ["l.2.a", "l.2.b", "l.10.a"]


def test_a_tensor_that_breaks_its_plan_is_refused(tmp_path: Path) -> None:
    plan = plan_shards({"a": TensorSpec("F32", (2,))})
    with pytest.raises(ValueError, match="planned F32"):
        write_shards(tmp_path, plan, lambda name: torch.zeros(3))


def write(folder: Path, **made: torch.Tensor) -> None:
    write_shards(folder, plan_shards(specs_of(made)), made.__getitem__)


def test_index_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    write(tmp_path, a=torch.zeros(2))
    index = tmp_path / "model.safetensors.index.json"
    for evil in ("../model.safetensors", "/etc/passwd", "sub/x.safetensors", "x.bin", 7):
        index.write_text(json.dumps({"weight_map": {"a": evil}}))
        with pytest.raises(CheckpointError, match="not a file name"):
            Reader(tmp_path)


def test_index_that_lies_and_files_that_are_cut_are_refused(tmp_path: Path) -> None:
    write(tmp_path, a=torch.zeros(100), b=torch.zeros(4))
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    file = content["weight_map"]["a"]
    index.write_text(json.dumps({"weight_map": {"a": file, "b": file, "ghost": file}}))
    with pytest.raises(CheckpointError, match="ghost"):
        Reader(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(CheckpointError, match="tensor b"):
        Reader(tmp_path)
    index.write_text(json.dumps(content))
    data = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(data[:-8])
    with pytest.raises(CheckpointError, match="truncated"):
        Reader(tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(CheckpointError, match="missing"):
        Reader(tmp_path)
