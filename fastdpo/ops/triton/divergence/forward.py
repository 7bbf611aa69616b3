"""The divergence's forward, a chunk of tokens after the other: gather both heads' rows, fold, finish; jsd folds twice,
as what it sums up hangs on the log-sum-exps."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ....routing import set_bytes
from ...divergence.problem import DivergenceForward, Heads
from ...problem import Rows
from .. import memory
from ..common import TokenRange
from ..launch import on_device
from ..route import NOTHING_ROUTED, Draw
from ..tokens import Pairs, compact, gather, low_rank
from .call import TwoHeads
from .finish import PairResults, finish
from .fold import fold
from .sums import PairSums


def forward(
    heads: Heads, rows: Rows, *, stats: frozenset[str] = frozenset(), routing=None, shards=None
) -> DivergenceForward:
    if shards is not None:
        raise NotImplementedError("vocab_group: the triton engine has no divergence of vocabulary shards")
    call, routed = TwoHeads(heads, rows), routing is not None
    teacher, m, device, jsd = call.teacher, call.num_rows, call.device, heads.kind == "jsd"
    results = PairResults.empty(heads, stats, routed, m, device)
    bitmap = most_pairs = None
    if routed:
        bytes_of_sets = len(routing.taus) * set_bytes(call.num_blocks)
        bitmap = torch.empty(m, bytes_of_sets, dtype=torch.uint8, device=device)
        most_pairs = torch.empty(m, dtype=torch.int32, device=device)
    saved = DivergenceForward(**results._asdict(), bitmap=bitmap, most_pairs=most_pairs)
    if m == 0:
        return saved
    wanted = PairSums.wanted(heads, stats, routed)
    hidden_of_token = call.pitch * call.item_size + teacher.pitch * teacher.item_size
    sums_of_token = 4 * call.num_blocks * sum(wanted)
    capacity = min(memory.FORWARD_HIDDEN // hidden_of_token, memory.FORWARD_PARTIAL // sums_of_token)
    capacity = min(memory.multiple(capacity, 128), triton.cdiv(m, 16) * 16)
    draw = Draw.of(routing, saved)
    with on_device(device):
        hidden, ref_hidden = _rows_of(call, capacity), _rows_of(teacher, capacity)
        sums = PairSums.empty(wanted, capacity, call.num_blocks, device)
        label_logits = torch.empty(2, capacity, dtype=torch.float32, device=device)
        tokens = compact(call, results, Pairs(bitmap, most_pairs), first=hidden)
        ref_tokens = compact(teacher, first=ref_hidden)
        for first in range(0, m, capacity):
            part = TokenRange(tokens, first, capacity)
            if first:
                gather(call, part, hidden)
                gather(teacher, TokenRange(ref_tokens, first, capacity), ref_hidden)
            operands = call, part, hidden, ref_hidden, low_rank(call, part), label_logits
            finished = call, part, sums, label_logits, results
            if jsd:
                fold(*operands, sums.masses())
                finish(*finished, NOTHING_ROUTED, masses=True, values=False)
                fold(*operands, sums, results.lse, results.ref_lse)
                finish(*finished, draw, masses=False, values=True)
            else:
                fold(*operands, sums)
                finish(*finished, draw, masses=True, values=True)
    return saved


def _rows_of(call, capacity: int) -> Tensor:
    """Of gathered hidden states."""
    return torch.empty(capacity, call.pitch, dtype=call.dtype, device=call.device)
