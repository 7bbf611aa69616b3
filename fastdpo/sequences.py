"""Where the sequences of a batch lie, and sums over them: per token -> per sequence, chosen before rejected.

Padded batches are `[2B, T]`; packed ones are `[N]` with `cu_seqlens` of 2B + 1 offsets. Sums are fp64, in a
fixed order; what is not a completion token is selected away, never multiplied by zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .autograd import Function, once_differentiable
from .tensors import traced


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


def check_layout(hidden: Tensor, labels: Tensor, cu_seqlens: Tensor | None, read_offsets: bool) -> None:
    """Raises unless `hidden`, `labels` and `cu_seqlens` hold B chosen and B rejected sequences.

    The values of `cu_seqlens` are read on the CPU, outside torch.compile, or with `read_offsets`, which waits.
    """
    if cu_seqlens is None:
        if hidden.ndim != 3 or labels.shape != hidden.shape[:2]:
            raise ValueError(
                "without cu_seqlens, hidden must be [2B, T, H] and labels [2B, T]; got shapes "
                f"{tuple(hidden.shape)} and {tuple(labels.shape)}"
            )
        if hidden.shape[0] % 2:
            raise ValueError(
                "hidden must hold as many rejected sequences as chosen ones; got an odd number of them, "
                f"{hidden.shape[0]}"
            )
        return
    if hidden.ndim != 2 or labels.shape != hidden.shape[:1]:
        raise ValueError(
            f"with cu_seqlens, hidden must be [N, H] and labels [N]; got shapes {tuple(hidden.shape)} and "
            f"{tuple(labels.shape)}"
        )
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens must be an int32 or int64 tensor; got {cu_seqlens.dtype}")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] % 2 == 0:
        raise ValueError(
            "cu_seqlens must hold 2B + 1 offsets, B chosen sequences and then B rejected ones; got shape "
            f"{tuple(cu_seqlens.shape)}"
        )
    if read_offsets or (cu_seqlens.device.type == "cpu" and not traced(cu_seqlens)):
        _check_offsets(cu_seqlens.tolist(), labels.shape[0])


def _check_offsets(offsets: list[int], count: int) -> None:
    if offsets[0] != 0:
        raise ValueError(f"cu_seqlens must start at 0; got {offsets[0]}")
    if offsets[-1] != count:
        raise ValueError(f"cu_seqlens must end at the number of rows of hidden, {count}; got {offsets[-1]}")
    for i in range(1, len(offsets)):
        if offsets[i] < offsets[i - 1]:
            raise ValueError(f"cu_seqlens must not decrease; got {offsets[i - 1]} then {offsets[i]} at position {i}")


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
        self.counts = self.count(self.mask)  # [2B] int64, completion tokens

    def count(self, mask: Tensor) -> Tensor:
        """[2B] int64: how many tokens of each sequence are in `mask`."""
        if self.offsets is None:
            return mask.sum(1)
        before = torch.cat([mask.new_zeros(1, dtype=torch.int64), mask.cumsum(0)])[self.offsets]
        return before[1:] - before[:-1]

    def sums(self, *per_token: Tensor) -> Tensor:
        """[k, 2B] fp64 sums over the completion tokens; gradients return in the tokens' dtype."""
        return torch.stack([self._sum(x) for x in per_token])

    def sum(self, per_token: Tensor) -> Tensor:
        return self.sums(per_token)[0]

    def _sum(self, per_token: Tensor) -> Tensor:
        values = cast(per_token, wide_dtype(per_token.device)).masked_fill(~self.mask, 0.0)
        if self.offsets is None:
            return values.sum(1)
        # Not a difference of cumulative sums: a NaN would reach every later sequence.
        return torch.segment_reduce(values, "sum", offsets=self.offsets, unsafe=True)

    def whole(self, name: str, per_sequence: Tensor) -> Tensor:
        """[2B], given per sequence: `name` says what, where shards of sequences have to agree on it."""
        return per_sequence

    def mean(self, sums: Tensor) -> Tensor:
        return sums / self.counts.clamp(min=1)

    def owners(self) -> Tensor:
        """Each token's sequence: an index of what is per sequence, whose result broadcasts with the tokens."""
        if self.offsets is None:
            return torch.arange(self.num, device=self.mask.device)[:, None]
        tokens = torch.arange(self.mask.shape[0], device=self.mask.device)
        return torch.searchsorted(self.offsets[1:], tokens, right=True).clamp(max=self.num - 1)

    def places(self) -> Tensor:
        """A completion token's place among those of its sequence, from 1."""
        if self.offsets is None:
            return self.mask.cumsum(1)
        place = self.mask.cumsum(0)
        start = torch.cat([place.new_zeros(1), place])[self.offsets[:-1]]
        return place - start[self.owners()]

    def within_shared_length(self) -> Tensor:
        """Whether a completion token's place is within the shorter of chosen and rejected."""
        if not self.num:
            return self.mask
        half = self.num // 2
        shared = torch.minimum(self.counts[:half], self.counts[half:]).repeat(2)
        return self.places() <= shared[self.owners()]
