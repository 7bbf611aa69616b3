"""The CPU engine: library matrix products on tiles of logits, native folds from csrc/ between them.

Neither the [N, V] logits nor an fp32 copy of `hidden`, `weight` or their gradients exists. Logits are fp32 before the
log-sum-exp whatever the input type.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..routing import BLOCK, Routing, num_blocks, set_bytes
from .cpu_backward import backward
from .cpu_operands import Operands
from .native import address, extension
from .problem import Forward, Head, Tokens

__all__ = ["backward", "forward"]


def forward(
    head: Head,
    tokens: Tokens,
    *,
    stats: frozenset[str] = frozenset(),
    routing: Routing | None = None,
    shards=None,
) -> Forward:
    ops = Operands(head, tokens)
    native, threads = ops.native, ops.threads
    count, blocks = len(tokens), num_blocks(ops.vocab_size)
    out = Forward(
        logps=torch.empty(count),
        lse=torch.empty(count),
        entropy=torch.empty(count) if "entropy" in stats else None,
        mean_logit=torch.empty(count) if "mean_logit" in stats else None,
        is_top1=torch.empty(count, dtype=torch.bool) if "is_top1" in stats else None,
        log_sum_sq_probs=torch.empty(count) if "log_sum_sq_probs" in stats else None,
        bitmap=None if routing is None else torch.empty(count, routing.bitmap_bytes(blocks), dtype=torch.uint8),
        most_pairs=None if routing is None else torch.empty(count, dtype=torch.int32),
    )
    size = ops.chunk_rows(8 * blocks)
    for start in range(0, count, size):
        stop = min(start + size, count)
        n = stop - start
        hidden = ops.hidden(start, stop)
        rank = ops.rank(hidden)
        labels = tokens.labels[start:stop]
        block_lse = torch.empty(n, blocks, dtype=torch.float64)
        label_logit = torch.full((n,), -torch.inf)
        row_stats = None
        if stats:
            row_stats = torch.empty(n, native.ROW_STATS_BYTES // 8, dtype=torch.float64)
            native.init_stats(row_stats.data_ptr(), n)
        cols = ops.slab_cols(n)
        for first in range(0, ops.vocab_size, cols):
            last = min(first + cols, ops.vocab_size)
            tile = ops.products(hidden, rank, ops.weight(first, last), first)
            native.fold(
                ops.tile(tile, n, first),
                labels.data_ptr(),
                block_lse.data_ptr() + 8 * (first // BLOCK),
                blocks,
                label_logit.data_ptr(),
                address(row_stats),
                threads,
            )
            del tile  # before the next product allocates its own
        rest_lse, vocab_size = torch.empty(n, dtype=torch.float64), ops.vocab_size
        native.sum_blocks(block_lse.data_ptr(), n, blocks, rest_lse.data_ptr(), threads)
        if shards is not None:
            label_logit, rest_lse = shards.label_logit(label_logit), shards.logsumexp(rest_lse)
            row_stats = shards.merge_stats(row_stats)
            vocab_size = shards.vocab_size

        def part(x: Tensor | None, start=start, stop=stop) -> int:
            return address(None if x is None else x[start:stop])

        native.finish(
            n,
            vocab_size,
            rest_lse.data_ptr(),
            label_logit.data_ptr(),
            address(row_stats),
            part(out.logps),
            part(out.lse),
            part(out.entropy),
            part(out.mean_logit),
            part(out.is_top1),
            part(out.log_sum_sq_probs),
            threads,
        )
        if routing is not None:
            _route(block_lse, rest_lse, labels, routing, out, start, shards, threads)
    return out


def _route(
    block_lse: Tensor,
    rest_lse: Tensor,
    labels: Tensor,
    routing: Routing,
    out: Forward,
    start: int,
    shards,
    threads: int,
) -> None:
    """The kept pairs of tokens from `start` on. A shard goes through its blocks once more for each set of pairs, after
    the ranks have exchanged the odds that come before theirs."""
    n, blocks = block_lse.shape
    bitmap, second = out.bitmap[start : start + n], routing.second_tau
    before = sums = None
    if shards is not None:
        before, sums = torch.zeros(2, n, dtype=torch.int64), torch.zeros(2, n, dtype=torch.int64)
    for known in range(1 if shards is None else 2 if second is None else 3):
        if known:
            before[known - 1] = shards.sum_before(sums[known - 1])
        extension().route(
            num_rows=n,
            num_blocks=blocks,
            first_row=start,
            block_lse=block_lse.data_ptr(),
            rest_lse=rest_lse.data_ptr(),
            labels=labels.data_ptr(),
            tau=routing.tau,
            second_tau=-1.0 if second is None else second,
            seed=routing.seed,
            before=address(before),
            sums=address(sums),
            bitmap=bitmap.data_ptr(),
            bitmap_stride=bitmap.stride(0),
            set_bytes=set_bytes(blocks),
            most_pairs=address(out.most_pairs[start : start + n]),
            num_threads=threads,
        )
