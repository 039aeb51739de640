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
from offline.io.shards import TORCH_DTYPES, Reader, natural_key, plan_shards, write_shards, write_tensors

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
    assert all(torch.equal(reader.tensor(n), made[n]) and reader.tensor(n).dtype == made[n].dtype for n in made)


def test_a_reader_reads_what_the_library_reads(tmp_path: Path) -> None:
    """Every dtype, wherever it lies: the library aligns a header to eight bytes, other writers need not."""
    bits = torch.arange(1, 97, dtype=torch.uint8)
    made = {name: bits.clone().view(dtype).view(2, -1) for name, dtype in TORCH_DTYPES.items() if name != "BOOL"}
    made |= {"BOOL": bits.bool(), "scalar": torch.tensor(1.5), "empty": torch.empty(3, 0, 2)}
    save_file(made, tmp_path / "model.safetensors", metadata={"format": "pt"})
    data = (tmp_path / "model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    for spaces in range(9):
        odd = (size + spaces).to_bytes(8, "little") + data[8 : 8 + size] + b" " * spaces + data[8 + size :]
        (tmp_path / "model.safetensors").write_bytes(odd)
        reader, expected = Reader(tmp_path), load_file(tmp_path / "model.safetensors")
        for name, tensor in expected.items():
            found = reader.tensor(name)
            assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
            assert found.flatten().view(torch.uint8).tolist() == tensor.flatten().view(torch.uint8).tolist()


def test_a_file_that_changes_under_a_reader_is_read_as_it_is_now(tmp_path: Path) -> None:
    save_file({"a": torch.ones(8), "b": torch.zeros(8)}, tmp_path / "model.safetensors")
    reader = Reader(tmp_path)
    assert reader.tensor("a").sum() == 8
    save_file({"b": torch.zeros(8), "a": torch.full((9,), 2.0)}, tmp_path / "new")
    (tmp_path / "new").replace(tmp_path / "model.safetensors")
    assert torch.equal(reader.tensor("a"), torch.full((9,), 2.0))
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[:-8])
    with pytest.raises(CheckpointError, match="truncated"):
        reader.tensor("a")
    save_file({"b": torch.zeros(8)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="a cannot be read"):
        reader.tensor("a")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="missing"):
        reader.tensor("a")


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


def test_a_single_number_is_written_whatever_its_stride(tmp_path: Path) -> None:
    """A group's scale of an expert with one channel: contiguous to torch, and two numbers from its neighbour."""
    one = torch.arange(8, dtype=torch.bfloat16).view(4, 2).T[1:, :1]
    assert one.is_contiguous()
    assert one.stride(-1) == 2
    write_tensors(tmp_path / "one.safetensors", {"one": one})
    assert load_file(tmp_path / "one.safetensors")["one"].tolist() == [[1.0]]
