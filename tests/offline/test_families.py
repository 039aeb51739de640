"""Every family's small checkpoint, read and run layer by layer, against transformers' own model of it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forks
import pytest
import torch
from compression import ROOT
from families import (
    CONFIGS,
    STACKABLE,
    change_config,
    load_stock,
    quantize_fp8,
    stock_config,
    stock_model,
    write_exact,
    write_family,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from d2moe_vllm.families import auto_map, stock_model_class
from d2moe_vllm.format.files import check_checkpoint
from d2moe_vllm.format.kinds import ROLES
from d2moe_vllm.hf.conversion import decoder_of
from offline.errors import InputError
from offline.run.evaluate import open_evaluated
from offline.source.dense import open_dense
from offline.source.families import FAMILIES
from offline.source.layerwise import LayerwiseModel, next_token_loss, read_hf_config
from offline.source.stored import SourceReader
from offline.work.statistics import DenseExperts

TOKENS = torch.randint(0, 4096, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A family's float32 checkpoint as released models are laid out. Not to be changed."""
    folders: dict[str, Path] = {}

    def write(family: str) -> Path:
        if family not in folders:
            folders[family] = write_family(tmp_path_factory.mktemp(family) / family, family, dtype=torch.float32)
        return folders[family]

    return write


@torch.no_grad()
def logits(folder: Path) -> Tensor:
    """Of a dense or compressed checkpoint, layer by layer, as `d2moe eval` runs it."""
    evaluated = open_evaluated(str(folder))
    hidden = evaluated.model.embed(TOKENS)
    for number in range(evaluated.model.num_layers):
        layer = evaluated.model.load_layer(number, evaluated.experts(number))
        hidden = evaluated.model.run_layer(number, layer, hidden)
    return evaluated.model.logits(hidden)


def stock_experts(layer: Any, family: str) -> Any | None:
    path = FAMILIES[family].experts_module
    return dict(layer.named_modules()).get(path)


def stock_weight(experts: Any, expert: int, role: str) -> Tensor:
    if isinstance(getattr(experts, "up_proj", None), Tensor):  # without a gate
        return getattr(experts, f"{role}_proj")[expert]
    if not hasattr(experts, "gate_up_proj"):
        return getattr(experts[expert], f"{role}_proj").weight
    both, down = experts.gate_up_proj[expert], experts.down_proj[expert]
    if both.shape[1] == 2 * len(down):  # transposed, as gpt-oss's and Llama 4's are
        both, down = both.mT, down.mT
    if role == "down":
        return down
    if getattr(experts, "is_transposed", False):  # gpt-oss's
        return both[int(role == "up") :: 2]
    return both.chunk(2)[0 if role == "gate" else 1]


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert float((found - expected).norm() / expected.norm()) < 1e-4


def test_every_family_is_tried() -> None:
    assert set(CONFIGS) == set(FAMILIES)


def test_the_documents_name_every_family() -> None:
    """docs/methods.md, the table of its section: a family's name, and what its KV cache holds."""
    section = (
        (ROOT / "docs" / "methods.md")
        .read_text()
        .partition("## Families\n\n")[2]
        .partition("\n\n")[0]
        .partition("|---")[2]
    )
    rows = re.findall(r"^\| `([a-z0-9_]+)` \|[^|]+\| ([^|]+) \|", section, re.M)
    kept = {"heads": "keys and values", "latent": "latent", "indexed": "latent, indexer's key", None: "not known"}
    expected = [
        (
            name,
            kept[one.attention]
            + (", states" if one.state else "")
            + {2: ", a window in every other layer", 0: ", a window in some layers"}.get(one.window_every, ""),
        )
        for name, one in FAMILIES.items()
    ]
    assert sorted(rows) == sorted(expected)


@pytest.mark.parametrize("family", CONFIGS)
@torch.no_grad()
def test_reads_and_runs_as_the_stock_model_does(family: str, released: Callable[[str], Path]) -> None:
    stock = stock_model(stock_config(family))
    model = open_dense(str(released(family)))
    layers = {number: stock_experts(layer, family) for number, layer in enumerate(decoder_of(stock).layers)}
    with_experts = [number for number, experts in layers.items() if experts is not None]
    assert model.num_layers == len(layers)
    assert list(model.shape.layers) == with_experts
    stored = {tensor.data_ptr(): tensor.numel() for tensor in stock.state_dict().values()}  # a tied head once
    assert model.reader.parameters == sum(stored.values())
    for layer in with_experts:
        for role in model.shape.roles:
            for expert in range(model.shape.num_experts):
                weight = model.weight(layer, expert, role)
                assert weight.shape == model.shape.projection(role)
                assert torch.equal(weight, stock_weight(layers[layer], expert, role))
        with pytest.raises((IndexError, AttributeError)):
            stock_weight(layers[layer], model.shape.num_experts, "up")
    assert_close(logits(model.folder), stock(TOKENS).logits)


@pytest.mark.parametrize("family", CONFIGS)
def test_scores_are_counted_where_attention_is_not_fused(family: str) -> None:
    assert FAMILIES[family].fused == stock_model_class(stock_config(family))._supports_sdpa


@pytest.mark.parametrize("family", CONFIGS)
def test_gradients_are_the_stock_models(family: str, released: Callable[[str], Path]) -> None:
    """What Fisher information is made of: d loss / d input of the first layer, through every layer."""
    stock = stock_model(stock_config(family)).requires_grad_(False)
    embedded = stock.get_input_embeddings()(TOKENS).requires_grad_()
    (expected,) = torch.autograd.grad(next_token_loss(stock(inputs_embeds=embedded).logits, TOKENS), embedded)
    model = open_dense(str(released(family)))
    layerwise = LayerwiseModel(model.reader, model.family, read_hf_config(model.folder))
    hidden = first = layerwise.embed(TOKENS).requires_grad_()
    for number in range(layerwise.num_layers):
        fetch = model.experts.fetched(number, torch.device("cpu"))
        biases = model.experts.biases(number, torch.device("cpu"))
        experts = DenseExperts(model.shape, fetch, layerwise.gated, biases=biases)
        experts = experts if number in model.shape.layers else None
        hidden = layerwise.run_layer(number, layerwise.load_layer(number, experts), hidden)
    (found,) = torch.autograd.grad(next_token_loss(layerwise.logits(hidden), TOKENS), first)
    # Granite and Trinity scale their embeddings before the first layer.
    scale = stock.config.hidden_size**0.5 if getattr(stock.config, "mup_enabled", False) else 1.0
    assert_close(found * getattr(stock.config, "embedding_multiplier", scale), expected)


@pytest.mark.parametrize("family", STACKABLE)
def test_stacked_experts_read_and_are_written_as_released(
    family: str, released: Callable[[str], Path], tmp_path: Path
) -> None:
    original = open_dense(str(released(family)))
    stacked = open_dense(str(write_family(tmp_path / "stacked", family, stacked=True, dtype=torch.float32)))
    assert stacked.reader.specs != original.reader.specs
    assert stacked.shape == original.shape
    assert stacked.other_tensors == original.other_tensors
    for layer in original.shape.layers:
        kept = original.kept_experts(layer)
        assert stacked.kept_experts(layer) == kept
        assert set(kept) <= set(original.reader.specs)
        for name in kept:
            assert torch.equal(stacked.other_tensor(name), original.reader.tensor(name))
            assert torch.equal(original.other_tensor(name), original.reader.tensor(name))
    for name, spec in original.other_tensors.items():
        assert torch.equal(stacked.other_tensor(name), original.other_tensor(name))
        assert stacked.other_tensor(name).shape == spec.shape
    assert_close(logits(stacked.folder), logits(original.folder))


@pytest.mark.parametrize("family", CONFIGS)
@torch.no_grad()
def test_compressed_without_loss_it_is_the_same_model(
    family: str, released: Callable[[str], Path], tmp_path: Path
) -> None:
    """In plain transformers, with nothing but the checkpoint's own code, and layer by layer; a layer stays dense."""
    source = released(family)
    dense = (open_dense(str(source)).shape.layers[-1],)
    folder = write_exact(tmp_path / "exact", source, dense)
    check_checkpoint(folder)
    expected = stock_model(stock_config(family))(TOKENS).logits
    # By its class and not by AutoModel, which prefers what d2moe_vllm.hf registers for DeepSeek v1 and Kimi-K2.
    own = get_class_from_dynamic_module(auto_map(family)["AutoModelForCausalLM"], folder)
    loaded = own.from_pretrained(folder, dtype=torch.float32)
    assert type(loaded).__module__.startswith("transformers_modules")
    assert loaded.config.model_type == family
    assert_close(loaded(TOKENS).logits, expected)
    assert_close(logits(folder), expected)


@pytest.mark.parametrize("stacked", [False, True])
@torch.no_grad()
def test_experts_that_see_a_projected_input(stacked: bool, tmp_path: Path) -> None:
    """Of another size than hidden states; as released, and as transformers can write it."""
    source = write_family(tmp_path / "latent", "nemotron_h", stacked=stacked, dtype=torch.float32, moe_latent_size=40)
    model = open_dense(str(source))
    assert (model.shape.hidden_size, model.shape.model_hidden_size) == (40, 64)
    assert model.weight(1, 0, "up").shape == (48, 40)
    expected = stock_model(stock_config("nemotron_h", moe_latent_size=40))(TOKENS).logits
    assert_close(logits(source), expected)
    exact = write_exact(tmp_path / "exact", source)
    assert "backbone.layers.1.mixer.fc1_latent_proj.weight" in SourceReader(exact).specs
    check_checkpoint(exact)
    assert_close(logits(exact), expected)
    for trust_remote_code in (True, False):
        loaded = AutoModelForCausalLM.from_pretrained(exact, trust_remote_code=trust_remote_code, dtype=torch.float32)
        assert_close(loaded(TOKENS).logits, expected)


def test_layers_kinds_are_told_by_a_pattern_too(tmp_path: Path) -> None:
    """As the released Nemotron 3 have it."""
    folder = write_family(tmp_path / "pattern", "nemotron_h", dtype=torch.float32)
    content = json.loads((folder / "config.json").read_text())
    assert "num_hidden_layers" not in content
    del content["layers_block_type"]
    (folder / "config.json").write_text(
        json.dumps({**content, "hybrid_override_pattern": "ME*E-", "num_hidden_layers": 99})
    )
    model = open_dense(str(folder))
    assert (model.num_layers, model.shape.layers) == (5, (1, 3))
    (folder / "config.json").write_text(json.dumps({**content, "hybrid_override_pattern": "M*-M-"}))
    with pytest.raises(InputError, match="none of the 5 layers has experts"):
        open_dense(str(folder))
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="layers_block_type is None, a nemotron_h model needs each layer's kind"):
        open_dense(str(folder))


@torch.no_grad()
def test_layers_that_predict_further_tokens_ride_along(released: Callable[[str], Path], tmp_path: Path) -> None:
    """DeepSeek-V3's MTP layer comes after the last decoder layer and has experts of its own."""
    folder = shutil.copytree(released("deepseek_v3"), tmp_path / "v3")
    change_config(folder, num_nextn_predict_layers=1)
    names = ("model.layers.3.mlp.experts.0.up_proj.weight", "model.layers.3.eh_proj.weight")
    extra = {name: torch.randn(48, 64) for name in names}
    save_file({**load_file(folder / "model.safetensors"), **extra}, folder / "model.safetensors", {"format": "pt"})
    model = open_dense(str(folder))
    assert model.shape.layers == (1, 2)
    exact = write_exact(tmp_path / "exact", folder)
    check_checkpoint(exact)
    for name, tensor in extra.items():
        assert torch.equal(SourceReader(exact).tensor(name), tensor)
    for trust_remote_code in (True, False):  # the checkpoint's modeling file, and the quantizer
        loaded = AutoModelForCausalLM.from_pretrained(exact, trust_remote_code=trust_remote_code, dtype=torch.float32)
        assert_close(loaded(TOKENS).logits, logits(model.folder))


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("qwen3_next", "mtp.layers.0.mlp.experts.0.up_proj.weight"),
        ("ernie4_5_moe", "model.mtp_block.0.mlp.gate.weight"),
        ("qwen3_5_moe", "mtp.layers.0.mlp.experts.0.up_proj.weight"),
        ("exaone_moe", "mtp.layers.0.mlp.up_proj.weight"),
        ("mimo_v2_flash", "model.mtp.layers.0.mlp.up_proj.weight"),
        ("nemotron_h", "mtp.layers.1.mixer.experts.0.up_proj.weight"),
    ],
)
@torch.no_grad()
def test_modules_that_predict_further_tokens_ride_along(
    family: str, name: str, released: Callable[[str], Path], tmp_path: Path
) -> None:
    """Beside the decoder layers, where transformers and vLLM leave them out."""
    folder = shutil.copytree(released(family), tmp_path / "source")
    extra = torch.randn(48, 64)
    save_file({**load_file(folder / "model.safetensors"), name: extra}, folder / "model.safetensors", {"format": "pt"})
    assert open_dense(str(folder)).homeless == frozenset()
    exact = write_exact(tmp_path / "exact", folder)
    check_checkpoint(exact)
    assert torch.equal(SourceReader(exact).tensor(name), extra)
    for trust_remote_code in (True, False):
        loaded = load_stock(exact, trust_remote_code=trust_remote_code, dtype=torch.float32)
        assert_close(loaded(TOKENS).logits, logits(folder))


def test_the_modeling_file_imports_the_family_that_is_asked_for_only() -> None:
    code = (
        "import sys\n"
        "from d2moe_vllm.hf.modeling_d2moe import D2Qwen3MoeForCausalLM\n"
        "loaded = [name for name in sys.modules if name.startswith('transformers.models.')]\n"
        "print([n for n in ('mixtral', 'granitemoe') if f'transformers.models.{n}' in loaded])\n"
    )
    result = forks.python(code, imports=forks.TRANSFORMERS)
    assert result.stdout.strip() == "[]"


@torch.no_grad()
def test_tied_embeddings(tmp_path: Path) -> None:
    """As the released Granite models have them."""
    source = write_family(tmp_path / "tied", "granitemoe", dtype=torch.float32, tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(source / "model.safetensors")
    expected = AutoModelForCausalLM.from_pretrained(source)(TOKENS).logits
    assert_close(logits(source), expected)
    loaded = AutoModelForCausalLM.from_pretrained(write_exact(tmp_path / "exact", source), trust_remote_code=True)
    assert_close(loaded(TOKENS).logits, expected)


@torch.no_grad()
def test_deepseek_v1_is_the_papers(tmp_path: Path) -> None:
    """Equations 9 to 11 of arXiv 2401.06066, each expert by itself, in float64."""
    for normalize in (False, True):
        config = stock_config("deepseek", norm_topk_prob=normalize)
        block = stock_model(config).model.layers[1].mlp.double()
        rows = torch.randn(7, config.hidden_size, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

        def ffn(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
            a = gate @ x
            return down @ (a / (1 + (-a).exp()) * (up @ x))

        shared, size = block.shared_experts, config.moe_intermediate_size
        for x, found in zip(rows, block(rows[None])[0], strict=True):
            scores = (block.gate.weight @ x).exp()
            scores = scores / scores.sum()
            chosen = scores.argsort(descending=True)[: config.num_experts_per_tok].tolist()
            total = scores[chosen].sum() if normalize else 1.0
            expected = torch.zeros_like(x)
            for n in range(config.n_shared_experts):
                part = slice(n * size, (n + 1) * size)
                gate, up, down = shared.gate_proj.weight[part], shared.up_proj.weight[part], shared.down_proj.weight
                expected += ffn(x, gate, up, down[:, part])
            for n in chosen:
                expert = block.experts[n]
                weights = (expert.gate_proj.weight, expert.up_proj.weight, expert.down_proj.weight)
                expected += scores[n] / total * ffn(x, *weights)
            # The gates go through float32.
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_attention_biases_and_shared_experts_are_not_the_experts(released: Callable[[str], Path]) -> None:
    others = open_dense(str(released("qwen2_moe"))).other_tensors
    assert "model.layers.0.self_attn.q_proj.bias" in others
    assert "model.layers.1.mlp.shared_expert.down_proj.weight" in others
    assert "model.layers.0.mlp.down_proj.weight" in others
    others = open_dense(str(released("deepseek_v3"))).other_tensors
    assert "model.layers.1.mlp.gate.e_score_correction_bias" in others
    assert "model.layers.1.mlp.shared_experts.gate_proj.weight" in others
    assert not any(".experts." in name for name in others)


@torch.no_grad()
def test_fp8_runs_as_its_dequantised_weights(tmp_path: Path) -> None:
    folder = write_family(tmp_path / "fp8", "deepseek_v3", dtype=torch.float32)
    exact = logits(folder)
    quantize_fp8(folder)
    model = open_dense(str(folder))
    plain = stock_model(stock_config("deepseek_v3")).state_dict()
    for name, tensor in plain.items():
        if ".experts." not in name:
            tensor.copy_(model.reader.tensor(name))
    for layer in model.shape.layers:
        experts = range(model.shape.num_experts)
        weights = {role: [model.weight(layer, expert, role) for expert in experts] for role in ROLES}
        gate_up = [torch.cat(pair) for pair in zip(weights["gate"], weights["up"], strict=True)]
        plain[f"model.layers.{layer}.mlp.experts.gate_up_proj"].copy_(torch.stack(gate_up))
        plain[f"model.layers.{layer}.mlp.experts.down_proj"].copy_(torch.stack(weights["down"]))
    stock = stock_model(stock_config("deepseek_v3"))
    stock.load_state_dict(plain)
    found = logits(folder)
    assert_close(found, stock(TOKENS).logits)
    assert not torch.allclose(found, exact)
