"""logits -> logps on a GPU, for callers that already hold logits: csrc/cuda/logits.cu on the current stream.

Logits are read where they are, in their own type: once forward, and once, with one write, backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native


def _launch(name: str, logits: Tensor, **fields) -> None:
    what = f", {logits.dtype} logits of shape {tuple(logits.shape)}"
    native.launch(name, logits.device, what=what, logits=logits, **fields)


def _splits(logits: Tensor) -> int:
    """Blocks of threads for each row: more than one where rows are too few to fill the GPU."""
    return native.EXTENSION.logits_splits(*logits.shape, _multiprocessors(logits.device))


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def forward(
    logits: Tensor, labels: Tensor, temperature: float, with_entropy: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """[N, V] logits with unit column stride, [N] labels -> (logps, lse, entropy or None), fp32 [N].

    A label of -1 gives the lse and the entropy alone; rows with -2 are not read, and get zeros.
    """
    labels, splits = labels.contiguous(), _splits(logits)
    count = len(labels)

    def floats(wanted: bool, *shape: int) -> Tensor | None:
        return torch.empty(shape, dtype=torch.float32, device=logits.device) if wanted else None

    logps, lse, entropy = floats(True, count), floats(True, count), floats(with_entropy, count)
    partials = floats(splits > 1, count, splits, native.EXTENSION.PARTIAL_FLOATS)
    _launch(
        "cuda_logits_forward",
        logits,
        labels=labels,
        logps=logps,
        lse=lse,
        entropy=entropy,
        inv_temperature=1.0 / temperature,
        splits=splits,
        partials=partials,
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
    labels, coef = labels.contiguous(), coef.contiguous()
    coef_entropy = None if coef_entropy is None else coef_entropy.contiguous()
    target = out if out.stride(1) == 1 else torch.empty(out.shape, dtype=out.dtype, device=out.device)
    _launch(
        "cuda_logits_backward",
        logits,
        labels=labels,
        logps=logps,
        lse=lse,
        coef=coef,
        entropy=None if coef_entropy is None else entropy,
        coef_entropy=coef_entropy,
        dlogits=target,
        inv_temperature=1.0 / temperature,
        splits=_splits(logits),
    )
    if target is not out:
        out.copy_(target)
