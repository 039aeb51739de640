"""`d2moe tune`: the fastest tiles of the Triton kernels on a machine's GPU."""
