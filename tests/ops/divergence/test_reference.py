"""The oracle's routed gradient: its mean over draws is the exact one, and each engine's."""

from __future__ import annotations

import pytest
import torch
from divergence_cases import KINDS, two_heads

from fastdpo.ops.cpu import backward as cpu_backward


def on_the_routed_path(engine, monkeypatch):
    if engine == "cpu":
        monkeypatch.setattr(cpu_backward, "CROSSOVER", 2.0)
    elif engine == "triton":
        from fastdpo.ops.triton import backward as triton_backward

        monkeypatch.setattr(triton_backward, "CROSSOVER", 2.0)


@pytest.mark.parametrize("of", ["mask", "labels", "logps too"])
@pytest.mark.parametrize("kind,beta", KINDS)
def test_the_mean_over_draws_is_the_exact_gradient(engine, monkeypatch, kind, beta, of):
    on_the_routed_path(engine, monkeypatch)
    if engine == "triton" and not torch.cuda.is_available():
        pytest.skip("minutes in the interpreter, where its pairs and weights are held against the oracle's")
    draws = 120
    heads = two_heads(shape=(8,), V=1500, H=12, H_ref=10, alike=0.6)
    upstream = torch.randn(2, 8)

    def gradients(**options):
        found = heads(of == "mask", kind=kind, jsd_beta=beta, stats=("logps",) if of == "logps too" else (), **options)
        loss = (found.divergence * upstream[0]).sum()
        loss = loss if found.logps is None else loss + (found.logps * upstream[1]).sum()
        return [g.flatten().double() for g in torch.autograd.grad(loss, heads.leaves)]

    exact = gradients(backward="exact")
    directions = [torch.cat((torch.randn(48, g.numel(), dtype=torch.float64), g[None])) for g in exact]
    samples = [[], []]
    for seed in range(draws):
        for store, g, d in zip(samples, gradients(tau=(0.1, 0.2), seed=seed), directions):
            store.append(d @ g)
    for store, g, d in zip(samples, exact, directions):
        values, expected = torch.stack(store), d @ g
        assert values.std(0).min() > 0
        rounding = 1e-6 * d.norm(dim=1) * g.norm()
        error = (values.mean(0) - expected) / (values.std(0) / draws**0.5 + rounding)
        assert error.pow(2).mean() < 4.0 and error.abs().max() < 6.0


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
