"""Plain transformers models whose experts are a d2moe checkpoint's: shared pruned base, low-rank deltas.

This file travels inside every checkpoint, where it must work without d2moe-vllm installed: its imports of
ours are replaced by those files' source when it is written (see `checkpoint_modeling_source` in families.py),
and the rest imports transformers, torch and safetensors only.
"""

from __future__ import annotations

from typing import Any

import transformers
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from d2moe_vllm.hf.conversion import d2_class
from d2moe_vllm.hf.modeling_deepseek import DeepseekForCausalLM

OWN = ("D2DeepseekForCausalLM", "D2KimiK2ForCausalLM")
"""Of families that transformers lacks."""
WHOLE = ("ForCausalLM", "ForConditionalGeneration")
"""How the names of classes with a head end: of language models, and of multimodal ones."""


def __getattr__(name: str) -> Any:
    """Makes the class that a checkpoint asks for: D2 before the name of a dense class of transformers, or of OWN."""
    if name == "KimiK2Config":
        made = type(name, (transformers.DeepseekV3Config,), {"model_type": "kimi_k2", "__module__": __name__})
        # The modules are DeepSeek-V3's, and so are the names on disk.
        register_checkpoint_conversion_mapping("kimi_k2", get_checkpoint_conversion_mapping("deepseek_v3"), True)
    elif name == "KimiK2ForCausalLM":
        content = {"config_class": __getattr__("KimiK2Config"), "__module__": __name__}
        made = type(name, (transformers.DeepseekV3ForCausalLM,), content)
    elif name == "D2DeepseekForCausalLM":
        made = d2_class(DeepseekForCausalLM)
    elif name == "D2KimiK2ForCausalLM":
        made = d2_class(__getattr__("KimiK2ForCausalLM"))
    elif name.startswith("D2") and name.endswith(WHOLE) and hasattr(transformers, name.removeprefix("D2")):
        made = d2_class(getattr(transformers, name.removeprefix("D2")))
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals().setdefault(name, made)
