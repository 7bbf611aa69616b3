"""fp32 matrix products on the CPU: one decision, which library multiplies.

MKL keeps to AVX2 on AMD processors, where oneDNN (which torch ships too) uses AVX-512: 190 against 400 GFLOP/s on two
cores of an AMD EPYC 9005, November 2026. On Intel, and wherever oneDNN is missing, `torch.mm` is the better choice.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

# oneDNN compiles a kernel per shape, about a millisecond and 300 KiB each, and every thread keeps its own: row counts
# that vary are padded to a multiple of this, large ones by at most a quarter.
ROW_MULTIPLE = 32


def _find_onednn() -> bool:
    try:
        vendor_is_amd = "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    available = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return vendor_is_amd and available and torch.backends.cpu.get_cpu_capability() == "AVX512"


USES_ONEDNN = _find_onednn()


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b.T of fp32 matrices [n, k] and [m, k] in any layout -> [n, m], in fp32 throughout."""
    # A dispatch mode, such as torch's FlopCounterMode, knows mm and would pass over the oneDNN product.
    if USES_ONEDNN and _get_current_dispatch_mode() is None:
        return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return torch.mm(a, b.T)


def padded_rows(count: int) -> int:
    """The row count to multiply when counts vary from call to call."""
    if not USES_ONEDNN:
        return count
    multiple = max(ROW_MULTIPLE, 1 << count.bit_length() >> 3)
    return -(-count // multiple) * multiple
