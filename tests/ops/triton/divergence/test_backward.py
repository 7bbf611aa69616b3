"""Exact and routed gradients against the reference: ranges, rounds and slabs, and what is asked for."""

from __future__ import annotations

import pytest
import torch
from heads import relative_error
from triton_divergence_case import KINDS, Case, strided

from fastdpo.head import LogitTransform
from fastdpo.ops.problem import Gradients, Needs
from fastdpo.ops.triton import backward

ROUTED = {"exact": None, "routed": (0.2, 0.05), "one tau": (0.1, 0.1), "smaller tau for dhidden": (0.02, 0.1)}
OPTIONS = {
    "bias": True,
    "rank": 3,
    "transform": LogitTransform(1.2, 20.0, 0.8),
    "ref_transform": LogitTransform(-0.7, 9.0, 1.1),
    "layout": strided,
}


@pytest.fixture(autouse=True)
def always_routed(monkeypatch):
    monkeypatch.setattr(backward, "CROSSOVER", 1.0)


@pytest.mark.parametrize("how", ROUTED)
@pytest.mark.parametrize("labelled", [True, False], ids=["labels", "mask"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind, labelled, how):
    case = Case(kind, labelled=labelled, routed=ROUTED[how], **OPTIONS)
    small = kind == "jsd" and not labelled  # a difference that the formula in fp32 holds no better
    case.check(case.upstream(without=(2, 8)), tolerance=2e-5 if small else 5e-6)


@pytest.mark.parametrize("labelled", [True, False], ids=["labels", "mask"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_the_entropy_too(kind, labelled):
    case = Case(kind, labelled=labelled, **OPTIONS)
    case.check(case.upstream(entropy=True))


def test_logps_that_are_not_routed():
    """Their upstream gradient is 0 then: a block is kept for its part of the divergence's alone."""
    case = Case("forward_kl", routed=(0.1, 0.1), stats=frozenset())
    upstream = case.upstream()
    upstream.coef.zero_()
    case.check(upstream)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["exact", "routed"])
@pytest.mark.parametrize("crossover", [1.0, 0.0])
def test_many_ranges_rounds_and_slabs(small_workspaces, monkeypatch, how, crossover):
    """As in ../test_backward.py; where too many pairs live, a routed call gives the exact gradient."""
    monkeypatch.setattr(backward, "CROSSOVER", crossover)
    case = Case("reverse_kl", N=300, V=1000, H=48, routed=ROUTED[how], bias=True, rank=3)
    if how == "routed" and crossover == 0.0:
        upstream = case.upstream()
        (ours, _), case.routed = case.gradients(upstream), None
        for name, gradient in vars(case.gradients(upstream)[1]).items():
            assert relative_error(getattr(ours, name), gradient) < 5e-6, name
    elif crossover:
        case.check()


@pytest.mark.parametrize("how", ["exact", "routed"])
@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_only_what_is_asked_for(how, needs):
    Case("jsd", routed=ROUTED[how]).check(needs=Needs(*needs, False, False, False))


@pytest.mark.parametrize("how", ["exact", "routed"])
@pytest.mark.parametrize("dtype, ref_dtype", [(torch.float16, torch.float16), (torch.float16, torch.float32)], ids=str)
def test_small_upstream_gradients_survive_fp16(how, dtype, ref_dtype):
    case = Case("forward_kl", dtype=dtype, ref_dtype=ref_dtype, routed=ROUTED[how], size=1.0)
    upstream = case.upstream()
    for coef in (upstream.coef_divergence, upstream.coef):
        coef.abs_().mul_(1e-5).add_(1e-5)
    case.check(upstream)


@pytest.mark.parametrize("how", ["exact", "routed"])
def test_adds_to_a_gradient_that_is_there(how):
    case = Case("forward_kl", routed=ROUTED[how])
    place = torch.randn_like(case.heads.student.weight)
    before, upstream = place.clone(), case.upstream()
    ours, _ = case.gradients(upstream, sums=Gradients(weight=place))
    alone, _ = case.gradients(upstream)
    assert ours.weight is place
    torch.testing.assert_close(place, before + alone.weight, rtol=1e-5, atol=1e-5)


def test_repeats_bit_for_bit(deterministic):
    case = Case("jsd", N=200, routed=(0.05, 0.1))
    upstream = case.upstream()
    first, second = (case.gradients(upstream)[0] for _ in range(2))
    assert torch.equal(first.hidden, second.hidden) and torch.equal(first.weight, second.weight)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_mean_over_draws_is_the_exact_gradient(kind):
    """16 tokens of one row, whose draws are independent, 12 times."""
    case = Case(kind, N=16, V=1500, routed=(0.3, 0.3), labelled=False)
    case.labels.zero_()
    for head in (case.heads.student, case.heads.teacher):
        head.hidden.copy_(head.hidden[3].expand_as(head.hidden))
    case.rows.labels.zero_()
    upstream = case.upstream()
    upstream.coef_divergence.fill_(1.0)
    draws = torch.cat([_with_seed(case, upstream, seed) for seed in range(12)]).double()
    case.routed = None
    exact = case.gradients(upstream)[0].hidden[0].double()
    direction = exact / exact.norm()
    along = draws @ direction
    assert along.std() > 1e-3 * exact.norm()
    assert (along.mean() - exact.norm()).abs() < 4 * along.std() / len(along) ** 0.5


def _with_seed(case, upstream, seed):
    from unittest.mock import patch

    with patch("triton_divergence_case.SEED", seed + 2**64):
        return case.gradients(upstream)[0].hidden.cpu()
