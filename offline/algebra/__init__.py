"""Merging, factoring, mixing, pruning: tensors in, tensors out, no files."""
