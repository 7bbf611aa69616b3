"""The Triton engine: one tile of logits at a time in registers, fp32; nothing waits for the device."""
