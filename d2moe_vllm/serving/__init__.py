"""What vLLM calls: the quantization method, its parameters and their loading."""
