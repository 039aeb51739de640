"""Settings of config.json that transformers and vLLM read differently (kind F9 of what went wrong in the field)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from compression import d2moe_here
from families import change_config, changed, write_family
from hostile import edit, refused
from small_families import SMALL
from transformers import AutoModelForCausalLM

FEW = ("--ratio", "0.1", "--windows", "4", "--seq-len", "32")


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder, made = tmp_path_factory.mktemp("settings"), dict[str, Path]()

    def get(name: str) -> Path:
        if name not in made:
            made[name] = write_family(folder / name, name)
        return made[name]

    return get


@pytest.mark.parametrize("name", SMALL)
def test_f9_no_model_is_served_as_another(name: str, family: Callable[[str], Path]) -> None:
    folder = family(name)
    config = json.loads((folder / "config.json").read_text())
    assert d2moe_here("plan", folder, "--ratio", "0.1").returncode == 0
    assert SMALL[name].refused
    for changes in SMALL[name].refused:
        (folder / "config.json").write_text(json.dumps(changed(config, changes)))
        done = d2moe_here("plan", folder, "--ratio", "0.1")
        refused(done, "config.json")
        assert any(word in done.stderr for word in (*changes, "rotary", "mscale")), done.stderr
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("mixtral", {"rope_scaling": {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                      "original_max_position_embeddings": 64}}),
        ("mixtral", {"sliding_window": 32, "rope_scaling": {"type": "linear", "factor": 2.0}}),
        ("qwen2_moe", {"sliding_window": 32, "use_sliding_window": False, "layer_types": ["full_attention"] * 3}),
        ("deepseek_v3", {"rope_scaling": {"type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0,
                                          "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1}}),
        ("mimo_v2_flash", {"layer_types": None, "mlp_layer_types": None, "routed_scaling_factor": None,
                           "rope_theta": 5e6, "swa_rope_theta": 1e4, "partial_rotary_factor": 0.334}),
    ],
)  # fmt: skip
def test_f9_what_released_models_say_is_taken(
    name: str, changes: dict[str, Any], family: Callable[[str], Path]
) -> None:
    folder = family(name)
    config = (folder / "config.json").read_text()
    changed = json.loads(config)
    changed.pop("rope_parameters", None)
    (folder / "config.json").write_text(json.dumps({**changed, **changes}))
    done = d2moe_here("plan", folder, "--ratio", "0.1")
    (folder / "config.json").write_text(config)
    assert done.returncode == 0, done.stderr


def test_f9_what_is_nearly_the_same_is_said(family: Callable[[str], Path], tmp_path: Path) -> None:
    """Phi's head: vLLM leaves its bias out; Moonlight's norms; Llama 4's queries far along."""
    phi = shutil.copytree(family("phimoe"), tmp_path / "phi")
    assert "lm_head.bias" not in d2moe_here("plan", phi, *FEW).stderr
    edit(phi, lambda tensors: tensors["lm_head.bias"].fill_(0.5))
    assert "vLLM loads lm_head.bias and leaves it out of its logits" in d2moe_here("plan", phi, *FEW).stderr
    moonlight = shutil.copytree(family("deepseek_v3"), tmp_path / "moonlight")
    change_config(moonlight, rms_norm_eps=1e-5)
    assert "rms_norm_eps 1e-05" in d2moe_here("plan", moonlight, *FEW).stderr
    llama = shutil.copytree(family("llama4_text"), tmp_path / "llama")
    assert "attn_temperature_tuning" not in d2moe_here("plan", llama, *FEW).stderr
    change_config(llama, max_position_embeddings=131072)
    assert "attn_temperature_tuning True is transformers' to read" in d2moe_here("plan", llama, *FEW).stderr


def test_f9_transformers_loads_what_was_taken(family: Callable[[str], Path], few_words: Path, tmp_path: Path) -> None:
    """The result says what the source said."""
    done = d2moe_here("compress", family("granitemoe"), tmp_path / "out", *FEW, "--calibration", few_words)
    assert done.returncode == 0, done.stderr
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert model.config.attention_multiplier == 0.2
