"""logits -> logps on the CPU, for callers that already hold logits: the native folds over their rows.

fp32 logits are read where they are; half types are converted a few rows at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...head import LogitTransform
from ...routing import num_blocks
from ...tensors import in_rows
from ..native import EXTENSION
from ..problem import STATS

CHUNK_BYTES = 16 << 20


def _chunks(logits: Tensor):
    size = max(1, CHUNK_BYTES // (4 * logits.shape[1]))
    for start in range(0, logits.shape[0], size):
        yield slice(start, min(start + size, logits.shape[0]))


def _tile(data: Tensor, temperature: float) -> dict:
    """The fields of csrc's Tile."""
    return {"data": data, "col_start": 0, "bias": None, "transform": LogitTransform(temperature=temperature)}


def forward(
    logits: Tensor, labels: Tensor, temperature: float, with_entropy: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """[N, V] logits with unit column stride, [N] labels (< 0: none) -> (logps, lse, entropy or None), fp32 [N]."""
    threads = torch.get_num_threads()
    count, vocab_size = logits.shape
    fp32 = {"dtype": torch.float32, "device": logits.device}
    logps, lse = torch.empty(count, **fp32), torch.empty(count, **fp32)
    entropy = torch.empty(count, **fp32) if with_entropy else None
    for rows in _chunks(logits):
        data = in_rows(logits[rows].float())  # the conversion of overlapping rows may permute
        n = data.shape[0]
        block_lse = torch.empty(n, num_blocks(vocab_size), dtype=torch.float64, device=logits.device)
        rest_lse, label_logit = block_lse.new_empty(n), torch.full((n,), -torch.inf, **fp32)
        stats = None
        if with_entropy:
            stats = torch.tensor(EXTENSION.NO_ROW_STATS, dtype=torch.float64, device=logits.device).repeat(n, 1)
        EXTENSION.fold(
            **_tile(data, temperature),
            labels=labels[rows].contiguous(),
            block_lse=block_lse,
            label_logit=label_logit,
            stats=stats,
            num_threads=threads,
        )
        EXTENSION.sum_blocks(block_lse=block_lse, rest_lse=rest_lse, num_threads=threads)
        wanted = {**dict.fromkeys(STATS), "entropy": None if entropy is None else entropy[rows]}
        EXTENSION.finish(
            num_rows=n,
            vocab_size=vocab_size,
            rest_lse=rest_lse,
            label_logit=label_logit,
            stats=stats,
            logps=logps[rows],
            lse=lse[rows],
            **wanted,
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
    if coef_entropy is not None:
        coef_entropy = coef_entropy.contiguous()
        no_gradient &= coef_entropy == 0
    for rows in _chunks(logits):
        in_place = out.dtype == torch.float32 and out.stride(1) == 1
        data = out[rows] if in_place else torch.empty(out[rows].shape, dtype=torch.float32, device=out.device)
        if data.data_ptr() != logits[rows].data_ptr():
            data.copy_(logits[rows])
        EXTENSION.grad(
            **_tile(data, temperature),
            tokens=None,
            labels=labels[rows],
            lse=lse[rows],
            logps=logps[rows],
            coef=coef[rows],
            entropy=None if coef_entropy is None else entropy[rows],
            coef_entropy=None if coef_entropy is None else coef_entropy[rows],
            num_threads=torch.get_num_threads(),
        )
        data[no_gradient[rows]] = 0  # whatever the logits: 0 * NaN would let a masked row's NaN out
        if not in_place:
            out[rows] = data.to(out.dtype)
