"""The oracle's routed gradient: its mean over draws is the exact one, and each engine's."""

from __future__ import annotations

import os

import pytest
import torch
from divergence_cases import KINDS, two_heads

from fastdpo.ops.cpu import backward as cpu_backward


def on_the_routed_path(engine, monkeypatch):
    if engine == "triton" and not torch.cuda.is_available():
        pytest.skip("minutes in the interpreter, where its pairs and weights are held against the oracle's")
    if engine == "cpu":
        monkeypatch.setattr(cpu_backward, "CROSSOVER", 2.0)
    elif engine == "triton":
        from fastdpo.ops.triton import backward as triton_backward

        monkeypatch.setattr(triton_backward, "CROSSOVER", 2.0)


DRAWS = int(os.environ.get("FASTDPO_TEST_DRAWS", 120))
NEAR = {  # what decides about a pair, and numbers near which it turns: (tau of both gradients, likeness of the heads)
    "one set": ((0.1, 0.1), 0.6),
    "dweight's set larger": ((0.2, 0.02), 0.6),
    "a set far larger": ((1e-6, 0.5), 0.6),
    "above most shares": ((0.9, 0.9), 0.6),
    "defaults": (None, 0.6),
    "nearly equal heads": ((0.1, 0.2), 0.999),
    "other heads": ((0.1, 0.2), 0.0),
}


def check_mean_over_draws(heads, tau, of, **options):
    upstream = torch.randn(2, *heads.labels.shape)

    def gradients(**backward):
        found = heads(of == "mask", stats=("logps",) if of == "logps too" else (), **options, **backward)
        loss = (found.divergence * upstream[0]).sum()
        loss = loss if found.logps is None else loss + (found.logps * upstream[1]).sum()
        return [g.flatten().double() for g in torch.autograd.grad(loss, heads.leaves)]

    exact = gradients(backward="exact")
    directions = [torch.cat((torch.randn(48, g.numel(), dtype=torch.float64), g[None])) for g in exact]
    samples = [[], []]
    for seed in range(DRAWS):
        for store, g, d in zip(samples, gradients(tau=tau, seed=seed), directions):
            store.append(d @ g)
    for store, g, d in zip(samples, exact, directions):
        values, expected = torch.stack(store), d @ g
        rounding = 1e-6 * d.norm(dim=1) * g.norm()
        error = (values.mean(0) - expected) / (values.std(0) / DRAWS**0.5 + rounding)
        assert error.pow(2).mean() < 4.0 and error.abs().max() < 6.0
        assert error[-1].abs() < (4.0 if DRAWS >= 2000 else 5.0)  # along the gradient itself
    return samples


@pytest.mark.parametrize("of", ["mask", "labels", "logps too"])
@pytest.mark.parametrize("kind,beta", KINDS)
def test_the_mean_over_draws_is_the_exact_gradient(engine, monkeypatch, kind, beta, of):
    on_the_routed_path(engine, monkeypatch)
    heads = two_heads(shape=(8,), V=1500, H=12, H_ref=10, alike=0.6)
    samples = check_mean_over_draws(heads, (0.1, 0.2), of, kind=kind, jsd_beta=beta)
    assert all(torch.stack(store).std(0).min() > 0 for store in samples)


@pytest.mark.parametrize("near", NEAR)
@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
def test_the_mean_near_every_decision(engine, monkeypatch, kind, near):
    on_the_routed_path(engine, monkeypatch)
    tau, alike = NEAR[near]
    heads = two_heads(shape=(8,), V=1500, H=12, H_ref=10, alike=alike)
    check_mean_over_draws(heads, tau, "logps too", kind=kind)


@pytest.mark.parametrize("above", [False, True])
def test_the_mean_where_the_exact_path_takes_over(monkeypatch, above):
    """Whichever path a call takes, no draw decides it."""
    monkeypatch.setenv("FASTDPO_ENGINE", "cpu")
    heads, found = two_heads(shape=(8,), V=1500, H=12, H_ref=10, alike=0.6), []
    decide = cpu_backward._Routed

    def recorded(ops, makes_dz, bitmap, routing):
        found.append(routing)
        return decide(ops, makes_dz, bitmap, routing)

    monkeypatch.setattr(cpu_backward, "_Routed", recorded)
    low, high = 0.0, 1.0
    for _ in range(12):  # where it turns
        middle = (low + high) / 2
        monkeypatch.setattr(cpu_backward, "CROSSOVER", middle)
        found.clear()
        torch.autograd.grad(heads(kind="forward_kl", tau=(0.1, 0.2), seed=0).divergence.sum(), heads.leaves)
        low, high = (low, middle) if found else (middle, high)
    monkeypatch.setattr(cpu_backward, "CROSSOVER", low if above else high)
    found.clear()
    check_mean_over_draws(heads, (0.1, 0.2), "labels", kind="forward_kl")
    assert len(found) == (0 if above else DRAWS)


@pytest.mark.parametrize("alike", [0.0, 0.9, 0.999])
def test_the_error_is_relative_to_a_token_s_own_gradient(alike):
    """Also where student and teacher nearly agree, and the gradient is a small difference of large terms."""
    heads = two_heads(shape=(32,), V=128 * 40, H=16, H_ref=16, alike=alike)
    for kind, beta in KINDS:
        exact, routed = (
            torch.autograd.grad(heads(kind=kind, jsd_beta=beta, **options).divergence.sum(), [heads.hidden])[0]
            for options in ({"backward": "exact"}, {"seed": 5})
        )
        kept = heads.labels != -100
        error = (routed - exact)[kept].norm(dim=1) / exact[kept].norm(dim=1)
        assert error.median() < 0.02 and error.max() < 0.2, (kind, error.max())
