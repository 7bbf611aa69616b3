"""What the routed backward does to a head: counts and errors by hand."""

from __future__ import annotations

import pytest
import torch

import fastdpo
from benchmarks.inputs import synthetic_head
from fastdpo.commands import study as module
from fastdpo.commands.heads import Head
from fastdpo.commands.study import ALWAYS, NEVER, SAMPLED, kinds_of, named, steps, study
from fastdpo.head import LogitTransform
from fastdpo.routing import ONE, keep, odds, own_block, philox


@pytest.fixture(scope="module")
def head() -> Head:
    made = synthetic_head(96, 8192, 256)
    return Head("made", made.hidden.bfloat16(), made.weight.bfloat16(), made.labels)


def test_the_kernels_rule():
    share = torch.tensor([[0.6, 0.3, 2e-4, 0.0], [2e-4, 0.9, 0.0, 0.0998]])
    own = own_block(torch.tensor([2 * 128, 0]), 4)  # in blocks 2 and 0, both light
    kinds = torch.stack([kinds_of(share, own, 1e-3, seed) for seed in range(200)])
    sure = torch.tensor([[True, True, True, False], [True, True, False, True]])
    assert (kinds[:, sure] == ALWAYS).all() and (kinds[:, ~sure] == NEVER).all()
    light = own_block(torch.tensor([0, 128]), 4)
    drawn = torch.stack([kinds_of(share, light, 1e-3, seed) for seed in range(400)])
    assert 0.1 < (drawn[:, 0, 2] == SAMPLED).float().mean() < 0.3  # q = 0.2, four standard errors are 0.08


def test_live_blocks_passes_and_shares(head, monkeypatch):
    monkeypatch.setattr(module, "LOGITS", 40 * 8192)  # three chunks
    announced = []
    taus = [2.0**-6, 2.0**-9]
    found = study(head, taus, seeds=1, pictured=7, announce=announced.append)
    assert len(announced) == steps(head, taus, 1) == 3 + 1 + 1 + 2
    tail = (head.hidden.float() @ head.weight.float().T).scatter(1, head.labels[:, None], -torch.inf).softmax(1)
    share, own = tail.view(96, 64, 128).sum(2), own_block(head.labels, 64)
    for row, tau in zip(found.rows, taus):
        expected = torch.where(own, 1.0, (share / tau).clamp(max=1)).sum(1)
        torch.testing.assert_close(row.live.float(), expected, rtol=1e-4, atol=1e-4)
        assert row.share == pytest.approx(expected.mean().item() / 64, rel=1e-4)
        assert row.most >= expected.max() > row.most - 1.001
        assert row.passes(False) == 2 + 3 * row.share and row.speed_up(False) == 5 / row.passes(False)
        assert row.speed_up(True) == 4 / (2 + 2 * row.share)
        kept = keep(odds(share, own, tau), philox(0, torch.arange(96))[:, 0])
        assert (kept.sum(1) <= row.most + 1).all()
    rows = torch.linspace(0, 95, 7).long()
    torch.testing.assert_close(found.shares, share[rows], rtol=1e-3, atol=1e-6)
    assert found.labels.tolist() == head.labels[rows].tolist()
    p = (head.hidden.float() @ head.weight.float().T).softmax(1).gather(1, head.labels[:, None])[:, 0]
    assert found.sure.tolist() == (p > 0.99).tolist()
    assert ONE == 2**32


def test_errors_are_those_of_the_gradients(head):
    (row,) = study(head, [2.0**-7], seeds=1).rows
    upstream = torch.where(torch.arange(96) < 48, 1.0, -1.0)

    def gradients(dtype, **options):
        hidden, weight = head.hidden.to(dtype).requires_grad_(), head.weight.to(dtype).requires_grad_()
        fastdpo.linear_logps(hidden, weight, head.labels, **options).backward(upstream.to(dtype))
        return hidden.grad.double(), weight.grad.double()

    exact, routed = gradients(torch.float64, backward="exact"), gradients(torch.float32, tau=2.0**-7, seed=0)
    each = (routed[0] - exact[0]).norm(dim=1) / exact[0].norm(dim=1)
    assert row.errors.dhidden == pytest.approx(((routed[0] - exact[0]).norm() / exact[0].norm()).item(), rel=0.01)
    assert row.errors.dweight == pytest.approx(((routed[1] - exact[1]).norm() / exact[1].norm()).item(), rel=0.01)
    assert row.errors.worst == pytest.approx(each.max().item(), rel=0.01)
    assert row.errors.dhidden > 1e-3


def test_bf16_logits_are_those_of_an_eager_loss(head):
    found = study(head, [0.5], seeds=1)
    hidden, weight = head.hidden.clone().requires_grad_(), head.weight.clone().requires_grad_()
    logps = (hidden @ weight.T).float().log_softmax(-1).gather(1, head.labels[:, None])[:, 0]
    logps.backward(torch.where(torch.arange(96) < 48, 1.0, -1.0))
    exact_hidden = head.hidden.double().requires_grad_()
    exact = fastdpo.linear_logps(exact_hidden, head.weight.double(), head.labels, backward="exact")
    exact.backward(torch.where(torch.arange(96) < 48, 1.0, -1.0).double())
    apart = ((hidden.grad.double() - exact_hidden.grad).norm() / exact_hidden.grad.norm()).item()
    assert found.rounded.dhidden == pytest.approx(apart, rel=0.05)
    full = Head("fp32", head.hidden.float(), head.weight.float(), head.labels)
    assert study(full, [0.5], seeds=1).rounded is None


def test_bias_softcap_and_scale_are_followed(head):
    bias = torch.linspace(1, -1, 8192)
    transform = LogitTransform(1.2, 40.0, 0.9)
    bent = Head("bent", head.hidden, head.weight, head.labels, bias, transform)
    found = study(bent, [2.0**-8], seeds=1)
    z = 1.2 * (head.hidden.float() @ head.weight.float().T + bias)
    tail = (40 * torch.tanh(z / 40) / 0.9).scatter(1, head.labels[:, None], -torch.inf).softmax(1)
    own = own_block(head.labels, 64)
    expected = torch.where(own, 1.0, (tail.view(96, 64, 128).sum(2) * 2**8).clamp(max=1)).sum(1)
    torch.testing.assert_close(found.rows[0].live.float(), expected, rtol=1e-4, atol=1e-4)
    assert 0 < found.rows[0].errors.dhidden < 0.1  # the gradients are of the same logits


def test_flat_heads_go_the_exact_way(head):
    flat = Head("flat", head.hidden * 0, head.weight, head.labels)
    (row,) = study(flat, [2.0**-10], seeds=1).rows
    assert row.share == 1 and row.goes_exact("cpu") and row.speed_up(False) == 1
    assert not study(head, [2.0**-6], seeds=1).rows[0].goes_exact("cpu")


def test_names_of_tau():
    assert [named(x) for x in (2.0**-10, 0.25, 0.3)] == ["2^-10", "2^-2", "0.3"]
