"""`d2moe report`: what a compressed checkpoint is and what it lost, as one page that needs nothing else."""
