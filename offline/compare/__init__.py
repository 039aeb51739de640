"""`d2moe compare`: methods and baselines beside one another."""
