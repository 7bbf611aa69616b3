"""The CPU engine's forward: a tile of logits at a time, folded into what its blocks sum up to.

Neither the [N, V] logits nor an fp32 copy of `hidden`, `weight` or their gradients exists. Logits are fp32 before the
log-sum-exp whatever the input type.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...head import Routing
from ...routing import BLOCK, num_blocks
from ..native import EXTENSION
from ..problem import FOLDED, STAT_DTYPES, Forward, Head, Tokens
from .operands import Operands


def forward(
    head: Head,
    tokens: Tokens,
    *,
    stats: frozenset[str] = frozenset(),
    routing: Routing | None = None,
    shards=None,
) -> Forward:
    ops, device = Operands(head, tokens), head.hidden.device
    count, blocks, threads = ops.count, ops.num_blocks, ops.threads
    fp32 = {"dtype": torch.float32, "device": device}
    columns = {"logps": torch.empty(count, **fp32), "lse": torch.empty(count, **fp32)}
    for name in FOLDED:
        columns[name] = torch.empty(count, dtype=STAT_DTYPES[name], device=device) if name in stats else None
    bitmap = most_pairs = None
    if routing is not None:
        bitmap = torch.empty(count, len(routing.taus) * -(-blocks // 8), dtype=torch.uint8, device=device)
        most_pairs = torch.empty(count, dtype=torch.int32, device=device)
    # ranks exchange a chunk at a time: as many on every one
    size = ops.chunk_rows(8 * (blocks if shards is None else num_blocks(shards.widest)))
    for start in range(0, count, size):
        stop = min(start + size, count)
        n, chunk = stop - start, slice(start, stop)
        operands = ops.hidden_rows(start, stop), ops.low_rank(start, stop)
        labels = tokens.labels[chunk]
        block_lse = torch.empty(n, blocks, dtype=torch.float64, device=device)
        label_logit = torch.full((n,), -torch.inf, **fp32)
        row_stats = None
        if stats:
            row_stats = torch.tensor(EXTENSION.NO_ROW_STATS, dtype=torch.float64, device=device).repeat(n, 1)
        cols = ops.slab_cols(n)
        for first in range(0, ops.vocab_size, cols):
            tile = ops.products(start, stop, first, min(first + cols, ops.vocab_size), *operands)
            EXTENSION.fold(
                **ops.columns(tile),
                labels=labels,
                block_lse=block_lse[:, first // BLOCK :],
                label_logit=label_logit,
                stats=row_stats,
                num_threads=threads,
            )
            del tile  # before the next product allocates its own
        rest_lse, vocab_size = block_lse.new_empty(n), ops.vocab_size
        EXTENSION.sum_blocks(block_lse=block_lse, rest_lse=rest_lse, num_threads=threads)
        if shards is not None:
            label_logit, rest_lse = shards.label_logit(label_logit), shards.logsumexp(rest_lse)
            row_stats = shards.merge_stats(row_stats)
            vocab_size = shards.vocab_size
        outputs = {}
        for name, x in columns.items():
            outputs[name] = None if x is None else x[chunk]
        EXTENSION.finish(
            num_rows=n,
            vocab_size=vocab_size,
            rest_lse=rest_lse,
            label_logit=label_logit,
            stats=row_stats,
            **outputs,
            num_threads=threads,
        )
        if routing is not None:
            out = bitmap[chunk], most_pairs[chunk]
            route(block_lse, rest_lse, labels, routing, start, *out, shards, threads)
    return Forward(**columns, bitmap=bitmap, most_pairs=most_pairs)


def route(
    block_lse: Tensor,
    rest_lse: Tensor,
    labels: Tensor,
    routing: Routing,
    start: int,
    bitmap: Tensor,
    most_pairs: Tensor,
    shards,
    threads: int,
) -> None:
    """The kept pairs of tokens from `start` on. A shard goes through its blocks once more for each set of pairs, after
    the ranks have exchanged the odds that come before theirs."""
    taus = routing.taus
    before = sums = None
    if shards is not None:
        before, sums = torch.zeros(2, 2, block_lse.shape[0], dtype=torch.int64, device=block_lse.device)
    for known in range(1 if shards is None else 1 + len(taus)):
        if known:
            before[known - 1] = shards.sum_before(sums[known - 1])
        EXTENSION.route(
            block_lse=block_lse,
            rest_lse=rest_lse,
            labels=labels,
            first_row=start,
            tau=taus[0],
            second_tau=taus[1] if len(taus) == 2 else -1.0,
            seed=routing.seed,
            before=before,
            sums=sums,
            bitmap=bitmap,
            most_pairs=most_pairs,
            num_threads=threads,
        )
