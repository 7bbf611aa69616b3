"""logits -> logps on the CPU, for callers that already hold logits: the native folds over their rows.

fp32 logits are read where they are; half types are converted a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...routing import num_blocks
from ...tensors import in_rows
from ..native import EXTENSION
from ..problem import FOLDED

CHUNK_BYTES = 16 << 20
_NO_STATS = dict.fromkeys(FOLDED)


def _chunks(*tensors: Tensor | None) -> Iterator[tuple[Tensor | None, ...]]:
    """The same rows of every tensor, [N, V] logits first, a bounded piece at a time."""
    count, vocab_size = tensors[0].shape
    size = max(1, CHUNK_BYTES // (4 * vocab_size))
    if count <= size:
        yield tensors
        return
    for start in range(0, count, size):
        yield tuple(None if x is None else x[start : start + size] for x in tensors)


def _tile(data: Tensor, temperature: float) -> dict:
    """The fields of csrc's Tile."""
    return {"data": data, "col_start": 0, "bias": None, "transform": (1.0, 0.0, temperature)}


def forward(
    logits: Tensor, labels: Tensor, temperature: float, with_entropy: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """[N, V] logits with unit column stride, [N] labels (< 0: none) -> (logps, lse, entropy or None), fp32 [N]."""
    threads, device = torch.get_num_threads(), logits.device
    count, vocab_size = logits.shape
    logps = torch.empty(count, dtype=torch.float32, device=device)
    lse, entropy = torch.empty_like(logps), torch.empty_like(logps) if with_entropy else None
    for data, label, *outputs in _chunks(logits, labels.contiguous(), logps, lse, entropy):
        n = data.shape[0]
        block_lse = torch.empty(n, num_blocks(vocab_size), dtype=torch.float64, device=device)
        rest_lse = torch.empty(n, dtype=torch.float64, device=device)
        label_logit = torch.full((n,), -torch.inf, dtype=torch.float32, device=device)
        stats = None
        if with_entropy:
            stats = torch.tensor(EXTENSION.NO_ROW_STATS, dtype=torch.float64, device=device).repeat(n, 1)
        EXTENSION.fold(
            **_tile(in_rows(data.float()), temperature),  # the conversion of overlapping rows may permute
            labels=label,
            block_lse=block_lse,
            label_logit=label_logit,
            stats=stats,
            num_threads=threads,
        )
        EXTENSION.sum_blocks(block_lse=block_lse, rest_lse=rest_lse, num_threads=threads)
        EXTENSION.finish(
            num_rows=n,
            vocab_size=vocab_size,
            rest_lse=rest_lse,
            label_logit=label_logit,
            stats=stats,
            **_NO_STATS | dict(zip(("logps", "lse", "entropy"), outputs)),
            num_threads=threads,
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
    no_gradient = coef == 0
    if coef_entropy is None:
        entropy = None
    else:
        coef_entropy = coef_entropy.contiguous()
        no_gradient &= coef_entropy == 0
    in_place = out.dtype == torch.float32 and out.stride(1) == 1
    saved = {
        "labels": labels,
        "lse": lse,
        "logps": logps,
        "coef": coef,
        "entropy": entropy,
        "coef_entropy": coef_entropy,
        "coef_lse": None,
    }
    for source, target, zero, *of_rows in _chunks(logits, out, no_gradient, *saved.values()):
        data = target if in_place else torch.empty(target.shape, dtype=torch.float32, device=out.device)
        if data.data_ptr() != source.data_ptr():
            data.copy_(source)
        rows = dict(zip(saved, of_rows))
        EXTENSION.grad(**_tile(data, temperature), tokens=None, **rows, num_threads=torch.get_num_threads())
        data[zero] = 0  # whatever the logits: 0 * NaN would let a masked row's NaN out
        if not in_place:
            target.copy_(data)
