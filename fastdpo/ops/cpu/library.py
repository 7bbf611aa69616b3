"""Large dense products, by the fastest library that torch brings: MKL or another BLAS, or oneDNN; of bf16 by the
processor's units for it where MKL has the product with fp32 results, which torch itself does not offer.

csrc/cpu/products.h multiplies what a library does not do well: rows picked by a list, and few of them.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from .. import native


def takes(rows: int, in_bf16: bool = False, own_bf16: bool = False) -> bool:
    """Whether a library multiplies a tile of so many rows and every column faster than csrc: of its time csrc takes 0.5
    to 0.9 from 4 rows to 96, 1.1 to 1.6 outside (Intel Xeon with AVX-512, H of 256 and 1024). In bf16 a library's units
    come first, then csrc's: 0.3 to 0.9 of a library in fp32 from 1 row to 2,048 (AMD EPYC of Zen 4, H of 1024, November
    2026). A forward and its backward have the same answer: other logits in the last bits are other probabilities."""
    return in_bf16 or (not own_bf16 and (rows < 4 or rows >= 96))


def adds(rows: int, in_bf16: bool = False) -> bool:
    """Whether a library that made such a tile also adds its products to gradients: oneDNN does so by a second pass,
    and of few rows csrc takes 0.7 of its time (AMD EPYC, 1 to 3 rows, H of 1024, November 2026)."""
    return in_bf16 or rows >= 4 or not USES_ONEDNN


def takes_bf16_rows(*factors: Tensor) -> bool:
    """Whether csrc can hand rows of them to a library as they lie."""
    return all(
        x.dtype == torch.bfloat16 and x.stride(1) == 1 and x.shape[1] <= x.stride(0) < 2**31 and x.shape[0] < 2**31
        for x in factors
    )


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def _find_onednn() -> bool:
    available = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return "AuthenticAMD" in _cpuinfo() and available and torch.backends.cpu.get_cpu_capability() == "AVX512"


@functools.cache
def has_bf16() -> bool:
    """Whether this torch was built with MKL's cblas_gemm_bf16bf16f32."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    return native.available() and library.exists() and native.EXTENSION.load_bf16_product(str(library))


# MKL keeps to AVX2 on AMD processors, where oneDNN (which torch ships too) uses AVX-512: 190 against 400 GFLOP/s on two
# cores of an AMD EPYC 9005, November 2026. On Intel, and wherever oneDNN is missing, `torch.mm` is the better choice.
USES_ONEDNN = _find_onednn()
# 956 to 1145 GFLOP/s on one core with AMX against 190 in fp32; where MKL emulates the product it gains nothing.
USES_BF16 = "amx_bf16" in _cpuinfo() and has_bf16()
# csrc's products in bf16 by AVX512-BF16, which AMD's processors have from Zen 4 on.
OWN_BF16 = native.available() and native.EXTENSION.isa() == "avx512_bf16"
NAME = "oneDNN" if USES_ONEDNN else "torch.mm"


def matmul(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b.T of matrices [n, k] and [m, k] in any layout, both fp32 or both bf16; out and all sums are fp32."""
    if a.dtype == torch.bfloat16:
        _multiply_bf16(a, b, out, add=False)
    elif USES_ONEDNN:
        out.copy_(_multiply_onednn(a, b))
    else:
        torch.mm(a, b.T, out=out)


def add_matmul(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out += a @ b.T"""
    if a.dtype == torch.bfloat16:
        _multiply_bf16(a, b, out, add=True)
    elif USES_ONEDNN:
        out += _multiply_onednn(a, b)
    else:
        out.addmm_(a, b.T)


def _multiply_onednn(a: Tensor, b: Tensor) -> Tensor:
    # Of a b whose rows or columns are not side by side oneDNN multiplies one number at a time: 1,000 times as long.
    whole = b.is_contiguous() or b.T.is_contiguous()
    return torch.ops.mkldnn._linear_pointwise(a, b if whole else b.contiguous(), None, "none", [], "")


def _multiply_bf16(a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
    if out.dtype != torch.float32 or out.stride(1) != 1:
        raise ValueError(f"out must be fp32 with its columns side by side; got {out.dtype}, strides {out.stride()}")
    a, a_turned = _as_rows(a)
    b, b_turned = _as_rows(b)
    native.EXTENSION.bf16_product(a=a, b=b, out=out, a_turned=a_turned, b_turned=b_turned, add=add)


def _as_rows(x: Tensor) -> tuple[Tensor, bool]:
    """x, or its transpose if its columns lie in memory as rows do, and whether they do; a copy in other layouts."""
    for view, turned in ((x, False), (x.T, True)):
        rows, columns = view.shape
        if view.stride(1) == 1 and (view.stride(0) >= columns or rows == 1):
            return view, turned
    return x.contiguous(), False
