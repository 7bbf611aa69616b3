"""What a step costs, by counting: time on a GPU (gpus, kernels, steps, peers, live), memory (memory)."""
