"""logits -> log p(label), for trainers that already hold logits: one read forward, one read and write backward.

logp = z[label] - log sum_v exp z[v],  z = logits / temperature        dlogits = coef * (1[label] - p) / temperature
"""

from __future__ import annotations

import torch
from torch import Tensor

from .autograd import apply, once_differentiable
from .ops import logits_engine
from .validation import FLOATS, check_number

IGNORE_INDEX = -100


def selective_log_softmax(
    logits: Tensor,  # [..., V]
    index: Tensor,  # [...] or [..., K]
    *,
    temperature: float = 1.0,
    inplace_backward: bool = False,
) -> Tensor:
    """Log-softmax at chosen columns, without the log-softmax of the others.

    Equivalent to::

        logps = (logits.float() / temperature).log_softmax(-1)
        logps = logps.gather(-1, index[..., None])[..., 0]       # index [...]
        logps = logps.gather(-1, index)                          # index [..., K]

    Args:
        logits: ``[..., V]`` fp32, bf16 or fp16 (fp64 for checking), any strides.
        index: int64 (or int32) columns, ``[...]`` or ``[..., K]``; -100 marks an entry to leave out.
        temperature: divides the logits.
        inplace_backward: write the gradient over the logits' storage instead of allocating it. The logits are gone
            after the backward: their version counter moves, and a later use in autograd raises RuntimeError.

    Returns:
        fp32 (fp64 for fp64 logits), shaped like `index`; 0 where it is -100, NaN where it is out of range.

    Raises:
        ValueError, TypeError: naming the argument and its value.

    Guarantees:
        All arithmetic is fp32 or wider; the gradient is rounded once, to the logits' type, and is exact for confident
        tokens (1 - p from expm1). NaN or Inf in the logits of a row that is left out does not
        reach the result.

    Source: TRL's function of the same name, whose call this accepts.
    """
    for name, x in (("logits", logits), ("index", index)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor; got {type(x).__name__}")
    if logits.dtype not in FLOATS:
        raise TypeError(f"logits must be fp32, bf16, fp16 or fp64; got {logits.dtype}")
    if index.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"index must be int64; got {index.dtype}")
    if index.device != logits.device:
        raise ValueError(f"index is on {index.device} but logits are on {logits.device}")
    if logits.ndim < 1 or logits.shape[-1] == 0:
        raise ValueError(f"logits must be [..., V] with V > 0; got shape {tuple(logits.shape)}")
    if index.shape[: logits.ndim - 1] != logits.shape[:-1] or index.ndim not in (
        logits.ndim - 1,
        logits.ndim,
    ):
        raise ValueError(
            f"index must be shaped {tuple(logits.shape[:-1])}, or that with one more dimension; "
            f"got {tuple(index.shape)}"
        )
    check_number("temperature", temperature, 0, above=True)
    flat_index = index.reshape(-1, index.shape[-1]) if index.ndim == logits.ndim else index.reshape(-1)
    if flat_index.ndim == 2 and flat_index.shape[1] == 1:
        flat_index = flat_index[:, 0]
    if inplace_backward:
        if logits.is_leaf and logits.requires_grad:
            raise ValueError("inplace_backward=True would overwrite logits, which is a leaf that requires grad")
        try:
            flat = logits.view(-1, logits.shape[-1])
        except RuntimeError as error:
            raise ValueError(f"inplace_backward needs logits viewable as [N, V]; strides {logits.stride()}") from error
    else:
        flat = logits.reshape(-1, logits.shape[-1])
    arguments = (flat, flat_index.long(), float(temperature), inplace_backward)
    return apply(_SelectiveLogSoftmax, *arguments).view(index.shape)


class _SelectiveLogSoftmax(torch.autograd.Function):
    """[N, V] logits and [N] or [N, K] columns. With K columns, dz = sum_k coef_k * (1[v = k] - p)."""

    @staticmethod
    def forward(ctx, logits, index, temperature, inplace_backward):
        vocab_size = logits.shape[1]
        ignored = index == IGNORE_INDEX
        invalid = ((index < 0) | (index >= vocab_size)) & ~ignored
        safe = index.masked_fill(ignored | invalid, -1)
        engine_forward, _ = logits_engine(logits.device, logits.dtype)
        rows = logits if logits.stride(1) == 1 else logits.contiguous()
        if index.ndim == 1:
            logps, lse = engine_forward(rows, safe, temperature)
        else:
            none = torch.full(logits.shape[:1], -1, device=logits.device)
            _, lse = engine_forward(rows, none, temperature)
            logps = logits.gather(1, safe.clamp(min=0)).to(lse.dtype) / temperature - lse[:, None]
        result = logps.masked_fill(ignored, 0.0).masked_fill_(invalid, torch.nan)
        ctx.save_for_backward(logits, safe, logps, lse, invalid if invalid.any() else None)
        ctx.temperature, ctx.inplace_backward = temperature, inplace_backward
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogps):
        logits, index, label_logps, lse, invalid = ctx.saved_tensors
        temperature = ctx.temperature
        coef = dlogps.to(lse.dtype).masked_fill(index < 0, 0.0)
        dlogits = (
            logits if ctx.inplace_backward else torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        )
        _, engine_backward = logits_engine(logits.device, logits.dtype)
        source = logits if logits.stride(1) == 1 else logits.contiguous()
        if index.ndim == 1:
            engine_backward(source, index, label_logps, lse, coef, temperature, dlogits)
            silent = index < 0
        else:
            none = torch.full(logits.shape[:1], -1, device=logits.device)
            engine_backward(source, none, torch.zeros_like(lse), lse, coef.sum(1), temperature, dlogits)
            # A column named twice gets both coefficients; written, not added, so that it is rounded once.
            total = ((index[:, :, None] == index[:, None, :]) * coef[:, None, :]).sum(2)
            label_dz = (total - coef.sum(1, keepdim=True) * label_logps.exp()) / temperature
            column = torch.where(index < 0, index.amax(1, keepdim=True).clamp(min=0), index)
            value = torch.where(index < 0, label_dz.gather(1, index.argmax(1, keepdim=True)), label_dz)
            dlogits.scatter_(1, column, value.to(dlogits.dtype))
            silent = (index < 0).all(1)
        if silent.any():  # by assignment: 0 * NaN would let a masked row's NaN out
            dlogits[silent] = 0
        if invalid is not None:
            dlogits[invalid if invalid.ndim == 1 else invalid.any(1)] = torch.nan
        if ctx.inplace_backward:
            torch.autograd.graph.increment_version(logits)
            return dlogits.detach(), None, None, None
        return dlogits, None, None, None
