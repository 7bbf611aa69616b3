"""Which pairs are kept, and their weights, against routing.py."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import triton
import triton.language as tl
from triton_case import DEVICE

from fastdpo import routing
from fastdpo.head import Routing
from fastdpo.ops.problem import Forward, Head, Rows
from fastdpo.ops.triton import route as wing
from fastdpo.ops.triton.call import Call
from fastdpo.ops.triton.common import TokenRange
from fastdpo.ops.triton.tokens import compact

N, V, H = 40, 3000, 8


def test_bits_of_two_sets():
    labels = torch.randint(0, V, (N,))
    call = Call(
        Head(torch.randn(N, H, device=DEVICE), torch.randn(V, H, device=DEVICE)), Rows(labels.to(DEVICE), -100, 0, V)
    )
    share = torch.randn(N, call.num_blocks).mul(3).softmax(1)
    rule = Routing.of(0.01, 0.04, torch.tensor(17, device=DEVICE))
    one = routing.set_bytes(call.num_blocks)
    bitmap = torch.zeros(N, 2 * one, dtype=torch.uint8, device=DEVICE)
    most_pairs = torch.zeros(N, dtype=torch.int32, device=DEVICE)
    saved = Forward(None, None, bitmap=bitmap, most_pairs=most_pairs)
    first_shard = SimpleNamespace(sum_before=torch.zeros_like)
    tokens, rest_lse = compact(call), torch.zeros(N, device=DEVICE)
    for first in (0, 16, 32):
        part = TokenRange(tokens, first, 16)
        block_lse = torch.nn.functional.pad(share[first : first + 16].log(), (0, 0, 0, max(0, first + 16 - N)))
        wing.route(call, part, block_lse.to(DEVICE), rest_lse[:16], wing.Draw.of(rule, saved), first_shard)
    expected, most = routing.route(share, labels, rule.taus, 17, torch.arange(N))
    bits = [routing.unpack_bits(x.cpu(), 16 * one) for x in (bitmap, expected)]
    assert (bits[0] != bits[1]).sum() <= 0.01 * bits[1].sum()  # rounding of a share moves later borders a little
    assert (most_pairs.cpu() - most).abs().max() <= 1


@triton.jit
def weights_kernel(share, weight, second, tau, second_tau, N: tl.constexpr):
    i = tl.arange(0, N)
    s = tl.load(share + i)
    tl.store(weight + i, wing.pair_weight(s, s < 0, tau))
    tl.store(second + i, wing.second_pair_weight(s, s < 0, tau, second_tau))


def test_weights_are_one_over_the_odds():
    share, tau, second_tau = torch.logspace(-8, -0.1, 64), 0.01, 0.05
    weight, second = torch.empty(2, 64, device=DEVICE)
    weights_kernel[(1,)](share=share.to(DEVICE), weight=weight, second=second, tau=tau, second_tau=second_tau, N=64)
    q = (share.double() / tau).clamp(max=1.0)
    torch.testing.assert_close(weight.cpu().double(), 1 / q, rtol=1e-3, atol=0)
    torch.testing.assert_close(
        second.cpu().double(), (second_tau / share.double().clamp(min=tau)).clamp(min=1.0), rtol=1e-3, atol=0
    )
