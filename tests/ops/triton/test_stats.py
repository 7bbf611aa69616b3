"""Blocks -> statistics, and what two shards of the vocabulary merge into."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from triton_case import DEVICE

from fastdpo.ops.problem import FOLDED, Head, Rows
from fastdpo.ops.triton.call import Call
from fastdpo.ops.triton.common import LowRank, TokenRange
from fastdpo.ops.triton.fold import fold
from fastdpo.ops.triton.route import NOTHING_ROUTED
from fastdpo.ops.triton.stats import BlockSums, Results, _merge, finish
from fastdpo.ops.triton.tokens import compact

N, V, H = 32, 600, 24


class OneShard:
    """Collectives of a group of one."""

    def label_logit(self, x):
        return x

    sum = max = logsumexp = label_logit


@pytest.mark.parametrize("shards", [None, OneShard()], ids=["whole", "shard"])
@pytest.mark.parametrize("confident", [False, True])
def test_statistics_of_rows(confident, shards):
    """Of sure tokens to the relative precision of log p."""
    hidden, weight, labels = torch.randn(N, H), torch.randn(V, H), torch.randint(0, V, (N,))
    if confident:
        hidden = weight[labels] * torch.linspace(0.5, 1.5, N)[:, None]
    call = Call(Head(hidden.to(DEVICE), weight.to(DEVICE)), Rows(labels.to(DEVICE), -100, 0, V))
    results = Results.empty(FOLDED, N, call.device)
    rows = torch.empty(N, call.pitch, device=DEVICE)
    part = TokenRange(compact(call, results, first=rows), 0, N)
    sums, label_logit = BlockSums.empty(FOLDED, N, call.num_blocks, call.device), torch.empty(N, device=DEVICE)
    fold(call, part, rows, LowRank(), label_logit, sums)
    rest_lse = finish(call, part, sums, label_logit, results, NOTHING_ROUTED, shards)
    z = hidden.double() @ weight.double().T
    logp = z.log_softmax(1)
    own = torch.arange(V) == labels[:, None]
    expected = Results(
        logp[own],
        z.logsumexp(1),
        -(logp.exp() * logp).sum(1),
        z.mean(1),
        z.argmax(1) == labels,
        (2 * logp).logsumexp(1),
    )
    for name, ours, reference in zip(Results._fields, results, expected):
        if name == "is_top1":
            assert torch.equal(ours.cpu(), reference)
        else:
            torch.testing.assert_close(
                ours.cpu().double(), reference, rtol=1e-4, atol=1e-5 if name != "logps" else 1e-6
            )
    if shards is not None:
        rest = z.masked_fill(own, -torch.inf).logsumexp(1)
        torch.testing.assert_close(rest_lse.cpu().double(), rest, rtol=1e-5, atol=1e-5)


def test_shards_merge_into_the_whole():
    z = torch.randn(N, V, dtype=torch.float64)

    def shard_of(part):
        rest = part.logsumexp(1)
        share = (part - rest[:, None]).exp()
        mean = (share * (part - rest[:, None])).sum(1)
        return torch.stack((rest, mean, (2 * part).logsumexp(1), part.sum(1), part.amax(1), part.amin(1)))

    parts = [shard_of(z[:, :200]), shard_of(z[:, 200:])]
    # each collective sees its own rank's value, whose number says which of the sums it is
    rows = {x.data_ptr(): i for i, x in enumerate(parts[0])}
    other = SimpleNamespace(
        logsumexp=lambda x: torch.logaddexp(x, parts[1][rows[x.data_ptr()]]),
        sum=lambda x: x + (parts[1][3] if x.data_ptr() in rows else second_mean),
        max=lambda x: torch.maximum(x, parts[1][4:]),
    )
    whole = shard_of(z)
    second_mean = (parts[1][0] - whole[0]).exp() * (parts[1][1] + parts[1][0] - whole[0])
    merged = _merge(other, parts[0])
    torch.testing.assert_close(merged[:5], whole[:5])
