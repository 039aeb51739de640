"""The compressed checkpoint: put together, written, exported, verified, inspected."""
