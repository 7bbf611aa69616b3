"""What follows from the sums of blocks, against the whole distributions."""

from __future__ import annotations

import pytest
import torch
from divergence_cases import KINDS

from fastdpo.ops.divergence import reference
from fastdpo.ops.divergence.blocks import BlockSums, log_sums, results, shares
from fastdpo.ops.divergence.problem import Heads
from fastdpo.routing import BLOCK


def sums_of(z, w, heads, of=None):
    """By definition, of [n, V] logits without the label's."""
    z, w = (x.unflatten(1, (-1, BLOCK)) for x in (z, w))
    lse, ref_lse = z.logsumexp(2), w.logsumexp(2)
    in_p, in_r = z - lse[..., None], w - ref_lse[..., None]
    p, r, u = in_p.exp(), in_r.exp(), in_p - in_r
    u = torch.where(u.isnan(), 0.0, u)
    mean_r = (r * u).sum(2)
    if of is not None:
        log_p, log_r = z - of.lse[:, None, None], w - of.ref_lse[:, None, None]
        of_ids, _ = reference._terms(heads, log_p, log_r)
        mean_r = of_ids.sum(2)
        u = log_p - reference._log_mixture(log_p, log_r, heads.beta)
        u = torch.where(u.isnan(), 0.0, u)
    mean_p = (p * u).sum(2)
    var_p, var_r = (p * (u - mean_p[..., None]) ** 2).sum(2), (r * (u - mean_r[..., None]) ** 2).sum(2)
    h = -torch.where(p > 0, p * in_p, 0.0).sum(2)
    return BlockSums(lse, ref_lse, mean_p, var_p, mean_r, var_r, h)


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("kind,beta", KINDS)
def test_the_chain_rule(kind, beta, labelled):
    z, w = torch.randn(2, 6, 4 * BLOCK, dtype=torch.float64) * 2
    labels = torch.tensor([0, 5, 127, 128, 511, 300])
    heads = Heads(None, None, kind, beta, labelled, routes_logps=labelled)
    log_p, log_r = z.log_softmax(1), w.log_softmax(1)
    label_logits = torch.full((2, 6), -torch.inf, dtype=torch.float64)
    if labelled:
        rows = torch.arange(6)
        label_logits = torch.stack((z[rows, labels], w[rows, labels]))
        z, w = (x.scatter(1, labels[:, None], -torch.inf) for x in (z, w))
    sums = sums_of(z, w, heads)
    of = log_sums(sums, label_logits)
    if labelled:
        torch.testing.assert_close(of.logps, log_p[rows, labels])
        torch.testing.assert_close(of.ref_logps, log_r[rows, labels])
    else:
        assert (of.logps == -torch.inf).all()
    if kind == "jsd":
        sums = sums_of(z, w, heads, of)
    divergence, mean, entropy = results(heads, sums, of, True)
    true, of_mean = reference._terms(heads, log_p, log_r)
    torch.testing.assert_close(divergence, true.sum(1))
    torch.testing.assert_close(entropy, -(log_p.exp() * log_p).sum(1))
    assert (mean is None) == (kind == "forward_kl")
    if mean is not None:
        torch.testing.assert_close(mean, of_mean.sum(1))
    total, log_share = shares(heads, sums, of, mean)
    rest_p, rest_r = z - of.lse[:, None], w - of.ref_lse[:, None]
    bounds = reference._bounds(heads, rest_p, rest_r, mean)
    torch.testing.assert_close(total, bounds.sum(1))
    share = bounds / total[:, None]
    if labelled:
        share = torch.maximum(share, rest_p.exp().unflatten(1, (-1, BLOCK)).sum(2) / -torch.expm1(of.logps)[:, None])
    torch.testing.assert_close(log_share.exp(), share)


def test_sure_labels_keep_their_digits():
    sums = BlockSums(*[torch.zeros(1, 2, dtype=torch.float64) for _ in range(7)])
    of = log_sums(sums, torch.tensor([[30.0], [40.0]]))
    torch.testing.assert_close(
        of.logps, torch.tensor([-2.0]).double() * torch.tensor(-30.0).double().exp(), rtol=1e-9, atol=0
    )
