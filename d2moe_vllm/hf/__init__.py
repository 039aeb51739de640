"""Compressed checkpoints in plain transformers. Importing this registers them: from_pretrained loads them then."""

from __future__ import annotations

from d2moe_vllm.hf.quantizer import register

register()
