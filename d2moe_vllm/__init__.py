"""vLLM plugin that serves d2moe checkpoints: shared pruned base, low-rank delta per expert."""

__version__ = "0.1.0"
