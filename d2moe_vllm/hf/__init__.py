"""Modeling code for plain transformers, and the form in which it travels inside a checkpoint."""

from __future__ import annotations

from pathlib import Path

MODELING_FILE = "modeling_d2moe.py"
MODEL_CLASSES = {
    "mixtral": "D2MixtralForCausalLM",
}
"""Model family -> class in MODELING_FILE."""

_PACKAGE = Path(__file__).parent.parent
_INLINED = {
    "from d2moe_vllm.hf.experts import INDEX_KINDS, D2Experts, projection_shapes\n": "hf/experts.py",
    "from d2moe_vllm.ops.reference import Weights, fused_experts\n": "ops/reference.py",
}
"""Our own imports in the modeling code -> the file whose source takes their place."""


def auto_map(family: str) -> dict[str, str]:
    """`auto_map` of config.json for a family of MODEL_CLASSES. Raises KeyError for any other."""
    return {"AutoModelForCausalLM": f"{Path(MODELING_FILE).stem}.{MODEL_CLASSES[family]}"}


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


def register_stock_classes() -> None:
    """Makes transformers know the families that it has no classes of: DeepSeek v1."""
