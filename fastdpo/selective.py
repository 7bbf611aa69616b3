"""logits -> log p(label), for trainers that already hold logits: one read forward, one read and write backward.

logp = z[label] - log sum_v exp z[v],  z = logits / temperature        entropy = -sum_v p log p
dlogits = (coef * (1[label] - p) - coef_entropy * p * (log p + entropy)) / temperature
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from .ops.selective.operators import log_softmax_at
from .tensors import plain, refuse_transforms
from .validation import FLOATS, check_flag, check_number


@overload
def selective_log_softmax(
    logits: Tensor,
    index: Tensor,
    *,
    temperature: float = ...,
    inplace_backward: bool = ...,
    return_entropy: Literal[False] = ...,
) -> Tensor: ...


@overload
def selective_log_softmax(
    logits: Tensor,
    index: Tensor,
    *,
    temperature: float = ...,
    inplace_backward: bool = ...,
    return_entropy: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def selective_log_softmax(
    logits: Tensor,  # [..., V]
    index: Tensor,  # [...] or [..., K]
    *,
    temperature: float = 1.0,
    inplace_backward: bool = False,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-softmax at chosen columns, without the log-softmax of the others.

    Equivalent to::

        logps = (logits.float() / temperature).log_softmax(-1)
        logps = logps.gather(-1, index[..., None])[..., 0]       # index [...]
        logps = logps.gather(-1, index)                          # index [..., K]
        entropy = -(logps.exp() * logps).sum(-1)                 # of the first line's logps

    Args:
        logits: ``[..., V]`` fp32, bf16 or fp16 (fp64 for checking), any strides.
        index: int64 (or int32) columns, ``[...]`` or ``[..., K]``; -100 marks an entry to leave out.
        temperature: divides the logits.
        inplace_backward: write the gradient over the logits' storage instead of allocating it. The logits are gone
            after the backward: their version counter moves, and a later use in autograd raises RuntimeError.
            torch.compile breaks its graph here.
        return_entropy: also return the entropy, in nats, of each row's distribution at this temperature, from the same
            read of the logits; it has a gradient too, from the same backward.

    Returns:
        fp32 (fp64 for fp64 logits), shaped like `index`; 0 where it is -100, NaN where it is out of range. With
        `return_entropy` a pair, (logps, entropy), both as described; with K columns a row's entropy stands at each.

    Raises:
        ValueError, TypeError: naming the argument and its value.
        RuntimeError: a CUDA kernel could not be launched; with CUDA's own error, the device, type and shape.

    Guarantees:
        All arithmetic is fp32 or wider; the gradient is rounded once, to the logits' type, and is exact for confident
        tokens (1 - p from expm1). Columns masked with -inf have p = 0 and no share in the entropy. NaN or Inf in one
        row stays there, and in a row that is left out it does not reach the result.

    Source: TRL's function of the same name, whose call this accepts.
    """
    refuse_transforms("fastdpo.selective_log_softmax", logits)
    logits, index = plain("logits", logits), plain("index", index)
    if logits.dtype not in FLOATS:
        raise TypeError(f"logits must be fp32, bf16, fp16 or fp64; got {logits.dtype}")
    if index.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"index must be int64 or int32; got {index.dtype}")
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
    temperature = check_number("temperature", temperature, 0, above=True)
    inplace_backward = check_flag("inplace_backward", inplace_backward)
    return_entropy = check_flag("return_entropy", return_entropy)
    flat_index = index.reshape(-1, index.shape[-1]) if index.ndim == logits.ndim else index.reshape(-1)
    if flat_index.ndim == 2 and flat_index.shape[1] == 1:
        flat_index = flat_index[:, 0]
    if inplace_backward:
        if logits.is_leaf and logits.requires_grad:
            raise ValueError("inplace_backward=True would overwrite logits, which is a leaf that requires grad")
        if logits.is_neg() or _overlaps(logits):
            raise ValueError(f"inplace_backward needs memory for each of the logits; strides {logits.stride()}")
        try:
            flat = logits.view(-1, logits.shape[-1])
        except RuntimeError as error:
            raise ValueError(f"inplace_backward needs logits viewable as [N, V]; strides {logits.stride()}") from error
    else:
        flat = logits.reshape(-1, logits.shape[-1])
    logps, entropy = log_softmax_at(flat, flat_index.long(), temperature, return_entropy, inplace_backward)
    logps = logps.view(index.shape)
    return (logps, entropy.view(index.shape)) if return_entropy else logps


def _overlaps(x: Tensor) -> bool:
    """Whether elements of `x` may share memory, as those of an expanded tensor do."""
    reach = 0
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride(), x.shape) if size > 1):
        if stride <= reach and x.numel():
            return True
        reach += stride * (size - 1)
    return False
