"""What blocks leave of their logits, against fp64."""

from __future__ import annotations

import pytest
import torch
from triton_case import DEVICE

from fastdpo.head import LogitTransform
from fastdpo.ops.problem import FOLDED, Head, Rows
from fastdpo.ops.triton.call import Call
from fastdpo.ops.triton.common import LowRank, TokenRange
from fastdpo.ops.triton.fold import fold
from fastdpo.ops.triton.stats import BlockSums
from fastdpo.ops.triton.tokens import compact

N, H = 48, 40
ELSEWHERE = 10_000  # columns of the shards before this one, and after it


def folded(hidden, weight, labels, bias=None, stats=FOLDED, **transform) -> tuple[torch.Tensor, BlockSums]:
    """(label_logit, sums); labels may be outside of the weight's rows."""
    V = len(weight)
    tensors = [None if x is None else x.float().to(DEVICE) for x in (hidden, weight, bias)]
    rows = Rows((labels + ELSEWHERE).to(DEVICE), -100, ELSEWHERE, V + 2 * ELSEWHERE)
    call = Call(Head(*tensors, transform=LogitTransform(**transform)), rows)
    gathered = torch.empty(N, call.pitch, device=DEVICE)
    part = TokenRange(compact(call, first=gathered), 0, N)
    sums = BlockSums.empty(stats, N, call.num_blocks, call.device)
    label_logit = torch.full((N,), -torch.inf, device=DEVICE)
    fold(call, part, gathered, LowRank(), label_logit, sums)
    return label_logit.cpu().double(), BlockSums(*(None if x is None else x.cpu().double() for x in sums))


def logits(hidden, weight, scale=1.0, softcap=0.0, temperature=1.0) -> torch.Tensor:
    y = scale * (hidden @ weight.T)
    return (softcap * torch.tanh(y / softcap) if softcap else y) / temperature


def defined(z, labels) -> BlockSums:
    V = z.shape[1]
    pad = -V % 128
    own = torch.arange(V) == labels[:, None]
    rest = torch.nn.functional.pad(z.masked_fill(own, -torch.inf), (0, pad), value=-torch.inf).view(N, -1, 128)
    column = torch.arange(V + pad).view(-1, 128)
    p = (rest - rest.logsumexp(2)[:, :, None]).exp()
    return BlockSums(
        rest.logsumexp(2),
        torch.where(p > 0, p * rest, 0.0).sum(2),
        (2 * rest).logsumexp(2),
        torch.nn.functional.pad(z, (0, pad)).view(N, -1, 128).sum(2),
        rest.masked_fill(column >= labels[:, None, None], -torch.inf).amax(2),
        rest.masked_fill(column <= labels[:, None, None], -torch.inf).amax(2),
    )


TRANSFORMS = [
    {},
    {"scale": 1.3, "temperature": 0.6},
    {"scale": -0.7},
    {"scale": 0.0},
    {"softcap": 4.0},
    {"scale": -0.5, "softcap": 4.0, "temperature": 2.0},
]


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("where", ["anywhere", "in one block", "in the last columns", "on other shards"])
@pytest.mark.parametrize("V", [700, 768, 640])  # the last block is not full; all are; the last tile has but one
def test_sums_of_every_block_leave_the_label_out(V, where, transform):
    hidden, weight = torch.randn(N, H).double(), torch.randn(V, H).double()
    labels = {
        "anywhere": torch.randint(0, V, (N,)),
        "in one block": torch.randint(128, 256, (N,)),
        "in the last columns": torch.randint(V - 3, V, (N,)),
        "on other shards": torch.where(torch.rand(N) < 0.5, torch.randint(-500, 0, (N,)), torch.randint(V, 900, (N,))),
    }[where]
    label_logit, sums = folded(hidden, weight, labels, **transform)
    z = logits(hidden, weight, **transform)
    here = (labels >= 0) & (labels < V)
    own = z.gather(1, labels.clamp(0, V - 1)[:, None])[:, 0]
    torch.testing.assert_close(label_logit, torch.where(here, own, -torch.inf), rtol=1e-5, atol=1e-5)
    for name, ours, reference in zip(BlockSums._fields, sums, defined(z, labels)):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-4, msg=name)


@pytest.mark.parametrize("transform", [{}, {"scale": -0.7}], ids=str)
@pytest.mark.parametrize("stats", [(), FOLDED], ids=["plain", "statistics"])
def test_what_is_no_number_stays_in_its_row(stats, transform):
    """Also in blocks without a label, whose logits take no masks."""
    hidden, weight = torch.randn(N, H).double(), torch.randn(700, H).double()
    labels = torch.randint(0, 128, (N,))
    _, expected = folded(hidden, weight, labels, stats=stats, **transform)
    bad = hidden.clone()
    bad[3, 5], bad[4, 5], bad[5, 6] = torch.nan, torch.inf, -torch.inf
    label_logit, sums = folded(bad, weight, labels, stats=stats, **transform)
    others = torch.ones(N, dtype=torch.bool)
    others[3:6] = False
    for name, ours, reference in zip(BlockSums._fields, sums, expected):
        if ours is not None:
            assert torch.equal(ours[others], reference[others]), name
    assert sums.lse[3:6].isnan().all() and not label_logit[3:6].isfinite().any()


@pytest.mark.parametrize("stats", [(), FOLDED], ids=["plain", "statistics"])
@pytest.mark.parametrize("low", [-torch.inf, torch.finfo(torch.float32).min, -1e30], ids=str)
def test_columns_that_a_bias_rules_out(low, stats):
    """A block without any left, one with some, and those of the label's block: their share is 0, without a NaN."""
    hidden, weight, bias = torch.randn(N, H).double(), torch.randn(640, H).double(), torch.zeros(640).double()
    bias[100:110] = bias[256:384] = bias[500:512] = low
    _, sums = folded(hidden, weight, torch.randint(0, 100, (N,)), bias, stats)
    z = hidden @ weight.T
    lse, kept = sums.lse, z.masked_fill(bias != 0, -torch.inf).view(N, 5, 128)
    assert (lse[:, 2] < -1e29).all()
    torch.testing.assert_close(lse[:, [1, 4]], kept.logsumexp(2)[:, [1, 4]], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse[:, 3], kept[:, 3].logsumexp(1), rtol=1e-5, atol=1e-5)
    assert not any(x.isnan().any() for x in (sums.lse, sums.mean, sums.lse2) if x is not None)
    if stats:
        p = kept.softmax(2)
        mean = torch.where(p > 0, p * z.view(N, 5, 128), 0.0).sum(2)
        torch.testing.assert_close(sums.mean[:, 3], mean[:, 3], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [1e10, -1e10, 1e20])
def test_logits_that_fp32_has_no_digits_for(scale):
    """The largest is the sum; with a few digits left, the sum still has them."""
    hidden, weight = torch.randn(N, H).double(), torch.randn(384, H).double()
    labels = torch.randint(0, 128, (N,))
    _, sums = folded(hidden, weight, labels, stats=FOLDED, scale=scale)
    expected = defined(logits(hidden, weight, scale), labels)
    for name in ("lse", "lse2", "mean"):
        torch.testing.assert_close(getattr(sums, name), getattr(expected, name), rtol=1e-5, atol=0.0, msg=name)
