"""logits -> logps on the CPU, for callers that already hold logits: the native folds over their rows.

fp32 logits are read where they are; half types are converted a few rows at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..routing import num_blocks
from .native import extension

CHUNK_BYTES = 16 << 20


def _chunks(logits: Tensor):
    size = max(1, CHUNK_BYTES // (4 * logits.shape[1]))
    for start in range(0, logits.shape[0], size):
        yield slice(start, min(start + size, logits.shape[0]))


def _tile(data: Tensor, temperature: float):
    return extension().Tile(
        data.data_ptr(), data.stride(0), data.shape[0], data.shape[1], 0, 0, 1.0, 0.0, 1.0 / temperature
    )


def forward(logits: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """[N, V] logits with unit column stride, [N] labels (< 0: none) -> (logps, lse), fp32 [N]."""
    native, threads = extension(), torch.get_num_threads()
    count, vocab_size = logits.shape
    blocks = num_blocks(vocab_size)
    logps, lse = torch.empty(count), torch.empty(count)
    for rows in _chunks(logits):
        data = logits[rows].float()
        n = data.shape[0]
        block_lse, label_logit = torch.empty(n, blocks), torch.full((n,), -torch.inf)
        label = labels[rows].contiguous()
        native.fold(
            _tile(data, temperature),
            label.data_ptr(),
            block_lse.data_ptr(),
            blocks,
            label_logit.data_ptr(),
            0,
            threads,
        )
        addresses = (block_lse.data_ptr(), 0, label_logit.data_ptr(), label.data_ptr(), 0)
        outputs = (logps[rows].data_ptr(), lse[rows].data_ptr(), 0, 0, 0, 0)
        native.finish(n, blocks, vocab_size, 0, 0, *addresses, *outputs, 0, 0, 0.0, 0, threads)
    return logps, lse


def backward(
    logits: Tensor, labels: Tensor, logps: Tensor, lse: Tensor, coef: Tensor, temperature: float, out: Tensor
) -> None:
    """dlogits into `out` (which may be `logits`): coef * (1[v = label] - p) / temperature; zeros where coef is 0."""
    native, threads = extension(), torch.get_num_threads()
    labels, coef = labels.contiguous(), coef.contiguous()
    for rows in _chunks(logits):
        in_place = out.dtype == torch.float32 and out.stride(1) == 1
        data = out[rows] if in_place else torch.empty(out[rows].shape)
        if data.data_ptr() != logits[rows].data_ptr():
            data.copy_(logits[rows])
        native.grad(
            _tile(data, temperature),
            labels[rows].data_ptr(),
            lse[rows].data_ptr(),
            logps[rows].data_ptr(),
            coef[rows].data_ptr(),
            0,
            0,
            threads,
        )
        data[coef[rows] == 0] = 0  # whatever the logits: 0 * NaN would let a masked row's NaN out
        if not in_place:
            out[rows] = data.to(out.dtype)
