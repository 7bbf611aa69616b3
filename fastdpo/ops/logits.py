"""logits -> log p of chosen columns, for plain tensors and as functional torch.library operators.

    fastdpo::selective_log_softmax(logits [N, V], index [N] or [N, K], temperature) -> (result, logps, lse)
    fastdpo::selective_log_softmax_backward(logits, index, logps, lse, dlogps, temperature) -> dlogits

`logps` is the result before entries without a column were set to 0 or NaN; the backward reads it and `lse`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..autograd import NO_SECOND_DERIVATIVE
from . import logits_engine

IGNORE_INDEX = -100
NO_LABEL, LEFT_OUT = -1, -2  # in an engine's labels: only the lse is wanted, or nothing (the row need not be read)


def _columns(index: Tensor, vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """(index with LEFT_OUT where there is no column, entries ignored, entries out of range)."""
    ignored = index == IGNORE_INDEX
    invalid = ((index < 0) | (index >= vocab_size)) & ~ignored
    return index.masked_fill(ignored | invalid, LEFT_OUT), ignored, invalid


def forward(logits: Tensor, index: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """(result like index, logps like index, lse [N]), fp32 or fp64; index is int64."""
    columns, ignored, invalid = _columns(index, logits.shape[1])
    engine_forward, _ = logits_engine(logits.device, logits.dtype)
    rows = logits if logits.stride(1) == 1 else logits.contiguous()
    if index.ndim == 1:
        logps, lse = engine_forward(rows, columns, temperature)
    else:
        none = torch.full(logits.shape[:1], NO_LABEL, device=logits.device)
        _, lse = engine_forward(rows, none, temperature)
        logps = logits.gather(1, columns.clamp(min=0)).to(lse.dtype) / temperature - lse[:, None]
    return logps.masked_fill(ignored, 0.0).masked_fill_(invalid, torch.nan), logps, lse


def backward(
    logits: Tensor, index: Tensor, logps: Tensor, lse: Tensor, dlogps: Tensor, temperature: float, out: Tensor
) -> None:
    """dlogits into `out`, which may be `logits`. With K columns, dz = sum_k coef_k * (1[v = k] - p)."""
    columns, _, invalid = _columns(index, logits.shape[1])
    left_out = columns < 0
    # The engines make zeros of a row whose coef is 0, whatever its logits, and NaN of one whose coef is NaN.
    coef = dlogps.to(lse.dtype).masked_fill(left_out, 0.0).masked_fill_(invalid, torch.nan)
    _, engine_backward = logits_engine(logits.device, logits.dtype)
    source = logits if logits.stride(1) == 1 else logits.contiguous()
    if index.ndim == 1:
        engine_backward(source, columns, logps, lse, coef, temperature, out)
        return
    none = torch.full(logits.shape[:1], NO_LABEL, device=logits.device)
    engine_backward(source, none, torch.zeros_like(lse), lse, coef.sum(1), temperature, out)
    # A column named twice gets both coefficients; written, not added, so that it is rounded once.
    total = ((columns[:, :, None] == columns[:, None, :]) * coef[:, None, :]).sum(2)
    label_dz = (total - coef.sum(1, keepdim=True) * logps.exp()) / temperature
    column = torch.where(left_out, columns.amax(1, keepdim=True).clamp(min=0), columns)
    value = torch.where(left_out, label_dz.gather(1, columns.argmax(1, keepdim=True)), label_dz)
    empty = left_out.all(1, keepdim=True) & ~invalid.any(1, keepdim=True)
    out.scatter_(1, column, value.masked_fill(empty, 0.0).to(out.dtype))


@torch.library.custom_op("fastdpo::selective_log_softmax", mutates_args=())
def selective_op(logits: Tensor, index: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    return forward(logits, index, temperature)


@selective_op.register_fake
def _(logits, index, temperature):
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    result, logps = (logits.new_empty(index.shape, dtype=dtype) for _ in range(2))
    return result, logps, logits.new_empty(logits.shape[0], dtype=dtype)


@torch.library.custom_op("fastdpo::selective_log_softmax_backward", mutates_args=())
def selective_backward_op(
    logits: Tensor, index: Tensor, logps: Tensor, lse: Tensor, dlogps: Tensor, temperature: float
) -> Tensor:
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    backward(logits, index, logps, lse, dlogps, temperature, out)
    return out


@selective_backward_op.register_fake
def _(logits, *_):
    return logits.new_empty(logits.shape)


def _setup_context(ctx, inputs, output):
    logits, index, ctx.temperature = inputs
    _, logps, lse = output
    ctx.save_for_backward(logits, index, logps, lse)
    ctx.mark_non_differentiable(logps, lse)


def _backward(ctx, dresult, *_):
    return selective_backward_op(*ctx.saved_tensors, dresult, ctx.temperature), None, None


def _no_second_derivative(ctx, *_):
    raise RuntimeError(NO_SECOND_DERIVATIVE)


selective_op.register_autograd(_backward, setup_context=_setup_context)
selective_backward_op.register_autograd(_no_second_derivative)
