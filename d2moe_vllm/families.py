"""The model families in plain transformers: names, configurations, and the modeling file inside checkpoints.

Importing this imports neither torch nor transformers; d2moe_vllm.hf, where the modeling code is, imports both.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

MODELING_FILE = "modeling_d2moe.py"
OWN_CLASSES = {"deepseek": "Deepseek", "kimi_k2": "KimiK2"}
"""Family that transformers has none of -> what the names of its classes in MODELING_FILE begin with."""

_PACKAGE = Path(__file__).parent
_INLINED = (
    "hf/conversion.py",
    "hf/checks.py",
    "hf/experts.py",
    "hf/modeling_deepseek.py",
    "configuration_deepseek.py",
    "ops/reference.py",
    "ops/weights.py",
    "ops/packing.py",
    "format/kinds.py",
)
"""Our own files whose source takes the place of the modeling code's imports of them, importers first."""


def auto_map(family: str) -> dict[str, str]:
    """`auto_map` of config.json: D2 and the dense class's name. Raises KeyError for a family that has no such class.

    A multimodal model's class is found as a causal language model too.
    """
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    if own := OWN_CLASSES.get(family):
        classes = {"AutoModelForCausalLM": f"D2{own}ForCausalLM", "AutoConfig": f"{own}Config"}
    elif whole := MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(family):
        classes = dict.fromkeys(("AutoModelForCausalLM", "AutoModelForImageTextToText"), f"D2{whole}")
    else:
        classes = {"AutoModelForCausalLM": f"D2{MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]}"}
    return {auto: f"{Path(MODELING_FILE).stem}.{name}" for auto, name in classes.items()}


def checkpoint_modeling_source() -> str:
    """The text of MODELING_FILE as written into checkpoints: one file that needs no d2moe-vllm.

    The layer's arithmetic is ops/reference.py itself, put where the modeling code imports it from.
    """
    source = (_PACKAGE / "hf" / MODELING_FILE).read_text(encoding="utf-8")
    for file in _INLINED:
        module = file.removesuffix(".py").replace("/", ".")
        statement = re.compile(rf"^from d2moe_vllm\.{re.escape(module)} import (\([^)]*\)|.*)\n", re.MULTILINE)
        # The file's own docstring and __future__ import cannot stand in the middle of another.
        body = (_PACKAGE / file).read_text(encoding="utf-8").partition("from __future__ import annotations\n")[2]
        found = statement.search(source)
        if not body or not found:
            raise RuntimeError(f"{file} or its import is not as expected; mend families.py")
        inlined = f"# --- d2moe_vllm/{file} ---\n{body.strip()}\n\n# --- end of {file} ---\n"
        # Where several files import it, the first has it.
        before, _, after = source.partition(found[0])
        source = before + inlined + statement.sub("", after)
    if match := re.search("^from d2moe_vllm.*", source, re.MULTILINE):
        raise RuntimeError(f"{match[0]!r} would travel with checkpoints; mend families.py")
    return source


def register_configs() -> None:
    """Makes transformers' AutoConfig know the families that neither it nor vLLM knows: DeepSeek v1."""
    from transformers import AutoConfig

    from d2moe_vllm.configuration_deepseek import DeepseekConfig

    AutoConfig.register(DeepseekConfig.model_type, DeepseekConfig, exist_ok=True)


def stock_config_class(model_type: str) -> Any:
    """transformers' configuration of a dense model, ours where it has none. Raises KeyError."""
    from transformers import CONFIG_MAPPING

    from d2moe_vllm.configuration_deepseek import DeepseekConfig

    return DeepseekConfig if model_type == DeepseekConfig.model_type else CONFIG_MAPPING[model_type]


def stock_model_class(config: Any) -> Any:
    """The dense causal language model of a configuration, a multimodal one's whole class. Raises KeyError."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    from d2moe_vllm.hf.modeling_deepseek import DeepseekForCausalLM

    ours = isinstance(config, DeepseekForCausalLM.config_class)
    if ours:
        return DeepseekForCausalLM
    multimodal = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING if multimodal else MODEL_FOR_CAUSAL_LM_MAPPING)[type(config)]
