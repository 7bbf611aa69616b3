"""fp32 matrix products on the CPU: one decision, which library multiplies.

MKL keeps to AVX2 on AMD processors, where oneDNN (which torch ships too) uses AVX-512: 190 against 400 GFLOP/s on two
cores of an AMD EPYC 9005, November 2026. On Intel, and wherever oneDNN is missing, `torch.mm` is the better choice.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

# oneDNN compiles a kernel per shape, about a millisecond each: row counts that vary are padded to a multiple of this.
ROW_MULTIPLE = 32


@functools.cache
def uses_onednn() -> bool:
    try:
        vendor_is_amd = "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    available = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    if not (vendor_is_amd and available and torch.backends.cpu.get_cpu_capability() == "AVX512"):
        return False
    _count_flops()
    return True


def _count_flops() -> None:
    """Teach torch's FlopCounterMode about the oneDNN product, which it would pass over."""
    from torch.utils import flop_counter

    op = torch.ops.mkldnn._linear_pointwise
    if op in flop_counter.flop_registry:
        return

    @flop_counter.register_flop_formula(op)
    def linear_flops(x_shape, w_shape, *args, out_shape=None, **kwargs) -> int:
        rows = 1
        for size in x_shape[:-1]:
            rows *= size
        return 2 * rows * w_shape[0] * w_shape[1]


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b.T of fp32 matrices [n, k] and [m, k] in any layout -> [n, m], in fp32 throughout."""
    if uses_onednn():
        return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return torch.mm(a, b.T)


def padded_rows(count: int) -> int:
    """The row count to multiply when counts vary from call to call."""
    return -(-count // ROW_MULTIPLE) * ROW_MULTIPLE if uses_onednn() else count
