"""The arithmetic that kernels share, against fp64."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton_case import DEVICE

from fastdpo.ops.triton import common


@triton.jit
def transform_kernel(product, z, slope, transform, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(product + i)
    tl.store(z + i, common.logit(x, transform))
    scale = transform.scale * transform.inv_temperature
    tl.store(slope + i, common.times_slope(x * 0 + scale, common.squashed(x, transform), transform))


@pytest.mark.parametrize(
    "transform", [(1.0, None, 1.0), (0.5, None, 2.0), (1.5, 7.0, 0.8), (-1.5, 7.0, 0.8), (0.0, 7.0, 1.0)], ids=str
)
def test_the_logit_and_its_slope(transform):
    scale, softcap, inv_temperature = transform
    x = torch.linspace(-30, 30, 64, dtype=torch.float64, requires_grad=True)
    y = scale * x
    expected = (y if softcap is None else softcap * torch.tanh(y / softcap)) * inv_temperature
    (slope,) = torch.autograd.grad(expected.sum(), x)
    ours = torch.empty(2, 64, device=DEVICE)
    product = x.detach().float().to(DEVICE)
    transform_kernel[(1,)](product=product, z=ours[0], slope=ours[1], transform=common.Transform(*transform), N=64)
    torch.testing.assert_close(ours[0].cpu().double(), expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours[1].cpu().double(), slope, rtol=1e-4, atol=1e-4)


@triton.jit
def rounding_kernel(source, expm1, half, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(source + i)
    tl.store(expm1 + i, common.expm1(x))
    tl.store(half + i, common.rounded(x, half.dtype.element_ty))


def test_expm1_and_rounding_to_bf16():
    x = -torch.logspace(-7, 1.5, 64, device=DEVICE)
    ours, half = torch.empty_like(x), torch.empty_like(x, dtype=torch.bfloat16)
    rounding_kernel[(1,)](source=x, expm1=ours, half=half, N=64)
    torch.testing.assert_close(ours.double(), torch.expm1(x.double()), rtol=1e-6, atol=0)
    assert torch.equal(half, x.bfloat16())
