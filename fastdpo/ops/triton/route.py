"""Block sums -> the bitmap of the pairs that the backward computes: ../routing.py's rule, and its weights.

q is an integer, a fraction of 2^32, so that its running sum does not see tiles, chunks of tokens or shards.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.random import philox

from ... import routing as rule
from ..problem import Forward
from .common import BLOCK, VARYING, TokenRange, num_tokens
from .launch import launch

ONE = tl.constexpr(rule.ONE)
MASK = tl.constexpr(rule.ONE - 1)


@triton.jit
def _odds(share, own, tau):
    """int64: routing.odds. The largest fp32 below 1 is the most that a quotient may round to."""
    sure = own | ~(share < tau)
    q = tl.minimum(tl.where(sure, 0.0, share / tl.where(tau > 0, tau, 1.0)), 1.0 - 2.0**-24)
    odds = tl.where(share == 0, 0, tl.maximum((q * float(ONE)).to(tl.int64), 1))
    return tl.where(sure, ONE, odds)


@triton.jit
def pair_weight(share, own, tau):
    """1 / q."""
    return tl.where(own | ~(share < tau), 1.0, float(ONE) / tl.maximum(_odds(share, own, tau), 1).to(tl.float32))


@triton.jit
def second_pair_weight(share, own, tau, second_tau):
    """1 / P(in the smaller set), given that the pair is in the larger one, kept at `tau`."""
    return pair_weight(tl.maximum(share, tau), own, second_tau)


@triton.jit
def _take(odds, start):
    """([T, K] bool: sure, or the running sum carries over 2^32; [T] where it ends)."""
    after = (tl.cumsum(odds, 1) + start[:, None]) & MASK
    taken = (odds == ONE) | (after < ((after - odds) & MASK))
    return taken, (start + tl.sum(odds, 1)) & MASK


@triton.jit
def _store_bits(target, kept, exists, num_bytes, T: tl.constexpr, K: tl.constexpr):
    """[T, K] bool to bytes at `target` [T, 1], bit k in bit k % 8 of byte k // 8."""
    bits = tl.reshape(kept.to(tl.int32), (T, K // 8, 8))
    byte = tl.sum(bits << tl.arange(0, 8)[None, None, :], 2)
    at = tl.arange(0, K // 8)
    tl.store(target + at[None, :], byte.to(tl.uint8), mask=exists[:, None] & (at < num_bytes)[None, :])


@triton.jit(do_not_specialize=VARYING)
def route_kernel(
    block_lse,  # [capacity, num_blocks]
    rest_lse,  # [capacity]
    tokens,
    seed,  # 0-d int64
    before,  # [2, capacity] int64 or None: odds of both sets on lower shards
    sums,  # [2, capacity] int64 or None: what this shard adds to them
    bitmap,  # [M, bitmap_stride]: set_bytes of pairs kept at tau, then as many of those in the smaller set
    most_pairs,  # [M] int32
    first_token,
    capacity,
    num_blocks,
    bitmap_stride,
    set_bytes,
    tau,
    second_tau,  # None: one set
    T: tl.constexpr,  # tokens of a program
    K: tl.constexpr,  # blocks at a time
):
    """A program goes along all blocks of T tokens, whose rows of the results it has to itself."""
    i = tl.program_id(0) * T + tl.arange(0, T)
    token = first_token + i
    n = num_tokens(tokens, first_token, capacity)
    if tl.program_id(0) * T >= n:
        return
    exists = i < n
    label = tl.load(tokens.labels + token, mask=exists, other=-1)
    own_block = tl.where(label < 0, -1, label // BLOCK)
    row = tl.load(tokens.rows + token, mask=exists, other=0).to(tl.int64)
    rest = tl.load(rest_lse + i, mask=exists, other=0.0)
    counter = token.to(tl.uint32)
    zero = counter * 0
    word, second_word, _, _ = philox(tl.load(seed), counter, zero, zero, zero)
    sum, second_sum = word.to(tl.int64), second_word.to(tl.int64)
    if before is not None:
        sum = (sum + tl.load(before + i, mask=exists, other=0)) & MASK
        second_sum = (second_sum + tl.load(before + capacity + i, mask=exists, other=0)) & MASK
    start, second_start = sum, second_sum
    total = tl.zeros((T,), tl.int64)
    for first in range(0, num_blocks, K):
        b = first + tl.arange(0, K)
        inside = exists[:, None] & (b < num_blocks)[None, :]
        x = tl.load(block_lse + i.to(tl.int64)[:, None] * num_blocks + b[None, :], mask=inside, other=float("-inf"))
        share = tl.exp(x - rest[:, None])
        own = b[None, :] == own_block[:, None]
        odds = tl.where(inside, _odds(share, own, tau), 0)
        total += tl.sum(odds, 1)
        kept, sum = _take(odds, sum)
        target = bitmap + row[:, None] * bitmap_stride + first // 8
        _store_bits(target, kept, exists, set_bytes - first // 8, T, K)
        if second_tau is not None:
            second = tl.where(kept, _odds(tl.maximum(share, tau), own, second_tau), 0)
            taken, second_sum = _take(second, second_sum)
            _store_bits(target + set_bytes, taken, exists, set_bytes - first // 8, T, K)
    tl.store(most_pairs + row, ((total + MASK) >> 32).to(tl.int32), mask=exists)
    if sums is not None:
        tl.store(sums + i, (sum - start) & MASK, mask=exists)
        tl.store(sums + capacity + i, (second_sum - second_start) & MASK, mask=exists)


def route(call, tokens: TokenRange, block_lse: Tensor, rest_lse: Tensor, result: Forward, routing, shards) -> None:
    """The bits and most_pairs of these tokens. A shard goes through its blocks once more for each set of pairs, after
    the ranks have exchanged the odds that come before theirs."""
    second = routing.second_tau
    tile, grid = call.token_rows(tokens)
    before = sums = None
    if shards is not None:
        before, sums = (torch.zeros(2, tokens.capacity, dtype=torch.int64, device=call.device) for _ in range(2))
    for known in range(1 if shards is None else 2 if second is None else 3):
        if known:
            before[known - 1] = shards.sum_before(sums[known - 1])
        launch(
            route_kernel,
            grid,
            tile,
            block_lse=block_lse,
            rest_lse=rest_lse,
            seed=routing.seed,
            before=before,
            sums=sums,
            bitmap=result.bitmap,
            most_pairs=result.most_pairs,
            num_blocks=call.num_blocks,
            bitmap_stride=result.bitmap.stride(0),
            set_bytes=rule.set_bytes(call.num_blocks),
            tau=routing.tau,
            second_tau=second,
            T=tile.m,
            K=tile.n,
            **tokens._asdict(),
        )
