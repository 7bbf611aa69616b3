"""The Triton engine's forward, a chunk of tokens after the other: gather, fold, finish, route."""

from __future__ import annotations

import torch
import triton

from ...routing import set_bytes
from ..problem import Forward, Head, Rows
from . import memory
from .call import Call
from .common import TokenRange
from .fold import fold
from .launch import on_device
from .route import route
from .stats import BlockSums, Results, finish
from .tokens import compact, gather, low_rank


def forward(head: Head, rows: Rows, *, stats: frozenset[str] = frozenset(), routing=None, shards=None) -> Forward:
    call = Call(head, rows)
    m, device = call.num_rows, call.device
    results = Results.empty(stats, m, device)
    bitmap = most_pairs = None
    if routing is not None:  # zeros where no token is, so that the same call gives the same bits
        bytes_of_sets = len(routing.taus) * set_bytes(call.num_blocks)
        bitmap = torch.zeros(m, bytes_of_sets, dtype=torch.uint8, device=device)
        most_pairs = torch.zeros(m, dtype=torch.int32, device=device)
    saved = Forward(*results, bitmap, most_pairs)
    if m == 0:
        return saved
    sums_of_token = 4 * call.num_blocks * sum(BlockSums.wanted(stats))
    capacity = min(memory.FORWARD_HIDDEN // (call.pitch * call.item_size), memory.FORWARD_PARTIAL // sums_of_token)
    capacity = min(memory.multiple(capacity, 128), triton.cdiv(m, 16) * 16)
    with on_device(device):
        tokens = compact(call, results)
        for first in range(0, m, capacity):
            part = TokenRange(tokens, first, capacity)
            sums = BlockSums.empty(stats, capacity, call.num_blocks, device)
            label_logit = torch.full((capacity,), -torch.inf, dtype=torch.float32, device=device)
            rest_lse = torch.empty(capacity, dtype=torch.float32, device=device)
            hidden = gather(call, part)
            fold(call, part, hidden, low_rank(call, hidden), label_logit, sums)
            finish(call, part, sums, label_logit, rest_lse, results, shards)
            if routing is not None:
                route(call, part, sums.lse, rest_lse, saved, routing, shards)
    return saved
