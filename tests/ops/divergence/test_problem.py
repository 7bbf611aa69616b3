"""The bounds by which a routed backward keeps blocks are bounds, in any regime of two distributions."""

from __future__ import annotations

import pytest
import torch
from divergence_cases import KINDS

from fastdpo.ops.divergence import reference
from fastdpo.ops.divergence.problem import EPS, Heads
from fastdpo.routing import BLOCK


@pytest.mark.parametrize("kind,beta", KINDS)
@pytest.mark.parametrize("difference", [0.0, 1e-4, 0.1, 3.0, 30.0])
def test_a_bound_holds_the_sum_of_its_block(kind, beta, difference):
    z = torch.randn(16, 5 * BLOCK, dtype=torch.float64) * 3
    log_p = z.log_softmax(1)
    log_r = (z + difference * torch.randn_like(z)).log_softmax(1)
    heads = Heads(None, None, kind, beta, labelled=False, routes_logps=False)
    _, of_mean = reference._terms(heads, log_p, log_r)
    mean = None if of_mean is None else of_mean.sum(1)
    dz = reference._unscaled_dz(heads, log_p, log_r, None if mean is None else mean[:, None])
    blocks = dz.abs().unflatten(1, (-1, BLOCK)).sum(2)
    bounds = reference._bounds(heads, log_p, log_r, mean)
    assert (blocks <= bounds * (1 + 1e-12)).all()
    mass = (log_p.exp() + log_r.exp()).unflatten(1, (-1, BLOCK)).sum(2)
    if difference == 0.0:
        assert (bounds <= EPS * mass).all()
    if kind == "forward_kl":
        assert (bounds <= mass * (1 + 1e-12)).all()
    assert (dz.sum(1).abs() < 1e-12).all()  # softmax: dz sums to 0
