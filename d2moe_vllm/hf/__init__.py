"""Modeling code for plain transformers, and the form in which it travels inside a checkpoint."""

from __future__ import annotations

from pathlib import Path

MODELING_FILE = "modeling_d2moe.py"
MODEL_CLASSES = {
    "mixtral": "D2MixtralForCausalLM",
}
"""Model family -> class in MODELING_FILE."""

_REFERENCE_IMPORT = "from d2moe_vllm.ops.reference import fused_experts\n"
_FUTURE_IMPORT = "from __future__ import annotations\n"


def auto_map(family: str) -> dict[str, str]:
    """`auto_map` of config.json for a family of MODEL_CLASSES. Raises KeyError for any other."""
    return {"AutoModelForCausalLM": f"{Path(MODELING_FILE).stem}.{MODEL_CLASSES[family]}"}


def checkpoint_modeling_source() -> str:
    """The text of MODELING_FILE as written into checkpoints: one file that needs no d2moe-vllm.

    The layer's arithmetic is ops/reference.py itself, put where the modeling code imports it from.
    """
    here = Path(__file__).parent
    modeling = (here / MODELING_FILE).read_text(encoding="utf-8")
    reference = (here.parent / "ops" / "reference.py").read_text(encoding="utf-8")
    before, found, after = modeling.partition(_REFERENCE_IMPORT)
    _, future, body = reference.partition(_FUTURE_IMPORT)
    if not found or not future:
        raise RuntimeError("modeling_d2moe.py or ops/reference.py changed its imports; mend hf/__init__.py")
    return f"{before}# --- d2moe_vllm/ops/reference.py ---\n{body.strip()}\n\n# --- end ---\n{after}"
