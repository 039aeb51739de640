"""Compress Hugging Face Mixture-of-Experts checkpoints, one layer at a time (the `d2moe` command)."""
