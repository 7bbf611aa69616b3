"""The namespace of our torch.library operators. Each build for Hugging Face's Hub has another, in a `_ops` of its own
(tools/hub_kernel.py), so that several can be loaded beside this package."""

import torch

_OPS_NAME = "fastdpo"
ops = getattr(torch.ops, _OPS_NAME)


def add_op_namespace_prefix(op_name: str) -> str:
    """The operator's full name."""
    return f"{_OPS_NAME}::{op_name}"
