"""What a block of 128 columns leaves of two heads, per token, the label's own id left out.

lz, lw log-sum-exp inside the block        u = (z - lz) - (w - lw), log ratio of the two distributions inside it
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...divergence.problem import Heads
from ..common import BLOCK, exp, log_probs, logit
from ..stats import LOWEST
from .log_ratio import jsd_terms, over_mixture


class PairSums(NamedTuple):
    """[capacity, num_blocks] fp32 of a chunk's tokens. `mean` and `spread` of u, for jsd of log(p / m)."""

    lse: Tensor
    ref_lse: Tensor  # routed, its place is taken by the bounds of the blocks, then by their shares
    entropy: Tensor | None  # of p inside the block
    mean: Tensor | None  # under p inside the block: KL(p || r) there; jsd: of log(p / m)
    spread: Tensor | None  # the variance
    ref_mean: Tensor | None  # of -u under r inside the block: KL(r || p) there; jsd: sum of the divergence's terms
    ref_spread: Tensor | None

    @staticmethod
    def wanted(heads: Heads, stats: Collection[str], routed: bool) -> tuple[bool, ...]:
        forward, jsd = heads.kind == "forward_kl", heads.kind == "jsd"
        of_p = routed or not forward
        return True, True, "entropy" in stats, of_p, routed, forward or jsd, forward and routed

    @staticmethod
    def empty(wanted: Collection[bool], capacity: int, num_blocks: int, device: torch.device) -> PairSums:
        make = partial(torch.empty, (capacity, num_blocks), dtype=torch.float32, device=device)
        return PairSums(*(make() if one else None for one in wanted))

    def masses(self) -> PairSums:
        """Of jsd's first sweep, which finds what the second one needs."""
        return PairSums(*self[:3], None, None, None, None)


@triton.jit
def _inside(z):
    """(log-sum-exp of the block [T], log p inside it, exp of the columns and one over their sum)."""
    top = tl.max(z, 1)
    largest = tl.maximum(top, LOWEST)
    t = z - largest[:, None]
    e = exp(t)
    s = tl.sum(e, 1)
    log_s = tl.where(s == 0, 0.0, tl.log(s))
    return tl.where(s == 0, top, largest + log_s), t - log_s[:, None], e, 1.0 / tl.where(s == 0, 1.0, s)


@triton.jit
def _mean(e, one_over, x):
    """sum e x / sum e, columns without weight left out: 0 * inf would be NaN."""
    return tl.sum(tl.where(e == 0, 0.0, e * x), 1) * one_over


@triton.jit
def _not_negative(x):
    return tl.where(x < 0, 0.0, x)  # a NaN stays


@triton.jit
def store_pair_block(product, ref_product, transform, ref_transform, block, i, exists, label, label_logits, sums,
                     V, capacity, num_blocks):  # fmt: skip
    """One block's products of the tokens `i` -> its masses and moments, and the label's two logits if it is here."""
    z, w = logit(product, transform), logit(ref_product, ref_transform)
    column = block * BLOCK + tl.arange(0, BLOCK)
    own = column[None, :] == label[:, None]
    here = exists & (label >= block * BLOCK) & (label < tl.minimum((block + 1) * BLOCK, V))
    tl.store(label_logits + i, tl.sum(tl.where(own, z, 0.0), 1), mask=here)
    tl.store(label_logits + capacity + i, tl.sum(tl.where(own, w, 0.0), 1), mask=here)
    counts = (column < V)[None, :] & ~own
    lse, t, p, one_over_p = _inside(tl.where(counts, z, float("-inf")))
    ref_lse, ref_t, r, one_over_r = _inside(tl.where(counts, w, float("-inf")))
    where = i * num_blocks + block  # a chunk's sums are far fewer than 2^31
    exists = exists & (i * 0 + block < num_blocks)
    tl.store(sums.lse + where, lse, mask=exists)
    tl.store(sums.ref_lse + where, ref_lse, mask=exists)
    if sums.entropy is not None:
        tl.store(sums.entropy + where, _not_negative(-_mean(p, one_over_p, t)), mask=exists)
    u = t - ref_t
    if sums.mean is not None:
        mean = _not_negative(_mean(p, one_over_p, u))
        tl.store(sums.mean + where, mean, mask=exists)
        if sums.spread is not None:
            d = u - mean[:, None]
            tl.store(sums.spread + where, _mean(p, one_over_p, d * d), mask=exists)
    if sums.ref_mean is not None:
        mean = _not_negative(_mean(r, one_over_r, -u))
        tl.store(sums.ref_mean + where, mean, mask=exists)
        if sums.ref_spread is not None:
            d = u + mean[:, None]
            tl.store(sums.ref_spread + where, _mean(r, one_over_r, d * d), mask=exists)


@triton.jit
def store_jsd_block(product, ref_product, transform, ref_transform, kind, block, i, exists, label, lse, ref_lse, sums,
                    V, num_blocks):  # fmt: skip
    """One block's products of the tokens `i`, whose log-sum-exps are known -> its part of the divergence, and the
    moments of log(p / m)."""
    t, _ = log_probs(product, transform, lse)
    ref_t, _ = log_probs(ref_product, ref_transform, ref_lse)
    column = block * BLOCK + tl.arange(0, BLOCK)
    counts = (column < V)[None, :] & (column[None, :] != label[:, None])
    p, r = tl.where(counts, exp(t), 0.0), tl.where(counts, exp(ref_t), 0.0)
    where = i * num_blocks + block
    exists = exists & (i * 0 + block < num_blocks)
    x = t - ref_t
    over = over_mixture(x, kind)
    tl.store(sums.ref_mean + where, tl.sum(jsd_terms(p, r, x, over, kind), 1), mask=exists)
    off = over + tl.minimum(x, 0.0)
    mass = tl.sum(p, 1)
    one_over = 1.0 / tl.where(mass == 0, 1.0, mass)
    mean = _mean(p, one_over, off)
    tl.store(sums.mean + where, mean, mask=exists)
    if sums.spread is not None:
        d = off - mean[:, None]
        tl.store(sums.spread + where, _mean(p, one_over, d * d), mask=exists)
