"""Safetensors as a stream, folders, names, progress: knows no method."""
