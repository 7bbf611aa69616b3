"""The CPU engine: library matrix products on tiles of logits, native folds from csrc/ between them.

Neither the [N, V] logits nor an fp32 copy of `hidden`, `weight` or their gradients exists. Logits are fp32 before the
log-sum-exp whatever the input type.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...head import Routing
from ...routing import BLOCK, num_blocks, set_bytes
from ..native import address, extension
from ..problem import Forward, Head, Tokens
from .backward import backward
from .operands import Operands

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
    device = head.hidden.device
    fp32 = {"dtype": torch.float32, "device": device}
    out = Forward(
        logps=torch.empty(count, **fp32),
        lse=torch.empty(count, **fp32),
        entropy=torch.empty(count, **fp32) if "entropy" in stats else None,
        mean_logit=torch.empty(count, **fp32) if "mean_logit" in stats else None,
        is_top1=torch.empty(count, dtype=torch.bool, device=device) if "is_top1" in stats else None,
        log_sum_sq_probs=torch.empty(count, **fp32) if "log_sum_sq_probs" in stats else None,
        bitmap=None
        if routing is None
        else torch.empty(count, len(routing.taus) * set_bytes(blocks), dtype=torch.uint8, device=device),
        most_pairs=None if routing is None else torch.empty(count, dtype=torch.int32, device=device),
    )
    size = ops.chunk_rows(8 * blocks)
    for start in range(0, count, size):
        stop = min(start + size, count)
        n = stop - start
        hidden = ops.hidden(start, stop)
        rank = ops.rank(hidden)
        labels = tokens.labels[start:stop]
        block_lse = torch.empty(n, blocks, dtype=torch.float64, device=device)
        label_logit = torch.full((n,), -torch.inf, **fp32)
        row_stats = None
        if stats:
            row_stats = torch.empty(n, native.ROW_STATS_BYTES // 8, dtype=torch.float64, device=device)
            native.init_stats(address(row_stats), n)
        cols = ops.slab_cols(n)
        for first in range(0, ops.vocab_size, cols):
            last = min(first + cols, ops.vocab_size)
            tile = ops.products(hidden, rank, ops.weight(first, last), first)
            native.fold(
                ops.tile(tile, n, first),
                address(labels, torch.int64),
                address(block_lse) + 8 * (first // BLOCK),
                blocks,
                address(label_logit),
                address(row_stats),
                threads,
            )
            del tile  # before the next product allocates its own
        rest_lse, vocab_size = block_lse.new_empty(n), ops.vocab_size
        native.sum_blocks(address(block_lse), n, blocks, address(rest_lse), threads)
        if shards is not None:
            label_logit, rest_lse = shards.label_logit(label_logit), shards.logsumexp(rest_lse)
            row_stats = shards.merge_stats(row_stats)
            vocab_size = shards.vocab_size

        def part(x: Tensor | None, start=start, stop=stop) -> int:
            return address(None if x is None else x[start:stop])

        native.finish(
            n,
            vocab_size,
            address(rest_lse, torch.float64),
            address(label_logit, torch.float32),
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
        before, sums = torch.zeros(2, 2, n, dtype=torch.int64, device=block_lse.device)
    for known in range(1 if shards is None else 2 if second is None else 3):
        if known:
            before[known - 1] = shards.sum_before(sums[known - 1])
        extension().route(
            num_rows=n,
            num_blocks=blocks,
            first_row=start,
            block_lse=address(block_lse, torch.float64),
            rest_lse=address(rest_lse, torch.float64),
            labels=address(labels, torch.int64),
            tau=routing.tau,
            second_tau=-1.0 if second is None else second,
            seed=routing.seed,
            before=address(before),
            sums=address(sums),
            bitmap=address(bitmap, torch.uint8),
            bitmap_stride=bitmap.stride(0),
            set_bytes=set_bytes(blocks),
            most_pairs=address(out.most_pairs[start : start + n], torch.int32),
            num_threads=threads,
        )
