"""Modeling code for plain transformers, and the form in which it travels inside a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

MODELING_FILE = "modeling_d2moe.py"
MODEL_CLASSES = {
    "mixtral": "D2MixtralForCausalLM",
    "phimoe": "D2PhimoeForCausalLM",
    "qwen2_moe": "D2Qwen2MoeForCausalLM",
    "qwen3_moe": "D2Qwen3MoeForCausalLM",
    "olmoe": "D2OlmoeForCausalLM",
    "deepseek": "D2DeepseekForCausalLM",
    "deepseek_v2": "D2DeepseekV2ForCausalLM",
    "deepseek_v3": "D2DeepseekV3ForCausalLM",
    "kimi_k2": "D2KimiK2ForCausalLM",
    "granitemoe": "D2GraniteMoeForCausalLM",
}
"""Model family -> class in MODELING_FILE."""
CONFIG_CLASSES = {
    "deepseek": "DeepseekConfig",
    "kimi_k2": "KimiK2Config",
}
"""Family that transformers has no configuration of -> class in MODELING_FILE."""

_PACKAGE = Path(__file__).parent.parent
_INLINED = {
    "from d2moe_vllm.hf.experts import INDEX_KINDS, D2Experts, projection_shapes\n": "hf/experts.py",
    "from d2moe_vllm.hf.modeling_deepseek import DeepseekForCausalLM\n": "hf/modeling_deepseek.py",
    "from d2moe_vllm.hf.configuration_deepseek import DeepseekConfig\n": "hf/configuration_deepseek.py",
    "from d2moe_vllm.ops.reference import Weights, fused_experts\n": "ops/reference.py",
}
"""Our own imports in the modeling code -> the file whose source takes their place."""


def auto_map(family: str) -> dict[str, str]:
    """`auto_map` of config.json for a family of MODEL_CLASSES. Raises KeyError for any other."""
    classes = {"AutoModelForCausalLM": MODEL_CLASSES[family]}
    if family in CONFIG_CLASSES:
        classes["AutoConfig"] = CONFIG_CLASSES[family]
    return {auto: f"{Path(MODELING_FILE).stem}.{name}" for auto, name in classes.items()}


def checkpoint_modeling_source() -> str:
    """The text of MODELING_FILE as written into checkpoints: one file that needs no d2moe-vllm.

    The layer's arithmetic is ops/reference.py itself, put where the modeling code imports it from.
    """
    source = (_PACKAGE / "hf" / MODELING_FILE).read_text(encoding="utf-8")
    for statement, file in _INLINED.items():
        # The file's own docstring and __future__ import cannot stand in the middle of another.
        body = (_PACKAGE / file).read_text(encoding="utf-8").partition("from __future__ import annotations\n")[2]
        if statement not in source or not body:
            raise RuntimeError(f"{statement!r} or {file} is not as expected; mend hf/__init__.py")
        source = source.replace(statement, f"# --- d2moe_vllm/{file} ---\n{body.strip()}\n\n# --- end of {file} ---\n")
    return source


def register_configs() -> None:
    """Makes transformers' AutoConfig know the families that neither it nor vLLM knows: DeepSeek v1."""
    from transformers import AutoConfig

    from d2moe_vllm.hf.configuration_deepseek import DeepseekConfig

    AutoConfig.register(DeepseekConfig.model_type, DeepseekConfig, exist_ok=True)


def stock_config_class(model_type: str) -> Any:
    """transformers' configuration of a dense model, ours where it has none. Raises KeyError."""
    from transformers import CONFIG_MAPPING

    from d2moe_vllm.hf.configuration_deepseek import DeepseekConfig

    return DeepseekConfig if model_type == DeepseekConfig.model_type else CONFIG_MAPPING[model_type]


def stock_model_class(config: Any) -> Any:
    """The dense causal language model of a configuration. Raises KeyError.

    Ours is not put among transformers' Auto classes, which would then prefer it to a compressed checkpoint's own.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    from d2moe_vllm.hf.modeling_deepseek import DeepseekForCausalLM

    ours = isinstance(config, DeepseekForCausalLM.config_class)
    return DeepseekForCausalLM if ours else MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
