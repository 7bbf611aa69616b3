"""logits -> logps on a GPU, for callers that already hold logits: csrc/logits.cu on the current stream.

Logits are read where they are, in their own type: once forward, and once, with one write, backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import native

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # DType in csrc/launch.h


def _launch(name: str, x: Tensor, *arguments) -> None:
    what = f", {x.dtype} logits of shape {tuple(x.shape)}"
    native.launch(name, x.device, *arguments, DTYPES[x.dtype], what=what)


def forward(logits: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """[N, V] logits with unit column stride, [N] labels -> (logps, lse), fp32 [N].

    A label of -1 gives the lse alone; rows with -2 are not read, and get zeros.
    """
    count, vocab_size = logits.shape
    labels = labels.contiguous()
    logps, lse = (torch.empty(count, dtype=torch.float32, device=logits.device) for _ in range(2))
    _launch(
        "cuda_logits_forward",
        logits,
        *(logits.data_ptr(), logits.stride(0), count, vocab_size),
        *(labels.data_ptr(), logps.data_ptr(), lse.data_ptr(), 1.0 / temperature),
    )
    return logps, lse


def backward(
    logits: Tensor, labels: Tensor, logps: Tensor, lse: Tensor, coef: Tensor, temperature: float, out: Tensor
) -> None:
    """dlogits into `out` (which may be `logits`): coef * (1[v = label] - p) / temperature; zeros where coef is 0."""
    labels, coef = labels.contiguous(), coef.contiguous()
    target = out if out.stride(1) == 1 else torch.empty(out.shape, dtype=out.dtype, device=out.device)
    _launch(
        "cuda_logits_backward",
        logits,
        *(logits.data_ptr(), logits.stride(0), *logits.shape),
        *(labels.data_ptr(), logps.data_ptr(), lse.data_ptr(), coef.data_ptr()),
        *(target.data_ptr(), target.stride(0), 1.0 / temperature),
    )
    if target is not out:
        out.copy_(target)
