"""logits -> log p of chosen columns, with autograd twice, for the reasons that ../operators.py gives: as a Function,
and as functional torch.library operators.

    fastdpo::selective_log_softmax(logits [N, V], index [N] or [N, K], temperature, with_entropy)
        -> (result, entropy like index, logps, lse, entropy)
    fastdpo::selective_log_softmax_backward(logits, index, logps, lse, entropy, dlogps, dentropy, temperature)
        -> dlogits

`logps` is the result before entries without a column were set to 0 or NaN, the last `entropy` likewise, per row; the
backward reads them and `lse`. Entropies that were not asked for have 0 elements.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..._ops import add_op_namespace_prefix
from ...autograd import Function, apply, no_second_derivative, once_differentiable
from ...tensors import contiguous, in_rows, refuse_transforms, traced
from ..engines import logits_engine

IGNORE_INDEX = -100
NO_LABEL, LEFT_OUT = -1, -2  # in an engine's labels: only the lse is wanted, or nothing (the row need not be read)


def _columns(index: Tensor, vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """(index with LEFT_OUT where there is no column, entries ignored, entries out of range)."""
    ignored = index == IGNORE_INDEX
    invalid = ((index < 0) | (index >= vocab_size)) & ~ignored
    return contiguous(index.masked_fill(ignored | invalid, LEFT_OUT)), ignored, invalid


def forward(
    logits: Tensor, index: Tensor, temperature: float, with_entropy: bool = False
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor | None]:
    """(result like index, entropy like index or None, logps like index, lse [N], entropy [N] or None), fp32 or fp64;
    index is int64."""
    columns, ignored, invalid = _columns(index, logits.shape[1])
    engine_forward, _ = logits_engine(logits.device, logits.dtype)
    rows = in_rows(logits)
    if index.ndim == 1:
        logps, lse, entropy = engine_forward(rows, columns, temperature, with_entropy)
    else:
        none = torch.full(logits.shape[:1], NO_LABEL, dtype=torch.int64, device=logits.device)
        _, lse, entropy = engine_forward(rows, none, temperature, with_entropy)
        logps = logits.gather(1, columns.clamp(min=0)).to(lse.dtype) / temperature - lse[:, None]

    def result(x: Tensor) -> Tensor:
        return x.masked_fill(ignored, 0.0).masked_fill_(invalid, torch.nan)

    of_index = result(_per_index(entropy, index)) if with_entropy else None
    return result(logps), of_index, logps, lse, entropy


def _per_index(x: Tensor, index: Tensor) -> Tensor:
    return x if index.ndim == 1 else x[:, None].expand(index.shape)


def backward(
    logits: Tensor,
    index: Tensor,
    logps: Tensor,
    lse: Tensor,
    entropy: Tensor | None,
    dlogps: Tensor,
    dentropy: Tensor | None,
    temperature: float,
    out: Tensor,
) -> None:
    """dlogits into `out`, which may be `logits`. With K columns, dz = sum_k coef_k * (1[v = k] - p)."""
    columns, _, invalid = _columns(index, logits.shape[1])
    left_out = columns < 0

    # The engines make zeros of a row whose coefs are 0, whatever its logits, and NaN of one with a coef that is NaN.
    def coefs(upstream: Tensor) -> Tensor:
        return upstream.to(lse.dtype).masked_fill(left_out, 0.0).masked_fill_(invalid, torch.nan)

    coef = coefs(dlogps)
    coef_entropy = None if dentropy is None else coefs(dentropy)
    _, engine_backward = logits_engine(logits.device, logits.dtype)
    source = in_rows(logits)
    if index.ndim == 1:
        engine_backward(source, columns, logps, lse, coef, temperature, out, entropy, coef_entropy)
        return
    none = torch.full(logits.shape[:1], NO_LABEL, dtype=torch.int64, device=logits.device)
    of_row = None if coef_entropy is None else coef_entropy.sum(1)
    engine_backward(source, none, torch.zeros_like(lse), lse, coef.sum(1), temperature, out, entropy, of_row)
    # A column named twice gets both coefficients; written, not added, so that it is rounded once.
    total = ((columns[:, :, None] == columns[:, None, :]) * coef[:, None, :]).sum(2)
    p = logps.exp()
    label_dz = total - coef.sum(1, keepdim=True) * p
    if of_row is not None:
        weighted = of_row[:, None] * p * (logps + entropy[:, None])
        label_dz -= torch.where(p > 0, weighted, 0 * p * of_row[:, None])  # 0 * -inf
    label_dz /= temperature
    column = torch.where(left_out, columns.amax(1, keepdim=True).clamp(min=0), columns)
    value = torch.where(left_out, label_dz.gather(1, columns.argmax(1, keepdim=True)), label_dz)
    empty = left_out.all(1, keepdim=True) & ~invalid.any(1, keepdim=True)
    out.scatter_(1, column, value.masked_fill(empty, 0.0).to(out.dtype))


def log_softmax_at(
    logits: Tensor, index: Tensor, temperature: float, with_entropy: bool, inplace_backward: bool
) -> tuple[Tensor, Tensor | None]:
    """(log-probs like index, entropy like index or None), with gradients: the one way into this file."""
    if traced(logits, index) and not (inplace_backward and torch.compiler.is_compiling()):
        return selective_op(logits, index, temperature, with_entropy)[:2]
    return apply(_SelectiveLogSoftmax, logits, index, temperature, with_entropy, inplace_backward)


class _SelectiveLogSoftmax(Function):
    """[N, V] logits and [N] or [N, K] int64 columns."""

    of = "fastdpo.selective_log_softmax"

    @staticmethod
    def forward(ctx, logits, index, temperature, return_entropy, inplace_backward):
        result, of_index, logps, lse, entropy = forward(logits, index, temperature, return_entropy)
        ctx.save_for_backward(logits, index, logps, lse, entropy)
        ctx.temperature, ctx.inplace_backward = temperature, inplace_backward
        ctx.set_materialize_grads(False)  # without a gradient of the entropy its terms are not computed
        return result, of_index

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogps, dentropy):
        saved = ctx.saved_tensors
        logits, logps = saved[0], saved[2]
        dlogits = (
            logits if ctx.inplace_backward else torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        )
        dlogps = torch.zeros_like(logps) if dlogps is None else dlogps
        backward(*saved, dlogps, dentropy, ctx.temperature, dlogits)
        if ctx.inplace_backward:
            torch.autograd.graph.increment_version(logits)
            dlogits = dlogits.detach()
        return dlogits, None, None, None, None


@torch.library.custom_op(add_op_namespace_prefix("selective_log_softmax"), mutates_args=())
def selective_op(
    logits: Tensor, index: Tensor, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    refuse_transforms("fastdpo.selective_log_softmax", logits)
    outputs = forward(logits, index, temperature, with_entropy)
    return tuple(outputs[2].new_empty(0) if x is None else x for x in outputs)


@selective_op.register_fake
def _(logits, index, temperature, with_entropy):
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    rows = logits.shape[:1]
    shapes = (index.shape, index.shape if with_entropy else (0,), index.shape, rows, rows if with_entropy else (0,))
    return tuple(logits.new_empty(shape, dtype=dtype) for shape in shapes)


@torch.library.custom_op(add_op_namespace_prefix("selective_log_softmax_backward"), mutates_args=())
def selective_backward_op(
    logits: Tensor,
    index: Tensor,
    logps: Tensor,
    lse: Tensor,
    entropy: Tensor | None,
    dlogps: Tensor,
    dentropy: Tensor | None,
    temperature: float,
) -> Tensor:
    refuse_transforms("fastdpo.selective_log_softmax", logits, logps, lse, entropy, dlogps, dentropy)
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    backward(logits, index, logps, lse, entropy, dlogps, dentropy, temperature, out)
    return out


@selective_backward_op.register_fake
def _(logits, *_):
    return logits.new_empty(logits.shape)


def _setup_context(ctx, inputs, output):
    logits, index, ctx.temperature, ctx.with_entropy = inputs
    _, _, logps, lse, entropy = output
    ctx.save_for_backward(logits, index, logps, lse, entropy)
    ctx.mark_non_differentiable(*output[2:] if ctx.with_entropy else output[1:])


def _backward(ctx, dresult, dentropy, *_):
    logits, index, logps, lse, entropy = ctx.saved_tensors
    if not ctx.with_entropy:
        entropy = dentropy = None
    gradient = selective_backward_op(logits, index, logps, lse, entropy, dresult, dentropy, ctx.temperature)
    return gradient, None, None, None


selective_op.register_autograd(_backward, setup_context=_setup_context)
selective_backward_op.register_autograd(no_second_derivative)
