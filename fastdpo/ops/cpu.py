"""The CPU engine: library matrix products on tiles of logits, native folds from csrc/ between them.

Neither the [N, V] logits nor an fp32 copy of `hidden`, `weight` or their gradients exists. Logits are fp32 before the
log-sum-exp whatever the input type.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..routing import BLOCK, Routing, num_blocks
from .cpu_backward import backward
from .cpu_operands import Operands
from .native import address
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
    device = head.hidden.device
    fp32 = {"dtype": torch.float32, "device": device}
    out = Forward(
        logps=torch.empty(count, **fp32),
        lse=torch.empty(count, **fp32),
        entropy=torch.empty(count, **fp32) if "entropy" in stats else None,
        mean_logit=torch.empty(count, **fp32) if "mean_logit" in stats else None,
        is_top1=torch.empty(count, dtype=torch.bool, device=device) if "is_top1" in stats else None,
        log_sum_sq_probs=torch.empty(count, **fp32) if "log_sum_sq_probs" in stats else None,
        bitmap=None if routing is None else torch.empty(count, -(-blocks // 8), dtype=torch.uint8, device=device),
    )
    size = ops.chunk_rows(4 * blocks)
    for start in range(0, count, size):
        stop = min(start + size, count)
        n = stop - start
        hidden = ops.hidden(start, stop)
        rank = ops.rank(hidden)
        labels = tokens.labels[start:stop]
        block_lse = torch.empty(n, blocks, **fp32)
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
                address(block_lse) + 4 * (first // BLOCK),
                blocks,
                address(label_logit),
                address(row_stats),
                threads,
            )
            del tile  # before the next product allocates its own
        other_lse, vocab_size = None, ops.vocab_size
        if shards is not None:
            label_logit = shards.label_logit(label_logit)
            other_lse = shards.logsumexp_of_others(block_lse)
            row_stats = shards.merge_stats(row_stats)
            vocab_size = shards.vocab_size

        def part(x: Tensor | None, start=start, stop=stop) -> int:
            return address(None if x is None else x[start:stop])

        native.finish(
            n,
            blocks,
            vocab_size,
            start,
            head.first_block,
            address(block_lse),
            address(other_lse, torch.float32),
            address(label_logit, torch.float32),
            address(labels, torch.int64),
            address(row_stats),
            part(out.logps),
            part(out.lse),
            part(out.entropy),
            part(out.mean_logit),
            part(out.is_top1),
            part(out.log_sum_sq_probs),
            part(out.bitmap),
            0 if out.bitmap is None else out.bitmap.stride(0),
            0.0 if routing is None else routing.tau,
            0 if routing is None else routing.seed,
            threads,
        )
    return out
