"""Ranges, rounds and slabs of the backward, and both sides of its crossover, against the reference."""

from __future__ import annotations

import pytest
import torch
from heads import peaked_head, relative_error, small_head
from triton_case import DEVICE, ROUTED, Case

from fastdpo.ops import reference
from fastdpo.ops.problem import Needs, Upstream
from fastdpo.ops.triton import backward, memory
from fastdpo.ops.triton.forward import forward


@pytest.mark.slow
@pytest.mark.parametrize("how", ROUTED)
@pytest.mark.parametrize("crossover", [1.0, 0.0])
def test_many_ranges_rounds_and_slabs(small_workspaces, monkeypatch, how, crossover):
    """300 tokens in ranges of 128, 8 blocks in lists of a few, dweight in slabs summed over three chunks of tokens."""
    if ROUTED[how] is None and crossover == 0.0:
        pytest.skip("the exact backward has no crossover")
    monkeypatch.setattr(backward, "CROSSOVER", crossover)
    head = peaked_head(N=300, V=1000, H=48)
    head.bias = torch.randn(1000, dtype=torch.float64)
    head.lora = (torch.randn(4, 48).double() * 0.1, torch.randn(1000, 4).double() * 0.1, 0.7)
    head.labels[torch.rand(300) < 0.2] = -100
    case = Case(head, routed=ROUTED[how] if crossover else None, softcap=20.0)
    if crossover == 0.0:  # every call finds too many pairs: the exact gradient, from the routed call's launches
        needs = Needs(True, True, True, True, True)
        case.routed = ROUTED[how]
        mine = case.routing(True, needs)
        coef = torch.randn(300).to(DEVICE)
        saved = forward(case.head, case.rows, stats=frozenset(), routing=mine, shards=None)
        ours = backward.backward(case.head, case.rows, saved, Upstream(coef), mine, needs)
        expected = reference.forward(case.oracle, case.tokens)
        grads = reference.backward(
            case.oracle, case.tokens, expected, Upstream(coef[case.keep].double()), None, needs
        )  # fmt: skip
        for name, gradient in vars(grads).items():
            assert relative_error(getattr(ours, name), gradient) < 5e-6, name
        return
    case.check(torch.randn(300))


@pytest.mark.slow
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("crossover", [1.0, 0.0])
def test_tokens_that_ranges_and_chunks_do_not_divide(monkeypatch, crossover, trained):
    """600 tokens in ranges of 384 for dhidden, and in chunks of 256 for dweight."""
    row = 4 * 48
    sizes = {"SUMS": 384 * row, "WORKSPACE": 128 * row + 256 * 128 * 4}
    for name, size in sizes.items():
        monkeypatch.setattr(memory, name, size)
    monkeypatch.setattr(backward, "CROSSOVER", crossover)
    case = Case(peaked_head(N=600, V=700, H=48))
    needs = Needs(True, trained, False, False, False)
    routing = None
    if crossover == 0.0:  # the exact path of a routed call
        case.routed = (0.1, 0.1)
        routing = case.routing(True, needs)
    saved = forward(case.head, case.rows, stats=frozenset(), routing=routing, shards=None)
    coef = torch.randn(600).to(DEVICE)
    ours = backward.backward(case.head, case.rows, saved, Upstream(coef), routing, needs)
    expected = reference.forward(case.oracle, case.tokens)
    upstream = Upstream(coef[case.keep].double())
    grads = reference.backward(case.oracle, case.tokens, expected, upstream, None, needs)
    assert relative_error(ours.hidden, grads.hidden) < 5e-6
    if trained:
        assert relative_error(ours.weight, grads.weight) < 5e-6


@pytest.mark.parametrize("how", ["exact", "routed"])
@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_only_what_is_asked_for(monkeypatch, how, needs):
    monkeypatch.setattr(backward, "CROSSOVER", 1.0)
    head = small_head(N=40, V=700)
    Case(head, routed=ROUTED[how]).check(torch.randn(40), needs=Needs(*needs, False, False, False))
