"""The working folder and its typed parts, activations, statistics, processes."""
