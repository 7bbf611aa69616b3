"""Large dense products, by the fastest library that torch brings: MKL or another BLAS, or oneDNN.

csrc/cpu/products.h multiplies what a library does not do well: rows picked by a list, and few of them.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor


def takes(rows: int) -> bool:
    """Whether a library multiplies a tile of so many rows and every column faster than csrc: 0.5 to 0.9 of the time is
    csrc's from 4 rows to 96, 1.1 to 1.6 outside (Intel Xeon with AVX-512, H of 256 and 1024, November 2026)."""
    return rows < 4 or rows >= 96


def _find_onednn() -> bool:
    try:
        vendor_is_amd = "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    available = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return vendor_is_amd and available and torch.backends.cpu.get_cpu_capability() == "AVX512"


# MKL keeps to AVX2 on AMD processors, where oneDNN (which torch ships too) uses AVX-512: 190 against 400 GFLOP/s on two
# cores of an AMD EPYC 9005, November 2026. On Intel, and wherever oneDNN is missing, `torch.mm` is the better choice.
USES_ONEDNN = _find_onednn()
NAME = "oneDNN" if USES_ONEDNN else "torch.mm"


def matmul(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b.T of fp32 matrices [n, k] and [m, k] in any layout, in fp32 throughout."""
    if USES_ONEDNN:
        out.copy_(torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""))
    else:
        torch.mm(a, b.T, out=out)


def add_matmul(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out += a @ b.T"""
    if USES_ONEDNN:
        out += torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    else:
        out.addmm_(a, b.T)
