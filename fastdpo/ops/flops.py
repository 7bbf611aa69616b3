"""What the head's operators cost, for torch's FlopCounterMode: it counts an operator whose kernels it cannot see by a
formula. (Where it can see matrix products, as in the cpu engine, it counts those.)
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from .._ops import ops
from ..routing import BLOCK, num_blocks, unpack_bits
from ..tensors import traced


def _scored(labels: Tensor, ignore_index: int) -> int:
    """Completion tokens; all rows where only shapes are known."""
    if traced(labels):
        return labels.shape[0]
    return int((labels != ignore_index).view(labels.shape[0], -1).any(1).sum())


def _forward_flops(hidden, weight, bias, lora_a, lora_b, labels, seed, *, ignore_index, **_) -> int:
    return 2 * _scored(labels, ignore_index) * weight.numel()


def _backward_flops(hidden, weight, bias, lora_a, lora_b, labels, *rest, ignore_index, needs, **_) -> int:
    _, _, _, bitmap, _, _, _, dentropy, _ = rest
    dhidden, dweight = needs[0] or needs[3], needs[1] or needs[2] or needs[4]
    products = 1 + dhidden + dweight  # one to recompute the logits
    if bitmap is None or dentropy is not None or traced(bitmap):
        return 2 * products * _scored(labels, ignore_index) * weight.numel()
    pairs = int(unpack_bits(bitmap, num_blocks(weight.shape[0])).sum())
    return 2 * products * pairs * BLOCK * weight.shape[1]


FORMULAS = {"linear_token_stats": _forward_flops, "linear_token_stats_backward": _backward_flops}


def register() -> None:
    """Gives torch's table, and the counters that copied it before, the two formulas.

    Called where a counter may be on, not at import: torch.utils.flop_counter imports Triton.
    """
    torch_flops = sys.modules.get("torch.utils.flop_counter")
    if torch_flops is None or torch.compiler.is_compiling():
        return
    tables = [torch_flops.flop_registry]
    for mode in _get_current_dispatch_mode_stack():
        tables.append(getattr(getattr(mode, "counter", None), "flop_registry", {}))
    for name, formula in FORMULAS.items():
        operator = getattr(ops, name)
        if operator not in tables[0]:
            torch_flops.register_flop_formula(operator, get_raw=True)(formula)
        for table in tables[1:]:
            table.setdefault(operator, formula)
