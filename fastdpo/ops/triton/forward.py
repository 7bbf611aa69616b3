"""The Triton engine's forward, a chunk of tokens after the other: gather, fold, finish."""

from __future__ import annotations

import torch
import triton

from ...routing import num_blocks, set_bytes
from ..problem import Forward, Head, Rows
from . import memory
from .call import Call
from .common import TokenRange
from .fold import fold
from .launch import on_device
from .route import Draw, route
from .stats import BlockSums, Results, finish
from .tokens import Pairs, compact, gather, low_rank


def forward(head: Head, rows: Rows, *, stats: frozenset[str] = frozenset(), routing=None, shards=None) -> Forward:
    call = Call(head, rows)
    m, device = call.num_rows, call.device
    results = Results.empty(stats, m, device)
    bitmap = most_pairs = None
    if routing is not None:
        bytes_of_sets = len(routing.taus) * set_bytes(call.num_blocks)
        bitmap = torch.empty(m, bytes_of_sets, dtype=torch.uint8, device=device)
        most_pairs = torch.empty(m, dtype=torch.int32, device=device)
    saved = Forward(*results, bitmap, most_pairs)
    if m == 0:
        return saved
    # ranks exchange a chunk at a time: as many on every one
    blocks = call.num_blocks if shards is None else num_blocks(shards.widest)
    sums_of_token = 4 * blocks * sum(BlockSums.wanted(stats))
    capacity = min(memory.FORWARD_HIDDEN // (call.pitch * call.item_size), memory.FORWARD_PARTIAL // sums_of_token)
    capacity = min(memory.multiple(capacity, 128), triton.cdiv(m, 16) * 16)
    draw = Draw.of(routing, saved)
    with on_device(device):
        hidden = torch.empty(capacity, call.pitch, dtype=call.dtype, device=device)
        sums = BlockSums.empty(stats, capacity, call.num_blocks, device)
        label_logit = torch.empty(capacity, dtype=torch.float32, device=device)
        tokens = compact(call, results, Pairs(bitmap, most_pairs), first=hidden)
        for first in range(0, m, capacity):
            part = TokenRange(tokens, first, capacity)
            if first:
                gather(call, part, hidden)
            if shards is not None:  # a label is on one of them
                label_logit.fill_(-torch.inf)
            fold(call, part, hidden, low_rank(call, part), label_logit, sums)
            rest_lse = finish(call, part, sums, label_logit, results, draw, shards)
            if routing is not None and shards is not None:
                route(call, part, sums.lse, rest_lse, draw, shards)
    return saved
