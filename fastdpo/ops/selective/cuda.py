"""logits -> logps on a GPU, for callers that already hold logits: csrc/cuda/logits.cu on the current stream.

Logits are read where they are, in their own type: once forward, and once, with one write, backward.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .. import native
from ..native import extension

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # DType in csrc/structs.h


def _launch(name: str, x: Tensor, *arguments) -> None:
    what = f", {x.dtype} logits of shape {tuple(x.shape)}"
    native.launch(name, x.device, *arguments, DTYPES[x.dtype], what=what)


def _splits(logits: Tensor) -> int:
    """Blocks of threads for each row: more than one where rows are too few to fill the GPU."""
    return extension().logits_splits(*logits.shape, _multiprocessors(logits.device))


def _address_on(device: torch.device) -> Callable[..., int]:
    return partial(native.address, device=device.type)


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def forward(
    logits: Tensor, labels: Tensor, temperature: float, with_entropy: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """[N, V] logits with unit column stride, [N] labels -> (logps, lse, entropy or None), fp32 [N].

    A label of -1 gives the lse and the entropy alone; rows with -2 are not read, and get zeros.
    """
    labels, splits = labels.contiguous(), _splits(logits)
    count, address = len(labels), _address_on(logits.device)

    def floats(wanted: bool, *shape: int) -> Tensor | None:
        return torch.empty(shape, dtype=torch.float32, device=logits.device) if wanted else None

    logps, lse, entropy = floats(True, count), floats(True, count), floats(with_entropy, count)
    partials = floats(splits > 1, count, splits, extension().PARTIAL_FLOATS)
    _launch(
        "cuda_logits_forward",
        logits,
        *(address(logits, rows=True), logits.stride(0), *logits.shape),
        *map(address, (labels, logps, lse, entropy)),
        *(1.0 / temperature, splits, address(partials)),
    )
    return logps, lse, entropy


def backward(
    logits: Tensor,
    labels: Tensor,
    logps: Tensor,
    lse: Tensor,
    coef: Tensor,
    temperature: float,
    out: Tensor,
    entropy: Tensor | None = None,
    coef_entropy: Tensor | None = None,
) -> None:
    """dlogits into `out`, which may be `logits`; zeros where the coefs are 0. Formula: csrc/shared/row_formulas.h."""
    labels, coef, address = labels.contiguous(), coef.contiguous(), _address_on(logits.device)
    coef_entropy = None if coef_entropy is None else coef_entropy.contiguous()
    target = out if out.stride(1) == 1 else torch.empty(out.shape, dtype=out.dtype, device=out.device)
    _launch(
        "cuda_logits_backward",
        logits,
        *(address(logits, rows=True), logits.stride(0), *logits.shape),
        *map(address, (labels, logps, lse, coef, None if coef_entropy is None else entropy, coef_entropy)),
        *(address(target, rows=True), target.stride(0), 1.0 / temperature, _splits(logits)),
    )
    if target is not out:
        out.copy_(target)
