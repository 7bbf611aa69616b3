"""Arithmetic of two distributions, in kernels of a few numbers, against fp64."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from triton_case import DEVICE

from fastdpo.ops.divergence.problem import Heads
from fastdpo.ops.divergence.reference import _bounds
from fastdpo.ops.triton.divergence import log_ratio as wing

N = 64


@triton.jit
def mixture_kernel(x, kind, of_p, of_label, N: tl.constexpr):
    i = tl.arange(0, N)
    value = tl.load(x + i)
    tl.store(of_p + i, wing.direction(value, kind))
    tl.store(of_label + i, wing.label_direction(value, kind))


@pytest.mark.parametrize("beta", [0.5, 0.1, 0.9, 1e-6, 1 - 1e-6])
def test_log_of_p_over_the_mixture(beta):
    kind = wing.Kind.of(Heads(None, None, "jsd", beta, True, False))
    x = torch.cat((torch.logspace(-6, 2, N // 2), -torch.logspace(-6, 2, N // 2)))
    of_p, of_label = torch.empty(2, N, device=DEVICE)
    mixture_kernel[(1,)](x=x.to(DEVICE), kind=kind, of_p=of_p, of_label=of_label, N=N)
    exact = -torch.log1p(beta * torch.expm1(-x.double()))
    for found in (of_p, of_label):
        torch.testing.assert_close(found.cpu().double(), exact, rtol=1e-6, atol=1e-6)
    if 0.1 <= beta <= 0.9:
        torch.testing.assert_close(of_label.cpu().double(), exact, rtol=1e-5, atol=0)


def test_the_ends_of_the_mixture():
    kind = wing.Kind.of(Heads(None, None, "jsd", 0.25, True, False))
    x = torch.full((N,), torch.inf)
    x[1::2] = -torch.inf
    of_p, of_label = torch.empty(2, N, device=DEVICE)
    mixture_kernel[(1,)](x=x.to(DEVICE), kind=kind, of_p=of_p, of_label=of_label, N=N)
    for found in (of_p, of_label):
        torch.testing.assert_close(found[0].item(), -torch.tensor(0.75).log().item())
        assert (found[1::2] == -torch.inf).all()


@triton.jit
def bound_kernel(log_p, log_r, mean, kind, out, T: tl.constexpr):
    at = tl.arange(0, T)[:, None] * 128 + tl.arange(0, 128)[None, :]
    t, ref_t = tl.load(log_p + at), tl.load(log_r + at)
    bound = wing.bound_of(tl.exp(t), tl.exp(ref_t), t - ref_t, tl.load(mean + tl.arange(0, T)), kind)
    tl.store(out + tl.arange(0, T), bound)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_bounds_of_blocks(kind):
    """Of one that hardly differs, one that differs, one that the student lacks, one that the teacher lacks."""
    log_p = torch.randn(4, 128).log_softmax(1) - 2
    log_r = log_p + torch.tensor([1e-4, 1.0, 0.0, 0.0])[:, None] * torch.randn(4, 128)
    log_p[2, :64], log_r[3, :64] = -torch.inf, -torch.inf
    mean, out = torch.rand(4), torch.empty(4, device=DEVICE)
    heads = Heads(None, None, kind, 0.3, True, False)
    bound_kernel[(1,)](
        log_p=log_p.to(DEVICE), log_r=log_r.to(DEVICE), mean=mean.to(DEVICE), kind=wing.Kind.of(heads), out=out, T=4
    )
    expected = _bounds(heads, log_p.double(), log_r.double(), None if kind == "forward_kl" else mean.double())[:, 0]
    torch.testing.assert_close(out.cpu().double(), expected, rtol=1e-4, atol=0)


def test_a_share_of_nothing_is_nothing():
    @triton.jit
    def kernel(bound, total, out):
        i = tl.arange(0, 4)
        tl.store(out + i, wing.at_least(wing.share_of(tl.load(bound + i), tl.load(total + i)), 0.1))

    names = SimpleNamespace(bound=[0.0, 1.0, torch.nan, 0.04], total=[0.0, 4.0, 1.0, 0.8])
    out = torch.empty(4, device=DEVICE)
    kernel[(1,)](*(torch.tensor(x, device=DEVICE) for x in (names.bound, names.total)), out)
    found = out.tolist()
    assert found[:2] == pytest.approx([0.1, 0.25]) and found[2] != found[2] and found[3] == pytest.approx(0.1)
