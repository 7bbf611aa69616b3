"""Block sums -> the bitmap of the pairs that the backward computes: ../routing.py's rule, and its weights.

q is an integer, a fraction of 2^32, so that its running sum does not see tiles, chunks of tokens or shards.
"""

from __future__ import annotations

from typing import NamedTuple

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


class Draw(NamedTuple):
    """One call's choice of pairs."""

    seed: Tensor | None = None  # 0-d int64
    tau: float | None = None
    second_tau: float | None = None  # None: one set
    bitmap: Tensor | None = None  # [M, sets * set_bytes]: pairs kept at tau, then those of them in the smaller set
    most_pairs: Tensor | None = None  # [M] int32
    before: Tensor | None = None  # [2, capacity] int64: odds of both sets on lower shards
    sums: Tensor | None = None  # [2, capacity] int64: what this shard adds to them

    @staticmethod
    def of(routing, saved: Forward) -> Draw:
        return (
            NOTHING_ROUTED
            if routing is None
            else Draw(routing.seed, routing.tau, routing.second_tau, saved.bitmap, saved.most_pairs)
        )


NOTHING_ROUTED = Draw()


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


@triton.jit
def route_tokens(
    draw,
    block_lse,
    rest,
    label,
    token,
    i,
    row,
    exists,
    capacity,
    num_blocks,
    set_bytes,
    T: tl.constexpr,
    K: tl.constexpr,
):
    """The bits and most_pairs of T tokens, whose rows of the results are the program's own: `i` in block_lse [capacity,
    num_blocks], with `rest` [T] the log-sum-exp of their tails, or None where block_lse holds the shares."""
    own_block = tl.where(label < 0, -1, label // BLOCK)
    SETS: tl.constexpr = 1 if draw.second_tau is None else 2
    counter = token.to(tl.uint32)
    zero = counter * 0
    word, second_word, _, _ = philox(tl.load(draw.seed), counter, zero, zero, zero)
    sum, second_sum = word.to(tl.int64), second_word.to(tl.int64)
    if draw.before is not None:
        sum = (sum + tl.load(draw.before + i, mask=exists, other=0)) & MASK
        second_sum = (second_sum + tl.load(draw.before + capacity + i, mask=exists, other=0)) & MASK
    start, second_start = sum, second_sum
    total = tl.zeros((T,), tl.int64)
    for first in range(0, num_blocks, K):
        b = first + tl.arange(0, K)
        inside = exists[:, None] & (b < num_blocks)[None, :]
        x = tl.load(block_lse + i.to(tl.int64)[:, None] * num_blocks + b[None, :], mask=inside, other=float("-inf"))
        share = x if rest is None else tl.exp(x - rest[:, None])
        own = b[None, :] == own_block[:, None]
        odds = tl.where(inside, _odds(share, own, draw.tau), 0)
        total += tl.sum(odds, 1)
        kept, sum = _take(odds, sum)
        target = draw.bitmap + row[:, None] * (SETS * set_bytes) + first // 8
        _store_bits(target, kept, exists, set_bytes - first // 8, T, K)
        if draw.second_tau is not None:
            second = tl.where(kept, _odds(tl.maximum(share, draw.tau), own, draw.second_tau), 0)
            taken, second_sum = _take(second, second_sum)
            _store_bits(target + set_bytes, taken, exists, set_bytes - first // 8, T, K)
    tl.store(draw.most_pairs + row, ((total + MASK) >> 32).to(tl.int32), mask=exists)
    if draw.sums is not None:
        tl.store(draw.sums + i, (sum - start) & MASK, mask=exists)
        tl.store(draw.sums + capacity + i, (second_sum - second_start) & MASK, mask=exists)


@triton.jit(do_not_specialize=VARYING)
def route_kernel(
    draw,
    block_lse,  # [capacity, num_blocks]
    rest_lse,  # [capacity]
    tokens,
    first_token,
    capacity,
    num_blocks,
    set_bytes,
    T: tl.constexpr,  # tokens of a program
    K: tl.constexpr,  # blocks at a time
):
    """A program goes along all blocks of T tokens."""
    i = tl.program_id(0) * T + tl.arange(0, T)
    token = first_token + i
    n = num_tokens(tokens, first_token, capacity)
    if tl.program_id(0) * T >= n:
        return
    exists = i < n
    label = tl.load(tokens.labels + token, mask=exists, other=-1)
    row = tl.load(tokens.rows + token, mask=exists, other=0).to(tl.int64)
    rest = tl.load(rest_lse + i, mask=exists, other=0.0)
    route_tokens(draw, block_lse, rest, label, token, i, row, exists, capacity, num_blocks, set_bytes, T, K)


def route(call, tokens: TokenRange, block_lse: Tensor, rest_lse: Tensor, draw: Draw, shards) -> None:
    """The bits and most_pairs of these tokens on a shard of the vocabulary, which goes through its blocks once more for
    each set of pairs, after the ranks have exchanged the odds that come before theirs; elsewhere `finish` does it."""
    before, sums = (torch.zeros(2, tokens.capacity, dtype=torch.int64, device=call.device) for _ in range(2))
    tile, grid = call.token_rows(tokens)
    for known in range(2 if draw.second_tau is None else 3):
        if known:
            before[known - 1] = shards.sum_before(sums[known - 1])
        launch(
            route_kernel,
            grid,
            tile,
            draw=draw._replace(before=before, sums=sums),
            block_lse=block_lse,
            rest_lse=rest_lse,
            num_blocks=call.num_blocks,
            set_bytes=rule.set_bytes(call.num_blocks),
            T=tile.m,
            K=tile.n,
            **tokens._asdict(),
        )
