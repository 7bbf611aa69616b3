"""The CPU engine: library matrix products on tiles of logits, native folds from csrc/cpu between them."""
