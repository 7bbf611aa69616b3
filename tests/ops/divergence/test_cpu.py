"""The CPU engine of the divergence against the oracle: the same pairs, and results that show no thread and no chunk."""

from __future__ import annotations

import pytest
import torch
from divergence_cases import KINDS, two_heads

from fastdpo.head import Routing
from fastdpo.ops import native
from fastdpo.ops.cpu import backward as cpu_backward
from fastdpo.ops.divergence import cpu, reference
from fastdpo.ops.divergence.problem import DivergenceUpstream, Heads
from fastdpo.ops.problem import Head, Needs, Tokens

pytestmark = pytest.mark.skipif(not native.available(), reason=str(native.REASON))


def problem(kind, beta, labelled=True, routes_logps=False, n=40, V=2000):
    case = two_heads(shape=(n,), V=V, H=20, H_ref=12, alike=0.7)
    labels = torch.randint(0, V, (n,)) if labelled else torch.full((n,), -1)
    tokens = Tokens(labels, None, None, n)
    heads = [Head(x.detach(), y.detach()) for x, y in ((case.hidden, case.weight), (case.ref_hidden, case.ref_weight))]
    return Heads(*heads, kind, beta, labelled, routes_logps), tokens, tokens


@pytest.mark.parametrize("labelled,routes_logps", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("kind,beta", KINDS)
def test_the_oracle_s_values_and_pairs(kind, beta, labelled, routes_logps, monkeypatch):
    monkeypatch.setattr(cpu_backward, "CROSSOVER", 2.0)
    given = problem(kind, beta, labelled, routes_logps)
    routing = Routing.of(0.02, 0.05, 11)
    found, expected = (e.forward(*given, stats=frozenset(["entropy"]), routing=routing) for e in (cpu, reference))
    for name, true in vars(expected).items():
        value = getattr(found, name)
        assert (value is None) == (true is None)
        if true is None or name == "bitmap":
            continue
        torch.testing.assert_close(value, true, rtol=2e-5, atol=2e-5 if name != "most_pairs" else 1)
    different = (found.bitmap != expected.bitmap).float().mean()
    assert different < 0.01  # where a running sum all but touches a point
    upstream = DivergenceUpstream(torch.randn(40), torch.randn(40) if routes_logps else torch.zeros(40))
    for kept in (expected, None):
        gradients = [
            e.backward(*given, expected, upstream, None if kept is None else routing, Needs(True, True), None)
            for e in (cpu, reference)
        ]
        for name in ("hidden", "weight"):
            a, b = (getattr(g, name) for g in gradients)
            assert (a - b).norm() < 2e-5 * b.norm()


@pytest.mark.parametrize("kind,beta", KINDS)
def test_neither_chunks_nor_threads_show(monkeypatch, kind, beta):
    monkeypatch.setattr(cpu_backward, "CROSSOVER", 2.0)
    given, routing = problem(kind, beta, n=60), Routing.of(0.05, 0.05, 4)
    upstream = DivergenceUpstream(torch.randn(60), torch.zeros(60))

    def run(threads, bytes_of_chunk):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        monkeypatch.setattr(cpu, "BLOCK_SUMS_BYTES", bytes_of_chunk)
        try:
            saved = cpu.forward(*given, routing=routing)
            return saved, cpu.backward(*given, saved, upstream, routing, Needs(True, True))
        finally:
            torch.set_num_threads(before)

    saved, grads = run(1, 1 << 30)
    other, other_grads = run(2, 1 << 30)
    for name, value in vars(saved).items():
        assert value is None or torch.equal(value, getattr(other, name)), name
    assert torch.equal(grads.hidden, other_grads.hidden) and torch.equal(grads.weight, other_grads.weight)
    small, _ = run(1, 8 * 16 * 5 * 7)  # seven tokens
    torch.testing.assert_close(small.divergence, saved.divergence, rtol=1e-5, atol=1e-6)
    assert (small.bitmap != saved.bitmap).float().mean() < 0.01


def test_logits_that_do_not_stay_are_computed_twice(monkeypatch):
    given = problem("jsd", 0.3)
    expected = cpu.forward(*given)
    monkeypatch.setattr(cpu, "KEPT_BYTES", 8 * 2000 * 33)  # 33 tokens' stay
    torch.testing.assert_close(cpu.forward(*given).divergence, expected.divergence, rtol=1e-6, atol=1e-7)
    monkeypatch.setattr(cpu, "KEPT_BYTES", 8 * 2000 * 31)
    torch.testing.assert_close(cpu.forward(*given).divergence, expected.divergence, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("isa", native.EXTENSION.supported_isas() if native.available() else [])
def test_every_instruction_set(isa, monkeypatch):
    before = native.EXTENSION.isa()
    try:
        assert native.EXTENSION.use_isa(isa)
        for kind, beta in KINDS:
            test_the_oracle_s_values_and_pairs(kind, beta, True, True, monkeypatch)
    finally:
        native.EXTENSION.use_isa(before)
