"""Compressed checkpoints in plain transformers: by the modeling file that travels with them, and by the quantizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import forks
import pytest
import torch
from safetensors.torch import load_file, save_file
from synthetic import NAMES, Synthetic, every_variant, write_checkpoint, write_dense
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralForCausalLM

from d2moe_vllm.families import MODELING_FILE, auto_map, checkpoint_modeling_source
from d2moe_vllm.format.config import CheckpointError
from d2moe_vllm.format.files import check_checkpoint
from d2moe_vllm.hf import modeling_d2moe
from d2moe_vllm.hf.experts import D2Experts
from d2moe_vllm.hf.modeling_d2moe import D2MixtralForCausalLM

TEXT = "The assignment statement evaluates the expression list and"


@pytest.fixture(scope="module")
def tokens(checkpoint: Path) -> torch.Tensor:
    return AutoTokenizer.from_pretrained(checkpoint)(TEXT, return_tensors="pt").input_ids


NO_BASE = {"gate": 0, "up": 0}
VARIANTS = {
    "all": Synthetic(dtype=torch.float32),
    "no base in gate and up, a dense layer": Synthetic(
        dtype=torch.float32, dense=(1,), kept=NO_BASE | {"down": 192}, used=NO_BASE | {"down": 64}
    ),
    "every variant": every_variant(dtype=torch.float32),
    "no deltas in gate and down": Synthetic(dtype=torch.float32, rank={"gate": 0, "up": 8, "down": 0}),
}


@pytest.mark.parametrize("what", VARIANTS.values(), ids=VARIANTS)
@torch.no_grad()
def test_equals_the_dense_reconstruction(what: Synthetic, tokens: torch.Tensor, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "d2", what)
    check_checkpoint(tmp_path / "d2")
    write_dense(tmp_path / "d2", tmp_path / "dense", torch.float32)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "d2", trust_remote_code=True)
    registered = AutoModelForCausalLM.from_pretrained(tmp_path / "d2")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    # Its own class must not stick to MixtralConfig for the models that are loaded after it.
    assert type(dense) is MixtralForCausalLM
    torch.testing.assert_close(ours(tokens).logits, dense(tokens).logits, rtol=0, atol=1e-4)
    settings = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(ours.generate(tokens, **settings), dense.generate(tokens, **settings))
    # transformers computes a layer that stays dense in one of several ways, by the module a class comes from.
    torch.testing.assert_close(registered(tokens).logits, ours(tokens).logits, rtol=0, atol=1e-4)
    for model in (ours, registered):
        assert model.config.quantization_config.quant_method == "d2moe"


def test_the_modeling_file_stands_alone(checkpoint: Path) -> None:
    """With d2moe_vllm hidden, and without a word of warning."""
    assert (checkpoint / MODELING_FILE).read_text() == checkpoint_modeling_source()
    assert "from d2moe_vllm" not in checkpoint_modeling_source()
    code = (
        "import sys; sys.modules['d2moe_vllm'] = None\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(checkpoint)!r}, trust_remote_code=True)\n"
        f"tokens = AutoTokenizer.from_pretrained({str(checkpoint)!r})({TEXT!r}, return_tensors='pt')\n"
        "print(model.generate(**tokens, max_new_tokens=4, do_sample=False).shape[1])\n"
    )
    result = forks.python(code, imports=forks.TRANSFORMERS)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 4
    warnings = [line for line in result.stderr.splitlines() if "Loading weights" not in line and line.strip()]
    assert warnings == []


@pytest.mark.parametrize("trust_remote_code", [True, False], ids=["modeling file", "quantizer"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_and_columns_keep_their_types(checkpoint: Path, dtype: torch.dtype, trust_remote_code: bool) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype, trust_remote_code=trust_remote_code)
    stored = load_file(checkpoint / "model-00002-of-00002.safetensors")
    for _ in range(2):
        gate = model.model.layers[0].mlp.experts.projection(0, "gate")
        assert (gate.base.dtype, gate.delta_u.dtype) == (dtype, dtype)
        name = "model.layers.0.block_sparse_moe.experts.0.w1"
        assert torch.equal(gate.base_norms, stored[f"{name}.base_norms"])
        assert torch.equal(gate.base_columns, stored[f"{name}.base_columns"])
        model = model.to(torch.float32).to(dtype)


@torch.no_grad()
def test_scope(checkpoint: Path, tokens: torch.Tensor) -> None:
    model = D2MixtralForCausalLM.from_pretrained(checkpoint, d2moe_scope="token")
    token = model(tokens).logits
    assert model.d2moe_scope == "token"
    model.d2moe_scope = "off"
    assert not torch.allclose(model(tokens).logits, token)
    with pytest.raises(ValueError, match="d2moe_scope is 'tokens'"):
        model.d2moe_scope = "tokens"


@torch.no_grad()
@pytest.mark.parametrize("trust_remote_code", [True, False], ids=["modeling file", "quantizer"])
def test_padding_has_no_say_in_a_batch(checkpoint: Path, tokens: torch.Tensor, trust_remote_code: bool) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=trust_remote_code)
    model.d2moe_scope = "batch"
    alone = model(tokens).logits
    padded = torch.cat([torch.full((1, 7), 300), tokens], dim=1)
    mask = (torch.arange(padded.shape[1]) >= 7).long().unsqueeze(0)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    together = model(padded, attention_mask=mask, position_ids=positions).logits[:, 7:]
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)


def drop(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.pop("model.layers.2.block_sparse_moe.experts.3.w3.delta_u"))


def shrink(folder: Path) -> None:
    name = "model.layers.2.block_sparse_moe.experts.3.w3.delta_u"
    edit(folder, lambda tensors: tensors.update({name: tensors[name][:, 1:].contiguous()}))


def add(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.update({"model.layers.9.surprise": torch.zeros(1)}))


def drop_norm(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.pop("model.norm.weight"), "model-00001-of-00002.safetensors")


def truncate(folder: Path) -> None:
    shard = folder / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])


def new_version(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["format_version"] = 9
    (folder / "config.json").write_text(json.dumps(config))


def no_shard(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").unlink()


def no_manifest(folder: Path) -> None:
    (folder / "d2moe_manifest.json").unlink()


def edit_manifest(folder: Path, change: Callable[[dict], object]) -> None:
    path = folder / "d2moe_manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def no_other_tensors(folder: Path) -> None:
    edit_manifest(folder, lambda manifest: manifest.pop("other_tensors"))


def no_files(folder: Path) -> None:
    edit_manifest(folder, lambda manifest: manifest.pop("files"))


def no_sizes(folder: Path) -> None:
    edit_manifest(folder, lambda manifest: [entry.pop("bytes") for entry in manifest["files"].values()])


COLUMNS = "model.layers.2.block_sparse_moe.experts.0.{}.base_columns"


def edit_columns(folder: Path, change: Callable[[torch.Tensor], torch.Tensor], *names: str) -> None:
    names = tuple(COLUMNS.format(name) for name in names)
    edit(folder, lambda tensors: tensors.update({name: change(tensors[name]).contiguous() for name in names}))


def swap(columns: torch.Tensor) -> torch.Tensor:
    """Within one group, so that only the order is wrong."""
    return torch.cat([columns[:2].flip(0), columns[2:]])


def unsorted(folder: Path) -> None:
    edit_columns(folder, swap, "w2")


def too_high(folder: Path) -> None:
    edit_columns(folder, lambda columns: torch.cat([columns[:-1], torch.tensor([256], dtype=torch.int32)]), "w2")


def negative(folder: Path) -> None:
    edit_columns(folder, lambda columns: torch.cat([torch.tensor([-1], dtype=torch.int32), columns[1:]]), "w2")


def uneven(folder: Path) -> None:
    edit_columns(folder, lambda columns: torch.arange(len(columns), dtype=torch.int32), "w1", "w3")


def move_one(columns: torch.Tensor) -> torch.Tensor:
    """Another choice of 12 of the first group's 16 columns."""
    first = columns[:12].tolist()
    free = next(column for column in range(16) if column not in first)
    return torch.cat([torch.tensor(sorted([*first[1:], free]), dtype=torch.int32), columns[12:]])


def gate_is_not_up(folder: Path) -> None:
    edit_columns(folder, move_one, "w3")


def edit(folder: Path, change: Callable[[dict], object], shard: str = "model-00002-of-00002.safetensors") -> None:
    tensors = load_file(folder / shard)
    change(tensors)
    save_file(tensors, folder / shard, {"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (drop, "1 tensors missing: model.layers.2.block_sparse_moe.experts.3.w3.delta_u"),
        (drop_norm, "1 tensors missing: model.norm.weight"),
        (shrink, r"model.layers.2.block_sparse_moe.experts.3.w3.delta_u is \('F32', \(256, 15\)\)"),
        (add, "1 tensors do not belong here: model.layers.9.surprise"),
        (no_shard, "weight file model-00002-of-00002.safetensors is missing"),
        (truncate, "model-00002-of-00002.safetensors: damaged or truncated"),
        (new_version, "format version 9 is not supported"),
        (no_manifest, "d2moe_manifest.json is missing"),
        (no_other_tensors, "d2moe_manifest.json lacks other_tensors or files"),
        (no_files, "d2moe_manifest.json lacks other_tensors or files"),
        (no_sizes, "d2moe_manifest.json lacks other_tensors or files"),
        (unsorted, COLUMNS.format("w2") + ": columns must ascend"),
        (too_high, COLUMNS.format("w2") + r": columns must ascend, lie in 0\.\.255"),
        (negative, COLUMNS.format("w2") + ": columns must ascend"),
        (uneven, COLUMNS.format("w1") + ": columns must .* evenly over 8 groups"),
        (gate_is_not_up, COLUMNS.format("w3") + " differ, gate and up share one"),
    ],
)
@pytest.mark.parametrize("trust_remote_code", [True, False], ids=["modeling file", "quantizer"])
def test_damage_is_refused_by_name(
    checkpoint: Path, tmp_path: Path, damage: Callable, words: str, trust_remote_code: bool
) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "damaged")
    damage(folder)
    with pytest.raises(ValueError, match=words) as error:
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust_remote_code)
    assert "\n" not in str(error.value)


def test_columns_that_differ_between_gate_and_up_are_refused_everywhere(checkpoint: Path, tmp_path: Path) -> None:
    """By inspect, eval and the vLLM plugin too, which share this check."""
    folder = shutil.copytree(checkpoint, tmp_path / "damaged")
    gate_is_not_up(folder)
    with pytest.raises(CheckpointError, match=f"{COLUMNS.format('w1')} and {COLUMNS.format('w3')} differ"):
        check_checkpoint(folder)


def test_saving_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    model = D2MixtralForCausalLM.from_pretrained(checkpoint)
    with pytest.raises(NotImplementedError, match="copy the checkpoint's folder"):
        model.save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_dense_model_is_left_alone(checkpoint: Path, tmp_path: Path) -> None:
    write_dense(checkpoint, tmp_path / "dense", torch.float32)
    model = D2MixtralForCausalLM.from_pretrained(tmp_path / "dense")
    assert not any(isinstance(module, D2Experts) for module in model.modules())
    model.save_pretrained(tmp_path / "saved")


def test_experts_load_from_checkpoint_names(checkpoint: Path) -> None:
    """The way offline/ evaluates: one layer at a time, no transformers config."""
    settings = json.loads((checkpoint / "config.json").read_text())["quantization_config"]
    experts = D2Experts(
        8, 128, 256, settings["layers"]["0"], groups=8, projections=NAMES, dtype="float32", scope="token"
    )
    prefix = "model.layers.0.block_sparse_moe.experts."
    stored = load_file(checkpoint / "model-00002-of-00002.safetensors")
    experts.load_state_dict({n.removeprefix(prefix): t for n, t in stored.items() if n.startswith(prefix)})
    x = torch.randn(3, 128)
    assert experts(x, torch.tensor([[0, 1], [2, 3], [4, 8]]), torch.rand(3, 2)).shape == x.shape


def test_families() -> None:
    assert auto_map("mixtral") == {"AutoModelForCausalLM": "modeling_d2moe.D2MixtralForCausalLM"}
    assert auto_map("kimi_k2")["AutoConfig"] == "modeling_d2moe.KimiK2Config"
    assert not hasattr(modeling_d2moe, "D2NoSuchForCausalLM")
    with pytest.raises(KeyError):
        auto_map("no_such_model")
