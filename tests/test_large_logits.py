"""Logits too large for fp32 to tell apart: two products of the same numbers then differ by up to 1e5 nats."""

from __future__ import annotations

import pytest
import torch

import fastdpo

SIZES = pytest.mark.parametrize("size", [1e8, 1e12])
BACKWARDS = pytest.mark.parametrize(
    "options", [{"backward": "exact"}, {"tau": 0.3, "seed": 1}], ids=["exact", "routed"]
)


def tokens(size, V=300, H=70):
    """One at a time, whose bias's gradient is its dz: the label is the largest logit, the second, the smallest."""
    generator = torch.Generator().manual_seed(3)
    hidden, weight, bias = (torch.randn(*shape, generator=generator) for shape in [(3, H), (V, H), (V,)])
    order = (hidden @ weight.T).argsort(descending=True)
    for i, rank in enumerate([0, 1, -1]):
        device = torch.get_default_device()
        yield [x.to(device) for x in (hidden[i : i + 1] * size, weight, order[i : i + 1, rank], bias)]


@BACKWARDS
@SIZES
def test_no_probability_is_above_one(engine, size, options):
    for hidden, weight, label, bias in tokens(size):
        bias.requires_grad_()
        logps = fastdpo.linear_logps(hidden, weight, label, bias, **options)
        logps.sum().backward()
        assert (logps <= 0).all() and (bias.grad.abs() <= 1).all()


@BACKWARDS
@SIZES
def test_gradients_of_statistics_are_finite(engine, size, options):
    for hidden, weight, label, bias in tokens(size):
        leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
        found = fastdpo.linear_token_stats(hidden, weight, label, bias, stats=("entropy", "lse"), **options)
        assert (found.entropy >= 0).all() and (found.entropy <= 6).all()
        (found.logps + found.entropy + found.lse).sum().backward()
        assert all(x.grad.isfinite().all() for x in leaves)
        assert (bias.grad.abs() <= 6).all()


@BACKWARDS
@pytest.mark.parametrize("kind, size", [("forward_kl", 1e8), ("reverse_kl", 1e12), ("jsd", 1e8)])
def test_divergences(engine, kind, size, options):
    """The gradients of forward_kl and jsd are differences of probabilities, that of reverse_kl is finite."""
    for hidden, weight, label, bias in tokens(size):
        own = bias.clone().requires_grad_()
        found = fastdpo.linear_divergence(hidden, weight, -hidden, weight, label, own, bias, kind=kind, **options)
        found.divergence.sum().backward()
        assert own.grad.isfinite().all()
        assert kind == "reverse_kl" or (own.grad.abs() <= 1).all()
