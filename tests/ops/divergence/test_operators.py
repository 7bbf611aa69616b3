"""Autograd around the divergence: what is saved, what is computed for which gradient."""

from __future__ import annotations

import pytest
import torch
from divergence_cases import two_heads

import fastdpo
from fastdpo.ops.divergence import operators
from fastdpo.ops.problem import Needs


def spied(monkeypatch) -> list:
    seen, run = [], operators._run

    def recorded(heads, step, *arguments, **options):
        seen.append((step, arguments, options))
        return run(heads, step, *arguments, **options)

    monkeypatch.setattr(operators, "_run", recorded)
    return seen


def test_only_what_is_asked_for(monkeypatch):
    seen, heads = spied(monkeypatch), two_heads()
    with torch.no_grad():
        heads()
    assert seen[-1][2]["routing"] is None
    heads.weight.requires_grad_(False)
    heads(stats=("entropy",)).divergence.sum().backward()
    assert seen[-2][2]["stats"] == {"entropy"}
    assert seen[-1][1][3] is not None and seen[-1][1][4] == Needs(hidden=True)
    found = heads(stats=("entropy",))
    (found.divergence + found.entropy).sum().backward()  # the entropy's gradient takes the exact path
    assert seen[-1][1][3] is None and seen[-1][1][1].bitmap is None


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


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
def test_one_node_of_a_compiled_graph(kind, dynamic):
    heads = two_heads(full=True)

    def step(hidden, weight):
        found = fastdpo.linear_divergence(
            hidden, weight, heads.ref_hidden, heads.ref_weight, heads.labels, heads.bias, heads.ref_bias,
            kind=kind, stats=("logps", "entropy", "ref_logps"), lora=(*heads.lora[:2], 0.5), backward="exact",
        )  # fmt: skip
        return (found.divergence * 2 + found.logps).sum(), found.entropy.detach() + found.ref_logps

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    results = []
    for run in (step, compiled):
        loss, other = run(heads.hidden, heads.weight)
        results.append((loss, other, *torch.autograd.grad(loss, heads.leaves)))
    torch.testing.assert_close(*results)


def test_a_mask_and_a_routed_backward_compile():
    heads = two_heads(V=2000)

    def step(hidden, weight):
        mask = heads.labels != -100
        return fastdpo.linear_divergence(hidden, weight, heads.ref_hidden, heads.ref_weight, mask, seed=3, tau=0.1)[0]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for run in (step, compiled):
        value = run(heads.hidden, heads.weight)
        results.append((value, *torch.autograd.grad(value.sum(), heads.leaves)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("routed", [False, True])
def test_opcheck(monkeypatch, routed):
    heads, taken = two_heads(), []
    real = operators._forward_operator

    def recorded(tensors, key, scalars):
        taken.append((tensors, key, scalars))
        return real(tensors, key, scalars)

    monkeypatch.setattr(operators, "traced", lambda *_: True)
    monkeypatch.setattr(operators, "_forward_operator", recorded)
    heads(stats=("entropy", "logps"), kind="reverse_kl", **({"tau": 0.1} if routed else {"backward": "exact"}))
    tensors, key, scalars = taken[0]
    torch.library.opcheck(operators.divergence_op, (*tensors, key), scalars._asdict())
    with pytest.raises(ValueError, match="labels must be the flat rows"):
        operators.divergence_op(*tensors[:5], heads.labels, *tensors[6:], key, **scalars._asdict())
