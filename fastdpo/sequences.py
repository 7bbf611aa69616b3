"""Where the sequences of a batch lie, and sums over them: per token -> per sequence, chosen before rejected.

Padded batches are `[2B, T]`; packed ones are `[N]` with `cu_seqlens` of 2B + 1 offsets. Sums are fp64, in a
fixed order; what is not a completion token is selected away, never multiplied by zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .autograd import Function, once_differentiable


def wide_dtype(device: torch.device) -> torch.dtype:
    """What sums and losses are computed in; Metal has no fp64."""
    return torch.float32 if device.type == "mps" else torch.float64


def _saturate(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x.to(dtype)`, but what is finite stays finite."""
    limit = torch.finfo(dtype).max
    if limit >= torch.finfo(x.dtype).max:
        return x.to(dtype)
    return torch.where(x.isinf(), x, x.clamp(-limit, limit)).to(dtype)


class Cast(Function):
    """``apply(x, dtype)``; once differentiable, as all losses are."""

    of = "fastdpo.preference_loss"

    @staticmethod
    def forward(ctx, x, dtype):
        ctx.dtype = x.dtype
        return _saturate(x, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return _saturate(dy, ctx.dtype), None


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A conversion in which neither a finite value nor a finite gradient overflows."""
    return x if x.dtype == dtype else Cast.apply(x, dtype)


class Sequences:
    """The completion tokens of 2B sequences; `labels`' shape is the shape of everything per token."""

    def __init__(self, labels: Tensor, ignore_index: int, cu_seqlens: Tensor | None):
        self.mask = labels != ignore_index
        self.num = labels.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.offsets = None
        if cu_seqlens is not None:
            # Offsets on a GPU are not read by the host: bounded here, wrong ones cannot leave the array.
            self.offsets = cu_seqlens.to(labels.device, torch.int64).clamp(0, labels.shape[0])
            if self.num:
                self.offsets = self.offsets.cummax(0).values
        self.counts = self._counts()  # [2B] int64, completion tokens

    def _counts(self) -> Tensor:
        if self.offsets is None:
            return self.mask.sum(1)
        before = torch.cat([self.mask.new_zeros(1, dtype=torch.int64), self.mask.cumsum(0)])[self.offsets]
        return before[1:] - before[:-1]

    def sum(self, per_token: Tensor) -> Tensor:
        """[2B] fp64 sums over the completion tokens; gradients return in the tokens' dtype."""
        values = cast(per_token, wide_dtype(per_token.device)).masked_fill(~self.mask, 0.0)
        if self.offsets is None:
            return values.sum(1)
        # Not a difference of cumulative sums: a NaN would reach every later sequence.
        return torch.segment_reduce(values, "sum", offsets=self.offsets, unsafe=True)

    def mean(self, sums: Tensor) -> Tensor:
        return sums / self.counts.clamp(min=1)

    def within_shared_length(self) -> Tensor:
        """Whether a completion token's place, from 1, is within the shorter of chosen and rejected."""
        half = self.num // 2
        shared = torch.minimum(self.counts[:half], self.counts[half:]).repeat(2)
        if self.offsets is None:
            return self.mask.cumsum(1) <= shared[:, None]
        if not self.num:
            return self.mask
        tokens = torch.arange(self.mask.shape[0], device=self.mask.device)
        owner = torch.searchsorted(self.offsets[1:], tokens, right=True).clamp(max=self.num - 1)
        place = self.mask.cumsum(0)
        start = torch.cat([place.new_zeros(1), place])[self.offsets[:-1]]
        return place - start[owner] <= shared[owner]
