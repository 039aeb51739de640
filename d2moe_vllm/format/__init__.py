"""The d2moe checkpoint format: what a layer may store, and what a folder must hold. Knows no vLLM."""
