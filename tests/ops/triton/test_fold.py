"""What blocks leave of their logits, against fp64."""

from __future__ import annotations

import torch
from triton_case import DEVICE

from fastdpo.ops.problem import STATS, Head, Rows
from fastdpo.ops.triton.call import Call
from fastdpo.ops.triton.common import LowRank, TokenRange
from fastdpo.ops.triton.fold import fold
from fastdpo.ops.triton.stats import BlockSums
from fastdpo.ops.triton.tokens import compact


def test_sums_of_every_block_leave_the_label_out():
    N, V, H = 48, 700, 40  # the last block is not full
    hidden, weight, labels = torch.randn(N, H), torch.randn(V, H), torch.randint(0, V, (N,))
    call = Call(Head(hidden.to(DEVICE), weight.to(DEVICE)), Rows(labels.to(DEVICE), -100, 0, V))
    rows = torch.empty(N, call.pitch, device=DEVICE)
    part = TokenRange(compact(call, first=rows), 0, N)
    sums = BlockSums.empty(STATS, N, call.num_blocks, call.device)
    label_logit = torch.empty(N, device=DEVICE)
    fold(call, part, rows, LowRank(), label_logit, sums)
    z = hidden.double() @ weight.double().T
    own = torch.arange(V) == labels[:, None]
    torch.testing.assert_close(label_logit.cpu().double(), z[own], rtol=1e-5, atol=1e-5)
    pad = call.num_blocks * 128 - V
    rest = torch.nn.functional.pad(z.masked_fill(own, -torch.inf), (0, pad), value=-torch.inf).view(N, -1, 128)
    column = torch.arange(V + pad).view(-1, 128)
    lse = rest.logsumexp(2)
    p = (rest - lse[:, :, None]).exp()
    expected = BlockSums(
        lse,
        torch.where(p > 0, p * rest, 0.0).sum(2),
        (2 * rest).logsumexp(2),
        torch.nn.functional.pad(z, (0, pad)).view(N, -1, 128).sum(2),
        rest.masked_fill(column >= labels[:, None, None], -torch.inf).amax(2),
        rest.masked_fill(column <= labels[:, None, None], -torch.inf).amax(2),
    )
    for name, ours, reference in zip(BlockSums._fields, sums, expected):
        torch.testing.assert_close(ours.cpu().double(), reference, rtol=1e-5, atol=1e-4, msg=name)
