"""Autograd around the divergence: what is saved, what is computed for which gradient."""

from __future__ import annotations

import pytest
import torch
from divergence_cases import two_heads

from fastdpo.ops.divergence import function
from fastdpo.ops.problem import Needs


def spied(monkeypatch) -> list:
    seen, run = [], function._run

    def recorded(heads, step, *arguments, **options):
        seen.append((step, arguments, options))
        return run(heads, step, *arguments, **options)

    monkeypatch.setattr(function, "_run", recorded)
    return seen


def test_only_what_is_asked_for(monkeypatch):
    seen, heads = spied(monkeypatch), two_heads()
    with torch.no_grad():
        heads()
    assert seen[-1][2]["routing"] is None
    heads.weight.requires_grad_(False)
    heads(stats=("entropy",)).divergence.sum().backward()
    assert seen[-2][2]["stats"] == {"entropy"}
    assert seen[-1][1][4] is not None and seen[-1][1][5] == Needs(hidden=True)
    found = heads(stats=("entropy",))
    (found.divergence + found.entropy).sum().backward()  # the entropy's gradient takes the exact path
    assert seen[-1][1][4] is None and seen[-1][1][2].bitmap is None


def test_default_tau(monkeypatch):
    seen, heads = spied(monkeypatch), two_heads()
    heads()
    assert seen[-1][2]["routing"].taus == (2.0**-9,)
    heads(stats=("logps",))
    assert seen[-1][2]["routing"].taus == (2.0**-10,)
    heads(backward="exact")
    assert seen[-1][2]["routing"] is None


def test_manual_seed_repeats_the_draws():
    heads = two_heads(V=2000)

    def gradient():
        return torch.autograd.grad(heads(tau=0.1).divergence.sum(), [heads.hidden])[0]

    torch.manual_seed(5)
    first, other = gradient(), gradient()
    torch.manual_seed(5)
    assert torch.equal(first, gradient()) and not torch.equal(first, other)


def test_no_upstream_gradient_at_all():
    heads = two_heads()
    found = heads(stats=("ref_logps", "logps"))
    assert torch.autograd.grad(found.logps.sum(), heads.leaves, retain_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        found.ref_logps.sum().backward()


def test_accumulates_into_grad():
    heads = two_heads()
    expected = torch.autograd.grad(heads(backward="exact").divergence.sum(), [heads.weight])[0]
    heads.weight.grad = torch.ones_like(heads.weight)
    place = heads.weight.grad
    heads(backward="exact", accumulate_into="grad").divergence.sum().backward()
    assert heads.weight.grad is place
    torch.testing.assert_close(place, expected + 1, rtol=1e-5, atol=1e-6)
