"""A family without a row: what tells of it, the row that is proposed, what is refused, and what a given row is for."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
import yaml
from compression import ROOT, d2moe_here
from families import CONFIGS, change_config, load_stock, write_exact, write_family
from hostile import refused
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralExperts
from unlisted import write_unlisted

from d2moe_vllm.format.config import CheckpointError, parse_config
from d2moe_vllm.format.familyrow import FamilyRow
from offline.errors import InputError
from offline.source import families, served
from offline.source.dense import open_dense
from offline.source.families import FAMILIES, from_row, known
from offline.source.familyfile import read_family_file, written
from offline.source.served import served_by
from offline.source.structure import ProposalError, _computes, _difference, _returns_more

NOT_PROPOSED = {
    "deepseek": "DeepseekExperts holds 0.gate_proj.weight",  # one module for each expert
    "gemma4": "its experts' activation is 'gelu_pytorch_tanh' (hidden_activation), not silu",
    "glm_moe_dsa": "layers of transformers' GlmMoeDsaDecoderLayer give more than hidden states",
    "gpt_oss": "its experts have biases (model.layers.0.mlp.experts.down_proj_bias)",
    "laguna": "model.layers.1.mlp.experts.e_score_correction_bias lies among its experts",
    "llama4": "Llama4ForConditionalGeneration has its decoder in language_model.model, not in model.layers",
    "llama4_text": "Llama4TextExperts takes (hidden_states), not (hidden_states, top_k_index, top_k_weights)",
    "mimo_v2_flash": "does not attend by scaled_dot_product_attention",
    "nemotron_h": "config.json: num_hidden_layers is None",  # layers' kinds say how many there are
}
AXK1: dict[str, Any] = {
    "model_type": "axk1",
    "experts": "model.layers.{layer}.mlp.experts",
    "projections": {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"},
    "num_experts_key": "n_routed_experts",
    "dense_keys": ["first_k_dense_replace"],
    "renames": {f".{n}.post_mlp_layernorm.": f".{n}.mlp.post_mlp_layernorm." for n in (1, 2)},
}
OTHER = {"renames": {**AXK1["renames"], ".nothing.": ".else."}}
"""Another row that fits."""
FEW = ("--windows", "4", "--seq-len", "32")


def forget(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(families, "FAMILIES", MappingProxyType({k: v for k, v in FAMILIES.items() if k != name}))
    monkeypatch.setattr("offline.source.familyfile.FAMILIES", families.FAMILIES)


def proposal(folder: Path) -> ProposalError:
    with pytest.raises(ProposalError) as found:
        open_dense(str(folder))
    return found.value


def refusal(folder: Path) -> str:
    with pytest.raises(InputError) as found:
        open_dense(str(folder))
    assert not isinstance(found.value, ProposalError), found.value.row
    assert "\n" not in str(found.value)
    return str(found.value)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in NOT_PROPOSED])
def test_of_every_family_of_ours_the_row_would_be_proposed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In what matters: where experts lie and are called, which module they are, and what config.json says of them."""
    folder = write_family(tmp_path / name, name)
    ours = open_dense(str(folder))
    forget(monkeypatch, name)
    found = proposal(folder)
    (tmp_path / "row.yaml").write_text(written(found.row, found.notes))
    family = read_family_file(tmp_path / "row.yaml")
    assert family.row == found.row
    for field in ("experts", "projections", "decoder", "experts_module", "experts_per_token_key", "layouts"):
        assert getattr(family, field) == getattr(ours.family, field), field
    assert family.intermediate_size_key == ours.family.intermediate_size_key
    assert set(family.num_experts_keys) <= set(ours.family.num_experts_keys)
    assert set(family.dense_keys) >= {key for key in ours.family.dense_keys if ours.settings.get(key) is not None}
    for tensor in ours.reader.specs:
        if tensor not in ours.experts.names:
            assert family.module_name(tensor) == ours.family.module_name(tensor)
            assert family.disk_name(family.module_name(tensor)) == tensor
    with known(family):
        theirs = open_dense(str(folder))
    assert (theirs.shape, theirs.dtype, theirs.other_tensors) == (ours.shape, ours.dtype, ours.other_tensors)
    assert dataclasses.replace(theirs.experts, reader=ours.experts.reader) == ours.experts
    assert any("nobody has checked" in remark for remark in theirs.remarks)


@pytest.mark.parametrize("name", NOT_PROPOSED)
def test_what_of_ours_would_not_be(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_family(tmp_path / name, name)
    forget(monkeypatch, name)
    assert NOT_PROPOSED[name] in refusal(folder)


def without_a_gate(folder: Path, stacked: bool) -> Path:
    """Nemotron-H with experts in every layer and the names of its modules on disk."""
    kinds = {"layers_block_type": ["moe", "moe"], "mlp_hidden_act": "relu2"}
    write_family(folder, "nemotron_h", stacked=stacked, dtype=torch.float32, **kinds)
    spoil(folder, renamed("backbone.", "model."))
    change_config(folder, num_hidden_layers=2)
    return folder


@pytest.mark.parametrize("stacked", [False, True])
def test_a_row_of_experts_without_a_gate(stacked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read with it, the model is the one that our own row gives; the compressed one carries it into transformers."""
    folder = without_a_gate(tmp_path / "nemotron", stacked)
    tokens = torch.arange(24)[None]
    expected = load_stock(folder, dtype=torch.float32)(tokens, use_cache=False).logits
    forget(monkeypatch, "nemotron_h")
    found = proposal(folder)
    assert (found.row.projections, found.row.activation) == ({"up": "up_proj", "down": "down_proj"}, "relu2")
    assert found.row.released is None or (stacked and found.row.released.gate is None)
    assert any("computes down(relu2(up))" in note for note in found.notes)
    (tmp_path / "row.yaml").write_text(written(found.row, found.notes))
    family = read_family_file(tmp_path / "row.yaml")
    assert family.row == found.row
    with known(family):
        model = open_dense(str(folder))
        assert (model.shape.roles, model.shape.layers) == (("up", "down"), (0, 1))
        ours = write_exact(tmp_path / "ours", folder)
        change_config(folder, mlp_hidden_act="silu")
        with pytest.raises(InputError, match="mlp_hidden_act 'silu'; vLLM serves nemotron_h with relu2 only"):
            open_dense(str(folder))
    carried = json.loads((ours / "config.json").read_text())["quantization_config"]["family_row"]
    assert carried["activation"] == "relu2"
    loaded = AutoModelForCausalLM.from_pretrained(ours, trust_remote_code=True, dtype=torch.float32)
    assert float((loaded(tokens, use_cache=False).logits - expected).norm() / expected.norm()) < 1e-4


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("renamed", "which of down_proj, other is an expert's gate, and which its up, is not known by these names"),
        ("gated", "its experts have down_proj and gate_proj and up_proj on disk, and no gate in transformers"),
    ],
)
def test_experts_without_a_gate_that_do_not_fit(
    change: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = without_a_gate(tmp_path / "nemotron", stacked=False)

    def more(tensors: Tensors) -> Tensors:
        ups = {name: tensor for name, tensor in tensors.items() if ".experts." in name and ".up_proj." in name}
        return {**tensors, **{name.replace("up_proj", "gate_proj"): one.clone() for name, one in ups.items()}}

    def other(tensors: Tensors) -> Tensors:
        return {n.replace("up_proj", "other") if ".experts." in n else n: one for n, one in tensors.items()}

    spoil(folder, more if change == "gated" else other)
    forget(monkeypatch, "nemotron_h")
    assert reason in refusal(folder)


@pytest.mark.parametrize("name", ["hunyuan_v1_moe", "granitemoeshared"])
def test_families_that_nobody_described(name: str, tmp_path: Path) -> None:
    row = proposal(write_unlisted(tmp_path / name, name)).row
    if name == "hunyuan_v1_moe":
        assert (row.experts_per_token_key, row.intermediate_size_key) == ("moe_topk", "intermediate_size")
    else:
        assert row.released is not None
        assert row.released.gate == row.released.up == "model.layers.{layer}.block_sparse_moe.input_linear.weight"
        assert row.renames == {".router.layer.weight": ".router.weight"}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("llama", "it has no routed experts: no layer of transformers' LlamaForCausalLM has a module called experts"),
        ("jamba", "layers 1, 3 of 4 have experts, which no key says that is known here"),
        ("jamba", "but perhaps expert_layer_offset and expert_layer_period"),
    ],
)
def test_what_a_model_has_that_is_lacking_here(
    name: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offline.source.dense.UNSUPPORTED", {})
    said = refusal(write_unlisted(tmp_path / name, name))
    assert f"model_type {name!r} is not supported: " in said
    assert reason in said


@pytest.fixture(scope="session")
def axk1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed."""
    return write_unlisted(tmp_path_factory.mktemp("axk1") / "axk1", "axk1")


@pytest.fixture
def copy(axk1: Path, tmp_path: Path) -> Path:
    """To be spoilt."""
    return shutil.copytree(axk1, tmp_path / "copy")


Tensors = dict[str, Tensor]


def spoil(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    path = folder / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in change(load_file(path)).items()}, path, {"format": "pt"})


def renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()}


def without(part: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name}


def beside(name: str, *shape: int) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, name: torch.ones(shape, dtype=torch.bfloat16)}


EXPERTS = "model.layers.2.mlp.experts."


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (beside(f"{EXPERTS}3.down_proj.bias", 64), f"its experts have biases ({EXPERTS}3.down_proj.bias)"),
        (beside(f"{EXPERTS}down_proj_bias", 8, 64), f"its experts have biases ({EXPERTS}down_proj_bias)"),
        (without(".gate_proj.weight"), "its experts have no gate, only down_proj and up_proj"),
        (without(f"{EXPERTS}7."), "layer 1 has 8 experts, layer 2 has 7"),
        (without(f"{EXPERTS}3."), "layer 2 has no expert 3, but an expert 7"),
        (without(f"{EXPERTS}3.up_proj"), "expert 3 of layer 2 and the first one do not both have up_proj.weight"),
        (beside(f"{EXPERTS}3.up_proj.weight", 40, 64), f"[48, 64], {EXPERTS}3.up_proj.weight is [40, 64]"),
        (renamed(".gate_proj.", ".alpha."), "which of alpha, down_proj, up_proj is an expert's gate"),
        (renamed("model.layers.", "model.blocks."), "its tensors are not named model.layers.<number>..."),
        (without(".experts."), "no tensor of it is called after an expert's number"),
        (without(EXPERTS), "layers 1 have experts on disk, 1, 2 in transformers"),
        (without("model.norm."), "the source has no tensor for model.norm.weight"),
        (renamed(".up_proj.", ".more.up_proj."), "which is no weight of a projection"),
    ],
)
def test_tensors_that_do_not_fit(change: Callable[[Tensors], Tensors], reason: str, copy: Path) -> None:
    spoil(copy, change)
    assert reason in refusal(copy)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "nonesuch"}, "has no class of it, and code that comes with a model is not run"),
        ({"model_type": 7}, "config.json says no model_type"),
        ({"swiglu_limit": 7.0}, "its experts' values are clamped (swiglu_limit 7.0)"),
        ({"zero_expert_num": 4}, "tokens may go to experts that are none (zero_expert_num 4)"),
        ({"hidden_act": "gelu"}, "its experts' activation is 'gelu' (hidden_act), not silu"),
        (
            {"n_routed_experts": 16},
            "config.json says the number of experts, 8 by its tensors, under none of num_experts",
        ),
        ({"moe_intermediate_size": 40}, "config.json says the experts' intermediate size, 48 by its tensors"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok is 9, where a number of experts is expected"),
        ({"num_experts_per_tok": ...}, "how many experts a token goes to"),
        ({"moe_topk": 3}, "config.json says num_experts_per_tok 2 and moe_topk 3"),
        ({"hidden_size": "64"}, "transformers refuses it"),
        ({"first_k_dense_replace": 0}, "layers 1, 2 have experts on disk, 0, 1, 2 in transformers"),
    ],
)
def test_settings_that_do_not_fit(changes: dict[str, Any], reason: str, copy: Path) -> None:
    """`...` is for a setting that is left out."""
    path = copy / "config.json"
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))
    assert reason in refusal(copy)


def test_a_key_that_contradicts_the_tensors_is_left_out_and_said(copy: Path) -> None:
    change_config(copy, moe_layer_freq=2)
    found = proposal(copy)
    assert found.row.dense_keys == ("first_k_dense_replace",)
    assert "left out, as it does not say which layers have experts: moe_layer_freq" in found.notes


class Experts(nn.Module):
    """As transformers' are, but for what `inner` does."""

    def __init__(self, inner: Callable[[Tensor, Tensor], Tensor], transposed: bool = False) -> None:
        super().__init__()
        sizes = ((4, 64, 96), (4, 48, 64)) if transposed else ((4, 96, 64), (4, 64, 48))
        self.gate_up_proj, self.down_proj = (nn.Parameter(torch.empty(size, device="meta")) for size in sizes)
        self.inner, self.transposed = inner, transposed

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        result = torch.zeros_like(hidden_states)
        for row, (chosen, weights) in enumerate(zip(top_k_index, top_k_weights, strict=True)):
            for e, weight in zip(chosen, weights, strict=True):
                both, down = self.gate_up_proj[e], self.down_proj[e]
                both, down = (both.T, down.T) if self.transposed else (both, down)
                gate, up = (both @ hidden_states[row]).chunk(2)
                result[row] += weight * (down @ self.inner(gate, up))
        return result


@pytest.mark.parametrize(
    ("inner", "same"),
    [
        (lambda gate, up: nn.functional.silu(gate) * up, True),
        (lambda gate, up: nn.functional.silu(up) * gate, False),
        (lambda gate, up: nn.functional.gelu(gate) * up, False),
        (lambda gate, up: nn.functional.silu(gate.clamp(max=7)) * up.clamp(-7, 7), False),
        (lambda gate, up: nn.functional.silu(gate.clamp(max=1000)) * up, False),
        (lambda gate, up: nn.functional.silu(gate) * (up + 1), False),
    ],
)
def test_what_experts_compute_is_tried(inner: Callable[[Tensor, Tensor], Tensor], same: bool) -> None:
    assert _computes(Experts(inner), "silu") is same
    assert _computes(Experts(inner, transposed=True), "silu") is same


class _Layer(nn.Module):
    def forward(self, hidden_states: Tensor) -> Tensor:
        if hidden_states.dim() < 3:
            return hidden_states
        return hidden_states + 1


class _Tuple(_Layer):
    def forward(self, hidden_states: Tensor) -> Any:
        return (hidden_states,)


class _Outputs(_Layer):
    def forward(self, hidden_states: Tensor) -> Any:
        outputs = [hidden_states]
        outputs += [None]
        return outputs


class _Sometimes(_Layer):
    def forward(self, hidden_states: Tensor, cached: bool = False) -> Any:
        if cached:
            return hidden_states, None
        return hidden_states


class _States(_Layer):
    def forward(self, hidden_states: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override] # as Granite 4's is written
        return hidden_states


@pytest.mark.parametrize(
    ("kind", "more"), [(_Layer, False), (_States, False), (_Tuple, True), (_Outputs, True), (_Sometimes, True)]
)
def test_what_layers_give_is_read_in_their_code(kind: type[nn.Module], more: bool) -> None:
    assert _returns_more(kind) is more


def test_a_real_class_is_tried_whatever_its_size() -> None:
    with torch.device("meta"):
        experts = MixtralExperts(MixtralConfig())
    assert _computes(experts, "silu")
    assert not _computes(experts, "relu2")


@pytest.mark.parametrize(
    ("name", "target", "parts"),
    [
        ("a.0.moe.gate.w", "a.0.mlp.gate.w", (".moe.", ".mlp.")),
        ("a.0.mlp.bias", "a.0.mlp.gate.bias", (".mlp.bias", ".mlp.gate.bias")),
        ("a.0.router.gate.w", "a.0.gate.w", (".0.router.gate.", ".0.gate.")),
        ("a.b.w", "c.b.w", ("a.", "c.")),
        ("a.b.x", "a.b.y", (".x", ".y")),
    ],
)
def test_names_are_told_apart_by_as_little_as_leads_back(name: str, target: str, parts: tuple[str, str]) -> None:
    assert _difference(name, target) == parts
    assert name.replace(*parts) == target
    assert target.replace(*parts[::-1]) == name


def test_what_vllm_has_is_read_from_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = tmp_path / "vllm" / "model_executor" / "models" / "registry.py"
    registry.parent.mkdir(parents=True)
    registry.write_text(
        '_TEXT_GENERATION_MODELS = {"A": ("a", "A")}\n_MULTIMODAL_MODELS = {}\n'
        '_TRANSFORMERS_SUPPORTED_MODELS = {"B": ("b", "B")}\n'
    )
    places = MappingProxyType({"submodule_search_locations": [str(tmp_path / "vllm")]})
    monkeypatch.setattr(served.importlib.util, "find_spec", lambda name: type("Spec", (), dict(places)))
    monkeypatch.setattr(served.importlib.metadata, "version", lambda name: "9.9")
    assert served_by({"architectures": ["A"]}).startswith("vLLM 9.9 has a class A;")
    assert "only transformers'" in served_by({"architectures": ["B"]})
    assert "has no class C and will not serve" in served_by({"architectures": ["C"]})
    assert "says no architectures" in served_by({"architectures": []})
    registry.write_text("# rewritten\n")
    assert "not known here" in served_by({"architectures": ["A"]})
    monkeypatch.setattr(served.importlib.util, "find_spec", lambda name: None)
    assert "not known here" in served_by({"architectures": ["A"]})


def row_file(folder: Path, **changes: Any) -> Path:
    content = {key: value for key, value in {**AXK1, **changes}.items() if value is not None}
    path = folder / "row.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_a_row_is_read_as_it_was_written(tmp_path: Path) -> None:
    inside = {"decoder": "model.language_model", "experts": "model.language_model.layers.{layer}.mlp.experts"}
    row = FamilyRow(
        **AXK1 | inside,
        released={name: f"model.language_model.layers.{{layer}}.{name}" for name in ("gate", "up", "down")},
    )
    text = written(row, ["one: note", "two"])
    (tmp_path / "row.yaml").write_text(text)
    assert read_family_file(tmp_path / "row.yaml").row == row
    assert text.startswith("# one: note\n# two\nmodel_type: axk1\n")
    assert '# intermediate_size_key: "moe_intermediate_size"  (the default)\n' in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": None}, "model_type is missing; add it"),
        ({"expert": 1}, "unknown key 'expert'; did you mean 'experts'?"),
        ({"wholly_other": 1}, "unknown key 'wholly_other'; valid keys: model_type, experts"),
        ({"model_type": 5}, "model_type: Input should be a valid string"),
        ({"model_type": "a/b"}, "model_type: 'a/b' is no name"),
        ({"model_type": "mixtral"}, "d2moe has a row of 'mixtral' itself; leave the option out"),
        ({"model_type": "cohere2_moe"}, "no row can describe 'cohere2_moe': vLLM's windows of attention"),
        ({"experts": "model.layers.mlp.experts"}, "needs {layer} once"),
        ({"experts": "model.blocks.{layer}.experts"}, "is not within 'model.layers.{layer}.'"),
        ({"experts": "model.layers.{layer}.experts.{expert}"}, "leave {expert} out"),
        ({"experts": "../{layer}"}, "is no path of modules"),
        ({"projections": {"gate": "a", "up": "b"}}, "projections must name gate, up and down"),
        ({"projections": {"gate": "a", "up": "a", "down": "b"}}, "each differently"),
        ({"projections": {"gate": "a", "down": "b"}}, "or up and down alone"),
        ({"activation": "gelu"}, "activation: Input should be 'silu' or 'relu2'"),
        (
            {"released": {role: f"model.layers.{{layer}}.{role}.{{expert}}" for role in ("up", "down")}},
            "released has to name gate where projections do, and only there",
        ),
        ({"projections": {"gate": "a", "up": "b", "down": "c", "more": "d"}}, "projections.more"),
        ({"decoder": "transformer"}, "is not within `model`"),
        ({"experts_module": "mlp.moe"}, "must end with `experts`"),
        ({"dense_keys": "first_k_dense_replace"}, "dense_keys: Input should be a valid"),
        ({"dense_keys": ["nonesuch"]}, "dense_keys: 'nonesuch' is none of first_k_dense_replace"),
        ({"renames": {"": ".a."}}, "is no part of a tensor's name"),
        ({"released": {"gate": "a"}}, "released.gate"),
        ({"released": {"gates": "a"}}, "unknown key 'released.gates'; did you mean 'gate'?"),
        (
            {"released": {role: f"model.layers.{{layer}}.{role}.{{expert}}" for role in ("gate", "up", "down")}
             | {"transposed": True}},
            "transposed is for stacks",
        ),
        ({"released": dict.fromkeys(("gate", "up", "down"), "model.layers.{layer}.a")}, "down has a tensor of its own"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_is_refused(changes: dict[str, Any], words: str, tmp_path: Path, axk1: Path) -> None:
    path = row_file(tmp_path, **changes)
    done = d2moe_here("plan", axk1, "--ratio", "0.1", "--family-file", path)
    refused(done, f"--family-file {path}: ", words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "found NoneType"),
        (b"- a", "found list"),
        (b"a: [", "cannot be read"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"a: !!python/object/apply:os.system [ls]", "cannot be read"),
        (b"a: &a [x]\nb: *a", "aliases are not read here"),
        (b"model_type: a\nmodel_type: b", "it says model_type twice"),
        (b"model_type: 2026-01-01", "cannot be read"),
        (b"? {a: b}\n: c", "cannot be read"),
        (b"[" * 5000, "cannot be read"),
        (b"a" * 200_000, "200,000 bytes, more than the 100,000 that it may have"),
    ],
)
def test_what_is_no_row_at_all_is_refused(text: bytes, words: str, tmp_path: Path, axk1: Path) -> None:
    path = tmp_path / "row.yaml"
    path.write_bytes(text)
    refused(d2moe_here("plan", axk1, "--ratio", "0.1", "--family-file", path), f"--family-file {path}", words)
    refused(d2moe_here("plan", axk1, "--ratio", "0.1", "--family-file", tmp_path / "none"), "No such file")
    os.mkfifo(tmp_path / "pipe")
    refused(d2moe_here("plan", axk1, "--ratio", "0.1", "--family-file", tmp_path / "pipe"), "no regular file")


def test_plan_proposes(axk1: Path, tmp_path: Path) -> None:
    done = d2moe_here("plan", axk1)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "d2moe: model_type 'axk1' has no row in d2moe, but it fits one: `d2moe plan SRC > axk1.yaml` writes it; read "
        "it, and add --family-file axk1.yaml"
    ]
    (tmp_path / "axk1.yaml").write_text(done.stdout)
    assert yaml.safe_load(done.stdout) == AXK1
    planned = d2moe_here("plan", axk1, "--ratio", "0.1", "--family-file", tmp_path / "axk1.yaml", "--json")
    assert planned.returncode == 0, planned.stderr
    assert "nobody has checked" in " ".join(json.loads(planned.stdout)["notes"])
    assert "nobody has checked" in planned.stderr
    as_json = json.loads(d2moe_here("plan", axk1, "--json").stdout)
    assert FamilyRow(**as_json["proposed_family"]) == FamilyRow(**AXK1)
    assert len(as_json["notes"]) == 3
    sized = d2moe_here("plan", axk1, "--fit", "1GB", "--family-file", tmp_path / "axk1.yaml")
    assert "what attention of axk1 keeps of a token is not known here" in sized.stderr


def test_the_other_commands_propose_nothing_and_name_plan(axk1: Path, few_words: Path, tmp_path: Path) -> None:
    for command in (
        ("compress", axk1, tmp_path / "out", "--ratio", "0.1", "--calibration", few_words),
        ("eval", axk1, "--text", few_words),
    ):
        refused(d2moe_here(*command), "`d2moe plan SRC > axk1.yaml` writes it")


def test_a_row_says_the_activation_that_config_json_says(axk1: Path, tmp_path: Path) -> None:
    done = d2moe_here("plan", axk1, "--ratio", "0.1", "--family-file", row_file(tmp_path, activation="relu2"))
    refused(done, "config.json: hidden_act 'silu'; vLLM serves axk1 with relu2 only")


def test_a_row_is_for_its_own_family_and_one_command(axk1: Path, tmp_path: Path) -> None:
    file = row_file(tmp_path)
    tiny = ROOT / "examples" / "tiny-mixtral"
    refused(d2moe_here("plan", tiny, "--ratio", "0.1", "--family-file", file), "model_type 'mixtral' is not 'axk1'")
    assert d2moe_here("plan", axk1, "--ratio", "0.1", "--family-file", file).returncode == 0
    proposal(axk1)
    assert d2moe_here("plan", tiny, "--ratio", "0.1").returncode == 0


"""A checkpoint that was compressed with a given row needs the file no more."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_unlisted(tmp_path_factory.mktemp("source") / "axk1", "axk1", torch.float32)


@pytest.fixture(scope="module")
def ours(whole: Path, few_words: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("everywhere")
    given = ("--family-file", row_file(folder), "--ratio", "0.08", *FEW, "--calibration", few_words)
    done = d2moe_here("compress", whole, folder / "ours", *given)
    assert done.returncode == 0, done.stderr
    assert "nobody has checked" in done.stderr
    return folder / "ours"


@pytest.fixture(scope="module")
def dense(ours: Path) -> Path:
    done = d2moe_here("export", ours, ours.with_name("dense"))
    assert done.returncode == 0, done.stderr
    return ours.with_name("dense")


def test_it_carries_the_row(ours: Path) -> None:
    config = parse_config(json.loads((ours / "config.json").read_text())["quantization_config"])
    assert config.family_row == FamilyRow(**AXK1)


def test_verified_and_inspected(ours: Path, whole: Path, tmp_path: Path) -> None:
    for command in (
        ("verify", ours, "--source", whole),
        ("inspect", ours),
        ("inspect", ours, "--analyses", "--source", whole),
    ):
        done = d2moe_here(*command)
        assert done.returncode == 0, done.stderr


def test_evaluated_as_its_export(ours: Path, dense: Path, few_words: Path, tmp_path: Path) -> None:
    def perplexity(folder: Path, *more: object) -> float:
        done = d2moe_here("eval", folder, "--text", few_words, *FEW, *more, "--json")
        assert done.returncode == 0, done.stderr
        return float(json.loads(done.stdout)["perplexity"])

    expected = perplexity(dense, "--family-file", row_file(tmp_path))
    assert perplexity(ours) == pytest.approx(expected, rel=1e-4)
    assert perplexity(ours, "--family-file", row_file(tmp_path)) == perplexity(ours)
    other = row_file(tmp_path, **OTHER)
    refused(d2moe_here("eval", ours, "--text", few_words, "--family-file", other), "says otherwise than")


@torch.no_grad()
def test_loaded_by_plain_transformers(ours: Path, dense: Path) -> None:
    """By the checkpoint's modeling file, and by the quantizer."""
    tokens = torch.randint(0, 4096, (2, 24), generator=torch.Generator().manual_seed(1))
    expected = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)(tokens).logits
    for trust_remote_code in (True, False):
        loaded = AutoModelForCausalLM.from_pretrained(ours, trust_remote_code=trust_remote_code, dtype=torch.float32)
        found = loaded(tokens).logits
        assert float((found - expected).norm() / expected.norm()) < 1e-4


def test_compared(whole: Path, few_words: Path, tmp_path: Path) -> None:
    given = ("--ratio", "0.05", "--baseline", "rtn-8", "--text", few_words, "--calibration", few_words, *FEW)
    options = ("--workdir", tmp_path / "work", "--family-file", row_file(tmp_path), "--json")
    done = d2moe_here("compare", whole, *given, *options)
    assert done.returncode == 0, done.stderr
    assert [row["failed"] for row in json.loads(done.stdout)["rows"]] == [None, None]


def test_another_row_starts_over(whole: Path, few_words: Path, tmp_path: Path) -> None:
    """What a killed run left is of the row that it had."""
    from offline.work.workdir import fingerprint

    marks = []
    for changes in ({}, OTHER):
        family = read_family_file(row_file(tmp_path, **changes))
        with known(family):
            marks.append(fingerprint(open_dense(str(whole)), {}, "", {}))
    assert marks[0] != marks[1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"experts": "model.layers.{layer}.moe.experts"}, "family_row is another family's"),
        ({"model_type": "other"}, "family_row is another family's"),
        ({"more": 1}, "family_row.more"),
    ],
)
def test_a_damaged_row_is_refused(change: dict[str, Any], words: str, ours: Path, tmp_path: Path) -> None:
    content = json.loads((ours / "config.json").read_text())
    content["quantization_config"]["family_row"] |= change
    with pytest.raises(CheckpointError, match=words):
        parse_config(content["quantization_config"])
    damaged = shutil.copytree(ours, tmp_path / "damaged")
    (damaged / "config.json").write_text(json.dumps(content))
    done = d2moe_here("verify", damaged)
    assert done.returncode == 2
    assert words in done.stderr


def test_a_later_release_has_the_row_itself(ours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint's own counts, by which it was made."""
    later = dataclasses.replace(from_row(FamilyRow(**AXK1)), row=None, experts="model.layers.{layer}.other")
    monkeypatch.setattr(families, "FAMILIES", MappingProxyType({**FAMILIES, "axk1": later}))
    assert d2moe_here("verify", ours).returncode == 0
