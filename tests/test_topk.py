"""topk_divergence against its definition from logits in fp64."""

from __future__ import annotations

import math

import pytest
import torch
from divergence_cases import KINDS, relative_error

import fastdpo


def case(shape=(2, 5), V=300, H=12, K=7):
    hidden, weight = torch.randn(*shape, H).requires_grad_(), torch.randn(V, H).requires_grad_()
    teacher = (torch.randn(*shape, V) * 3).log_softmax(-1)
    logps, ids = teacher.topk(K)
    return hidden, weight, ids, logps


def defined(hidden, weight, ids, logps, tail, kind, beta):
    """Of rows whose ids all count."""
    p, r = (hidden @ weight.T).log_softmax(-1).gather(-1, ids), logps
    if tail == "bucket":
        p, r = (torch.cat((x, torch.log1p(-x.exp().sum(-1, keepdim=True))), -1) for x in (p, r))
    else:
        p, r = p.log_softmax(-1), r.log_softmax(-1)

    def kl(a, b):
        return (a.exp() * (a - b)).sum(-1)

    if kind != "jsd":
        return kl(r, p) if kind == "forward_kl" else kl(p, r)
    m = torch.logaddexp(p + math.log(1 - beta), r + math.log(beta))
    return beta * kl(r, m) + (1 - beta) * kl(p, m)


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
@pytest.mark.parametrize("kind,beta", KINDS)
def test_values_and_gradients(engine, kind, beta, tail):
    hidden, weight, ids, logps = case()
    found = fastdpo.topk_divergence(hidden, weight, ids, logps, tail=tail, kind=kind, jsd_beta=beta, backward="exact")
    doubles = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    expected = defined(*doubles, ids, logps.double(), tail, kind, beta)
    assert found.dtype == torch.float32 and found.shape == (2, 5)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    upstream = torch.randn(2, 5)
    given = torch.autograd.grad(found, (hidden, weight), upstream)
    for g, t in zip(given, torch.autograd.grad(expected, doubles, upstream.double())):
        assert relative_error(g, t) < 2e-5


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_padding_counts_for_nothing(tail):
    hidden, weight, ids, logps = case()
    expected = fastdpo.topk_divergence(hidden, weight, ids[..., :4], logps[..., :4], tail=tail)
    by_id, by_logp = ids.clone(), logps.clone()
    by_id[..., 4:], by_logp[..., 4:] = -100, -torch.inf
    for padded in ((by_id, logps), (ids, by_logp), (by_id, by_logp)):
        torch.testing.assert_close(fastdpo.topk_divergence(hidden, weight, *padded, tail=tail), expected)
    by_id[1] = -100
    with torch.no_grad():
        hidden[1] = torch.nan
    found = fastdpo.topk_divergence(hidden, weight, by_id, logps, tail=tail)
    assert (found[1] == 0).all()
    dhidden, dweight = torch.autograd.grad(found.sum(), (hidden, weight))
    assert (dhidden[1] == 0).all() and dweight.isfinite().all()


def test_a_whole_distribution_is_linear_divergence():
    hidden, weight, *_ = case(V=40)
    teacher_hidden, teacher_weight = torch.randn(2, 5, 6), torch.randn(40, 6)
    teacher = (teacher_hidden @ teacher_weight.T).log_softmax(-1)
    ids = torch.arange(40).expand(2, 5, 40)
    mask = torch.ones(2, 5, dtype=torch.bool)
    for kind, beta in KINDS:
        found = fastdpo.topk_divergence(hidden, weight, ids, teacher, tail="renormalize", kind=kind, jsd_beta=beta)
        whole = fastdpo.linear_divergence(
            hidden, weight, teacher_hidden, teacher_weight, mask, kind=kind, jsd_beta=beta
        ).divergence
        torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-5)


def test_bad_ids_stay_in_their_row():
    hidden, weight, ids, logps = case()
    ids[0, 1, 2] = 300
    found = fastdpo.topk_divergence(hidden, weight, ids, logps)
    assert found[0, 1].isnan() and found.isnan().sum() == 1
    dhidden, dweight = torch.autograd.grad(found.sum(), (hidden, weight))
    assert dhidden[0, 1].isnan().all() and dhidden.isnan().any(-1).sum() == 1 and dweight.isfinite().all()
    with pytest.raises(ValueError, match="300"):
        fastdpo.topk_divergence(hidden, weight, ids, logps, check_labels=True)


@pytest.mark.parametrize(
    "change,error,match",
    [
        ({"tail": "drop"}, ValueError, "tail must be one of"),
        ({"kind": "kl"}, ValueError, "kind must be one of"),
        ({"topk_logps": torch.zeros(2, 5, 6)}, ValueError, "topk_logps must be shaped like topk_ids"),
        ({"topk_logps": torch.zeros(2, 5, 7, dtype=torch.int64)}, TypeError, "topk_logps must be fp32"),
        ({"topk_ids": torch.zeros(2, 5, 7)}, TypeError, "topk_ids must be int64"),
        ({"topk_ids": torch.zeros(2, 4, 7, dtype=torch.int64)}, ValueError, "topk_ids must have K > 0 ids"),
    ],
)
def test_refusals(change, error, match):
    hidden, weight, ids, logps = case()
    with pytest.raises(error, match=match):
        fastdpo.topk_divergence(hidden, weight, **{"topk_ids": ids, "topk_logps": logps, **change})
