"""Vocabulary shards: every rank runs the same kernels on its rows of the lm_head; what crosses ranks is per token.

lse = logsumexp over ranks        label's logit = its owner's        dhidden = sum over ranks
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..routing import ONE
from .groups import gather

# The columns of RowStats in csrc/structs.h; those up to the squares leave the label out, and are relative to `max`.
ROW_STATS = ("max", "sum_exp", "sum_exp_z", "sum_exp_sq", "sum_z", "max_before", "max_after")


@dataclass(frozen=True)
class VocabShards:
    """This rank's place among the shards of a vocabulary; `size` 1 means the head is whole."""

    group: object | None
    size: int
    rank: int
    vocab_start: int  # first vocabulary id of this rank
    vocab_size: int  # of all ranks
    widest: int  # columns of the largest shard: what is exchanged in pieces has as many on every rank

    @staticmethod
    def of(group, columns: Sequence[int]) -> VocabShards:
        """`columns`: of every rank's shard, in rank order."""
        import torch.distributed as dist

        rank = dist.get_rank(group)
        return VocabShards(group, len(columns), rank, sum(columns[:rank]), sum(columns), max(columns))

    def _gather(self, x: Tensor) -> Tensor:
        return gather(self.group, x)

    def sum(self, x: Tensor) -> Tensor:
        # gather and add in rank order: an all_reduce may add in another order from run to run
        return self._gather(x).sum(0)

    def max(self, x: Tensor) -> Tensor:
        return self._gather(x).amax(0)

    def logsumexp(self, x: Tensor) -> Tensor:
        return self._gather(x).logsumexp(0)

    def label_logit(self, x: Tensor) -> Tensor:
        """Each token's label logit from the rank that holds it; the others pass -inf."""
        gathered = self._gather(x)
        return torch.where(gathered.isnan().any(0), torch.nan, gathered.amax(0))

    def sum_before(self, x: Tensor) -> Tensor:
        """[...] int64, fixed-point odds: the sum over lower ranks, where a shard's running sum begins."""
        return self._gather(x)[: self.rank].sum(0) % ONE

    def merge_stats(self, stats: Tensor | None) -> Tensor | None:
        """[n, ROW_STATS] of every rank -> of all."""
        if stats is None:
            return None
        top, s, sz, sq, z, before, after = self._gather(stats).unbind(2)
        m = top.amax(0)
        shift = torch.where(top == -torch.inf, torch.zeros_like(top), top - m)
        scale = torch.where(top == -torch.inf, torch.zeros_like(top), (top - m).exp())
        columns = [
            m,
            (scale * s).sum(0),
            (scale * (sz + s * shift)).sum(0),
            (scale**2 * sq).sum(0),
            z.sum(0),
            before.amax(0),
            after.amax(0),
        ]
        return torch.stack(columns, 1).contiguous()

    def sum_of_rows(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """[..., H] of every rank -> their sum, added in rank order, the same bits on each."""
        import torch.distributed as dist

        if self.size == 1 or x.numel() == 0:
            return x.to(dtype)
        rows = x.reshape(-1, x.shape[-1])
        count = -(-rows.shape[0] // self.size)
        rows = torch.nn.functional.pad(rows, (0, 0, 0, count * self.size - rows.shape[0]))
        received = torch.empty_like(rows)
        dist.all_to_all_single(received, rows, group=self.group)
        mine = received.view(self.size, count, -1).sum(0).to(dtype)
        whole = mine.new_empty(self.size, *mine.shape)
        dist.all_gather(list(whole.unbind(0)), mine, group=self.group)
        return whole.view(-1, x.shape[-1])[: x.shape[:-1].numel()].view(x.shape)
