"""`import d2moe_vllm.hf`: after it plain transformers loads every compressed family, and dense ones as before."""

from __future__ import annotations

import hashlib
import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import forks
import huggingface_hub.constants
import pytest
import torch
from compression import ROOT
from families import CONFIGS, load_stock, stock_name, write_exact, write_family
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, AutoQuantizationConfig

import d2moe_vllm.hf
from d2moe_vllm.families import auto_map, stock_config_class, stock_model_class
from d2moe_vllm.hf.conversion import D2Mixin
from d2moe_vllm.hf.experts import D2Experts

TOKENS = torch.randint(0, 4096, (2, 12), generator=torch.Generator().manual_seed(1))


def experts_of(model: nn.Module) -> list[D2Experts]:
    return [module for module in model.modules() if isinstance(module, D2Experts)]


@pytest.mark.parametrize("family", CONFIGS)
@torch.no_grad()
def test_every_family(family: str, tmp_path: Path) -> None:
    """Bit for bit what the checkpoint's modeling file gives, and the dense model's logits, for which the checkpoint
    loses nothing. Dense checkpoints of the family load as before."""
    source = write_family(tmp_path / "dense", family, dtype=torch.float32)
    folder = write_exact(tmp_path / "exact", source)
    model = load_stock(folder)
    assert f"modeling_d2moe.{type(model).__name__}" == auto_map(family)["AutoModelForCausalLM"]
    assert type(model).__module__ == "d2moe_vllm.hf.conversion"
    assert len(experts_of(model)) == len(
        json.loads((folder / "config.json").read_text())["quantization_config"]["layers"]
    )
    traveller = get_class_from_dynamic_module(auto_map(family)["AutoModelForCausalLM"], folder).from_pretrained(folder)
    assert type(traveller).__module__.startswith("transformers_modules.")
    logits = model(TOKENS).logits
    assert torch.equal(traveller(TOKENS).logits, logits)
    config = stock_config_class(stock_name(family)).from_pretrained(source)
    stock = stock_model_class(config).from_pretrained(source, config=config)(TOKENS).logits
    torch.testing.assert_close(logits, stock, rtol=0, atol=1e-4)
    dense = load_stock(source)
    assert experts_of(dense) == []
    torch.testing.assert_close(dense(TOKENS).logits, stock, rtol=0, atol=1e-5)


def test_a_stock_class_loads_it_too_and_keeps_loading_dense_ones(checkpoint: Path, tmp_path: Path) -> None:
    model = MixtralForCausalLM.from_pretrained(checkpoint)
    assert len(experts_of(model)) == 4
    assert type(model).__name__ == "D2MixtralForCausalLM"
    source = write_family(tmp_path / "dense", "mixtral")
    assert type(MixtralForCausalLM.from_pretrained(source)) is MixtralForCausalLM


@torch.no_grad()
def test_both_at_once_convert_once(checkpoint: Path) -> None:
    """trust_remote_code=True after the import, with the quantization config passed along as lm-eval does."""
    alone = AutoModelForCausalLM.from_pretrained(checkpoint)
    found = AutoQuantizationConfig.from_dict(AutoConfig.from_pretrained(checkpoint).quantization_config)
    for further in ({}, {"quantization_config": found}):
        both = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True, **further)
        assert type(both).__module__.startswith("transformers_modules.")
        assert getattr(both, "hf_quantizer", None) is None
        names = [name for name, module in both.named_modules() if type(module).__name__ == "D2Experts"]
        assert len(names) == 4
        assert torch.equal(both(TOKENS).logits, alone(TOKENS).logits)


@pytest.mark.parametrize("trust_remote_code", [True, False])
def test_quantizing_further_is_refused(checkpoint: Path, trust_remote_code: bool) -> None:
    with pytest.raises(ValueError, match=r"cannot be quantized further|BitsAndBytesConfig"):
        AutoModelForCausalLM.from_pretrained(
            checkpoint, trust_remote_code=trust_remote_code, quantization_config=BitsAndBytesConfig(load_in_8bit=True)
        )


def test_registering_again_is_harmless(checkpoint: Path) -> None:
    quantizer = AUTO_QUANTIZER_MAPPING["d2moe"]
    importlib.reload(d2moe_vllm.hf)
    assert AUTO_QUANTIZER_MAPPING["d2moe"] is quantizer
    assert len(experts_of(AutoModelForCausalLM.from_pretrained(checkpoint))) == 4


def run(code: str, *paths: Path) -> subprocess.CompletedProcess[str]:
    """In a fresh process, where nothing is registered yet."""
    lines = "import sys, torch\nfrom transformers import AutoModelForCausalLM\ntokens = torch.arange(12)[None]\n"
    done = forks.python(lines + code, *paths, imports=forks.TRANSFORMERS, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done


def test_in_a_fresh_process(tmp_path: Path) -> None:
    """A family that transformers has no model_type of: the vLLM plugin's share of the registration does not hide the
    checkpoint's own class, the import makes it loadable without remote code, and so does another copy's import."""
    folder = write_exact(tmp_path / "exact", write_family(tmp_path / "dense", "deepseek", dtype=torch.float32))
    shutil.copytree(ROOT / "d2moe_vllm", tmp_path / "copy" / "d2moe_vllm")
    done = run(
        "from d2moe_vllm.families import register_configs\n"
        "register_configs()\n"
        "assert 'd2moe_vllm.hf' not in sys.modules\n"
        "def logits(**options):\n"
        "    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], **options)\n"
        "    print(type(model).__module__.partition('.')[0], sys.modules[type(model).__module__].__file__)\n"
        "    return model(tokens).logits\n"
        "first = logits(trust_remote_code=True)\n"
        "import d2moe_vllm.hf\n"
        "assert torch.equal(logits(), first)\n"
        "for name in [name for name in sys.modules if name.partition('.')[0] == 'd2moe_vllm']:\n"
        "    del sys.modules[name]\n"
        "sys.path.insert(0, sys.argv[2])\n"
        "import d2moe_vllm.hf\n"
        "assert d2moe_vllm.__file__.startswith(sys.argv[2])\n"
        "assert torch.equal(logits(), first)\n",
        folder,
        tmp_path / "copy",
    )
    assert [line.partition(" ")[0] for line in done.stdout.splitlines()] == [
        "transformers_modules",
        *["d2moe_vllm"] * 2,
    ]


def test_without_import_and_trust_the_experts_are_random(checkpoint: Path) -> None:
    """The trap is what docs/footguns.md and the model card say it is: one warning, no exception, other logits each
    time; and the check that they give tells it apart."""
    done = run(
        "for _ in range(2):\n"
        "    model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "    print(type(model).__name__, float(model(tokens).logits.sum()))\n",
        checkpoint,
    )
    (name, first), (_, second) = (line.split() for line in done.stdout.splitlines())
    assert name == "MixtralForCausalLM"
    assert first != second
    assert "Unknown quantization type, got d2moe" in done.stderr
    assert "UNEXPECTED" in done.stderr
    assert "MISSING" in done.stderr


def test_names_cost_neither_torch_nor_transformers() -> None:
    code = "import sys, d2moe_vllm.families; print({'torch', 'transformers', 'd2moe_vllm.hf'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT).strip() == "set()"


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForSequenceClassification])
def test_what_the_checkpoint_does_not_hold_is_refused(checkpoint: Path, auto: Any) -> None:
    """transformers would go on with a new head, or without one."""
    with pytest.raises(ValueError, match="load it as a causal LM"):
        auto.from_pretrained(checkpoint)


@pytest.mark.parametrize("trust_remote_code", [True, False])
def test_a_transformers_that_does_not_report_is_refused(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, trust_remote_code: bool
) -> None:
    """Incomplete loads are noticed by a method that is not part of its interface: if it goes, loading must fail."""
    mixin = D2Mixin
    if trust_remote_code:
        mixin = get_class_from_dynamic_module("modeling_d2moe.D2Mixin", checkpoint)
    own = PreTrainedModel._adjust_missing_and_unexpected_keys
    monkeypatch.setattr(mixin, "_adjust_missing_and_unexpected_keys", own)
    with pytest.raises(RuntimeError, match="does not report what it loaded"):
        AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=trust_remote_code)


@pytest.mark.parametrize(
    "family", [f if f in ("mixtral", "granitemoe") else pytest.param(f, marks=pytest.mark.slow) for f in CONFIGS]
)
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16], ids=["stored", "float32", "float16"])
@torch.no_grad()
def test_dtypes(family: str, dtype: torch.dtype | None, tmp_path: Path) -> None:
    """Of a bfloat16 checkpoint, by both ways in: what transformers makes of the dense one's tensors."""
    source = write_family(tmp_path / "dense", family)
    folder = write_exact(tmp_path / "exact", source)
    expected = load_stock(source, dtype=dtype).state_dict()
    traveller = get_class_from_dynamic_module(auto_map(family)["AutoModelForCausalLM"], folder)
    for load in (load_stock, traveller.from_pretrained):
        model = load(folder, dtype=dtype)
        for name, tensor in model.state_dict().items():
            wanted = expected[name].dtype if name in expected else dtype or torch.bfloat16
            assert (name, tensor.dtype) == (name, wanted)
        assert model(TOKENS).logits.isfinite().all()


def test_a_language_model_alone_is_not_made_of_a_multimodal_checkpoint(tmp_path: Path) -> None:
    """transformers has such a class for Qwen3.5, and finds none of the tensors' names for it where there is a
    quantizer; with the checkpoint's own code the whole is loaded, whichever is asked for."""
    folder = write_exact(tmp_path / "exact", write_family(tmp_path / "dense", "qwen3_5_moe"))
    with pytest.raises(ValueError, match=r"language model alone.*AutoModelForImageTextToText"):
        AutoModelForCausalLM.from_pretrained(folder)
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        loaded = auto.from_pretrained(folder, trust_remote_code=True)
        assert type(loaded).__name__ == "D2Qwen3_5MoeForConditionalGeneration"


def test_a_config_of_another_shape_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    """transformers itself does not look at shapes once there is a quantizer."""
    folder = shutil.copytree(checkpoint, tmp_path / "damaged")
    config = json.loads((folder / "config.json").read_text()) | {"num_local_experts": 16}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"mlp.gate.weight is \(8, 128\), but config.json makes it \(16, 128\)"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_layer_without_experts_is_refused(tmp_path: Path) -> None:
    """config.json says that layer 1 is dense, its quantization_config that it is compressed."""
    folder = write_exact(tmp_path / "exact", write_family(tmp_path / "dense", "qwen3_moe"))
    config = json.loads((folder / "config.json").read_text()) | {"mlp_only_layers": [0, 1]}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="layer 1 of Qwen3MoeDecoderLayer has no experts; restore the original"):
        AutoModelForCausalLM.from_pretrained(folder)


@torch.no_grad()
def test_scope(checkpoint: Path) -> None:
    """Set on the model, or in the configuration that it is made of."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    off = model(TOKENS).logits
    model.d2moe_scope = "token"
    token = model(TOKENS).logits
    assert not torch.allclose(off, token)
    config = AutoConfig.from_pretrained(checkpoint)
    config.quantization_config["pruning"]["scope"] = "token"
    assert torch.equal(AutoModelForCausalLM.from_pretrained(checkpoint, config=config)(TOKENS).logits, token)


@torch.no_grad()
def test_prompts_padded_to_one_length_generate_what_each_does_alone(checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    prompts = ["The for statement is used to iterate over", "A class", "import"]
    together = model.generate(**tokenizer(prompts, return_tensors="pt", padding=True), **settings)[:, -12:]
    for prompt, generated in zip(prompts, together, strict=True):
        alone = model.generate(**tokenizer(prompt, return_tensors="pt"), **settings)[0, -12:]
        assert tokenizer.decode(generated) == tokenizer.decode(alone)


class OldBlock(MixtralSparseMoeBlock):
    """The block of transformers 4 and of much remote code: a ModuleList of experts that it visits itself."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.experts = nn.ModuleList(nn.Linear(config.hidden_size, 1) for _ in range(config.num_local_experts))

    def forward(self, hidden_states: Tensor) -> Tensor:
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights, index = self.gate(rows)
        output = torch.zeros_like(rows)
        for number in range(len(self.experts)):
            token, slot = (index == number).nonzero(as_tuple=True)
            result = self.experts[number](rows[token]) * weights[token, slot, None]
            output.index_add_(0, token, result.to(output.dtype))
        return output.reshape(hidden_states.shape)


class OldMixtral(MixtralForCausalLM):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = OldBlock(config)


@torch.no_grad()
def test_blocks_that_visit_a_list_of_experts(variants: Path) -> None:
    """The other layout of experts modules, by a class of our own: in 5.16 to 5.19 every family's are stacked."""
    model = OldMixtral.from_pretrained(variants)
    assert type(model).__name__ == "D2OldMixtral"
    expected = AutoModelForCausalLM.from_pretrained(variants)(TOKENS).logits
    torch.testing.assert_close(model(TOKENS).logits, expected, rtol=0, atol=1e-4)
    model.d2moe_scope = "token"
    with pytest.raises(ValueError, match="d2moe_scope 'token' needs all experts of a token at once"):
        model(TOKENS)


@pytest.mark.parametrize("trust_remote_code", [True, False])
def test_a_snapshot_in_the_hubs_cache(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trust_remote_code: bool
) -> None:
    """Found by its id, without network; its manifest, which transformers itself would not fetch, is asked for."""
    # transformers keeps the code of a commit in the user's cache: another text is another commit.
    commit = hashlib.sha1((checkpoint / "modeling_d2moe.py").read_bytes()).hexdigest()
    repository = tmp_path / "models--someone--tiny-d2"
    shutil.copytree(checkpoint, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    options = {"cache_dir": tmp_path, "trust_remote_code": trust_remote_code, "local_files_only": True}
    assert AutoModelForCausalLM.from_pretrained("someone/tiny-d2", **options).d2moe_scope == "off"
    (repository / "snapshots" / commit / "d2moe_manifest.json").unlink()
    with pytest.raises(ValueError, match=r"d2moe_manifest.json is missing; copy the whole checkpoint again"):
        AutoModelForCausalLM.from_pretrained("someone/tiny-d2", **options)
