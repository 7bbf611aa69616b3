"""PairSums of a token's blocks -> its divergence and statistics, the bounds of its blocks, and the pairs they choose.

A divergence is a sum of terms that are never negative, not of large ones that cancel: with L = log P - log R

    KL(p || r) = sum P (phi(-L) + KL inside the block)        phi(x) = exp(x) - 1 - x, as probabilities sum to 1
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....routing import set_bytes
from ...divergence.problem import Heads
from ..common import VARYING, TokenRange, exp, expm1, num_tokens
from ..launch import launch
from ..route import Draw, route_tokens
from ..stats import add_exp, label_logp, log1p
from .call import TwoHeads
from .log_ratio import EPS2, Kind, at_least, jsd_terms, label_over_mixture, share_of
from .sums import PairSums


class PairResults(NamedTuple):
    """[M] fp32, as DivergenceForward has them."""

    divergence: Tensor
    lse: Tensor
    ref_lse: Tensor
    mean: Tensor | None
    logps: Tensor | None
    ref_logps: Tensor | None
    entropy: Tensor | None
    total: Tensor | None

    @staticmethod
    def empty(heads: Heads, stats: Collection[str], routed: bool, m: int, device: torch.device) -> PairResults:
        has_mean, labelled = heads.kind != "forward_kl", heads.labelled
        wanted = True, True, True, has_mean, labelled, labelled, "entropy" in stats, routed
        return PairResults(*(torch.empty(m, dtype=torch.float32, device=device) if one else None for one in wanted))


@triton.jit
def phi(x):
    """exp(x) - 1 - x, to a relative precision near 0 too."""
    series = x * x * 0.5 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7 * (1 + x / 8))))))
    return tl.where(tl.abs(x) < 0.5, series, tl.exp(x) - 1.0 - x)


@triton.jit
def _kl(a, log_a, log_b, inside):
    """What a part of the vocabulary adds to KL(a || b); without any of a it is what the sum of b takes."""
    return tl.where(a == 0, tl.exp(log_b), a * (phi(log_b - log_a) + inside))


@triton.jit
def _masses(lse, first, exists, num_blocks, T: tl.constexpr, K: tl.constexpr):
    """[T] log-sum-exp of all blocks."""
    m, s = tl.full((T,), float("-inf"), tl.float32), tl.zeros((T,), tl.float32)
    for start in range(0, num_blocks, K):
        b = start + tl.arange(0, K)
        inside = exists[:, None] & (b < num_blocks)[None, :]
        m, s = add_exp(m, s, tl.load(lse + first[:, None] + b[None, :], mask=inside, other=float("-inf")))
    return m + tl.log(s)


@triton.jit
def _with_label(rest, z):
    """(log p(label), log-sum-exp with the label's logit `z`)."""
    return label_logp(rest, z), tl.maximum(rest, z) + log1p(tl.exp(-tl.abs(rest - z)))


@triton.jit
def _block(sums, first, exists, start, lse, ref_lse, num_blocks, K: tl.constexpr):
    """(places, which of them exist, log P, log R) of K blocks from `start` on."""
    b = start + tl.arange(0, K)
    inside = exists[:, None] & (b < num_blocks)[None, :]
    at = first[:, None] + b[None, :]
    lp = tl.load(sums.lse + at, mask=inside, other=float("-inf")) - lse[:, None]
    lr = tl.load(sums.ref_lse + at, mask=inside, other=float("-inf")) - ref_lse[:, None]
    return at, inside, lp, lr


@triton.jit
def _values(sums, kind, results, row, first, exists, lse, ref_lse, logp, ref_logp, num_blocks, T: tl.constexpr,
            K: tl.constexpr):  # fmt: skip
    """Stores divergence, mean and entropy; the mean."""
    value, mean, entropy = tl.zeros((T,), tl.float32), tl.zeros((T,), tl.float32), tl.zeros((T,), tl.float32)
    for start in range(0, num_blocks, K):
        at, inside, lp, lr = _block(sums, first, exists, start, lse, ref_lse, num_blocks, K)
        P = exp(lp)
        if kind.name == "forward_kl":
            value += tl.sum(_kl(exp(lr), lr, lp, tl.load(sums.ref_mean + at, mask=inside, other=0.0)), 1)
        elif kind.name == "reverse_kl":
            value += tl.sum(_kl(P, lp, lr, tl.load(sums.mean + at, mask=inside, other=0.0)), 1)
        else:
            value += tl.sum(tl.load(sums.ref_mean + at, mask=inside, other=0.0), 1)
            mean += tl.sum(tl.where(P == 0, P, P * tl.load(sums.mean + at, mask=inside, other=0.0)), 1)
        if results.entropy is not None:
            spread = tl.load(sums.entropy + at, mask=inside, other=0.0) - lp
            entropy += tl.sum(tl.where(P == 0, P, P * spread), 1)
    p, r, x = tl.exp(logp), tl.exp(ref_logp), logp - ref_logp
    entropy -= tl.where(p == 0, p, p * logp)
    if kind.name == "forward_kl":
        value += _kl(r, ref_logp, logp, 0.0)
    elif kind.name == "reverse_kl":
        value += _kl(p, logp, ref_logp, 0.0)
    else:
        over = label_over_mixture(x, kind)
        value += jsd_terms(p, r, x, over, kind)
        mean += tl.where(p == 0, p, p * (over + tl.minimum(x, 0.0)))
    value = tl.where(value < 0, 0.0, value)  # rounding; a NaN stays
    if kind.name == "reverse_kl":
        mean = value
    tl.store(results.divergence + row, value, mask=exists)
    if results.mean is not None:
        tl.store(results.mean + row, mean, mask=exists)
    if results.entropy is not None:
        tl.store(results.entropy + row, entropy, mask=exists)
    return mean


@triton.jit
def _bounds(sums, at, inside, lp, lr, row_mean, kind):
    """bound_of of blocks, from the moments inside of them: the mean of x is what it is inside plus lp - lr."""
    P, R = exp(lp), exp(lr)
    mean, spread = tl.load(sums.mean + at, mask=inside, other=0.0), tl.load(sums.spread + at, mask=inside, other=0.0)
    if kind.name == "forward_kl":
        of_p = mean + (lp - lr)
        of_r = tl.load(sums.ref_mean + at, mask=inside, other=0.0) - (lp - lr)
        ref_spread = tl.load(sums.ref_spread + at, mask=inside, other=0.0)
        squares = tl.where(P == 0, 0.0, P * (spread + of_p * of_p + EPS2))
        squares += tl.where(R == 0, 0.0, R * (ref_spread + of_r * of_r + EPS2))
        mass = P + R
        bound = 0.5 * tl.sqrt(mass * squares)
        bound = tl.where(bound < mass, bound, mass)  # a NaN here is one of the mass
    else:
        d = mean - row_mean[:, None]
        if kind.name == "reverse_kl":
            d += lp - lr
        bound = tl.where(P == 0, 0.0, P * tl.sqrt(spread + d * d + EPS2))
    return bound


@triton.jit(do_not_specialize=VARYING)
def divergence_finish_kernel(
    sums,  # PairSums
    label_logits,  # [2, capacity]
    kind,
    tokens,
    results,
    draw,  # the pairs that the backward computes
    first_token,
    capacity,
    num_blocks,
    set_bytes,
    MASSES: tl.constexpr,  # find the log-sum-exps (False: `results` has them)
    VALUES: tl.constexpr,  # and what hangs on them
    ROUTES_LOGPS: tl.constexpr,
    T: tl.constexpr,  # tokens of a program
    K: tl.constexpr,  # blocks at a time
):
    """A program goes along the blocks of its tokens, whose rows of the results it has to itself."""
    i = tl.program_id(0) * T + tl.arange(0, T)
    n = num_tokens(tokens, first_token, capacity)
    if tl.program_id(0) * T >= n:
        return
    exists = i < n
    token = first_token + i
    row = tl.load(tokens.rows + token, mask=exists, other=0).to(tl.int64)
    first = i.to(tl.int64) * num_blocks
    logp = tl.full((T,), float("-inf"), tl.float32)  # there is no label
    ref_logp = logp
    if MASSES:
        lse = _masses(sums.lse, first, exists, num_blocks, T, K)
        ref_lse = _masses(sums.ref_lse, first, exists, num_blocks, T, K)
        if results.logps is not None:
            logp, lse = _with_label(lse, tl.load(label_logits + i, mask=exists, other=0.0))
            ref_logp, ref_lse = _with_label(ref_lse, tl.load(label_logits + capacity + i, mask=exists, other=0.0))
            tl.store(results.logps + row, logp, mask=exists)
            tl.store(results.ref_logps + row, ref_logp, mask=exists)
        tl.store(results.lse + row, lse, mask=exists)
        tl.store(results.ref_lse + row, ref_lse, mask=exists)
    else:
        lse = tl.load(results.lse + row, mask=exists, other=0.0)
        ref_lse = tl.load(results.ref_lse + row, mask=exists, other=0.0)
        if results.logps is not None:
            logp = tl.load(results.logps + row, mask=exists, other=0.0)
            ref_logp = tl.load(results.ref_logps + row, mask=exists, other=0.0)
    if VALUES:
        mean = _values(sums, kind, results, row, first, exists, lse, ref_lse, logp, ref_logp, num_blocks, T, K)
        if draw.seed is not None:
            total = tl.zeros((T,), tl.float32)
            for start in range(0, num_blocks, K):
                at, inside, lp, lr = _block(sums, first, exists, start, lse, ref_lse, num_blocks, K)
                w = _bounds(sums, at, inside, lp, lr, mean, kind)
                total += tl.sum(tl.where(inside, w, 0.0), 1)
                tl.store(sums.ref_lse + at, w, mask=inside)
            tl.store(results.total + row, total, mask=exists)
            others = -expm1(logp)
            for start in range(0, num_blocks, K):
                at, inside, lp, w = _block(sums, first, exists, start, lse, lse * 0, num_blocks, K)
                share = share_of(w, total[:, None])
                if ROUTES_LOGPS:
                    share = at_least(share, exp(lp) / others[:, None])
                tl.store(sums.ref_lse + at, share, mask=inside)
            tl.debug_barrier()  # other threads read them
            label = tl.load(tokens.labels + token, mask=exists, other=-1)
            route_tokens(draw, sums.ref_lse, None, label, token, i, row, exists, capacity, num_blocks, set_bytes, T, K)


def finish(
    call: TwoHeads, tokens: TokenRange, sums: PairSums, label_logits, results: PairResults, draw: Draw, *, masses: bool,
    values: bool,
) -> None:  # fmt: skip
    """What the blocks' sums tell of these tokens: their log-sum-exps, and results and pairs that hang on these."""
    tile, grid = call.token_rows(tokens)
    launch(
        divergence_finish_kernel,
        grid,
        tile,
        **tokens._asdict(),
        sums=sums,
        label_logits=label_logits,
        kind=Kind.of(call.heads),
        results=results,
        draw=draw,
        num_blocks=call.num_blocks,
        set_bytes=set_bytes(call.num_blocks),
        MASSES=masses,
        VALUES=values,
        ROUTES_LOGPS=call.heads.routes_logps,
        T=tile.m,
        K=tile.n,
    )
