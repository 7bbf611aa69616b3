"""The two distributions of a tile of products, what they bound of a block, and dz.

t, ref_t = log p, log r        x = t - ref_t        l = log(p / m) by x alone, m = (1 - beta) p + beta r
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ...divergence.problem import EPS as _EPS
from ...divergence.problem import DivergenceForward, DivergenceUpstream, Heads
from ..common import exp, expm1
from ..stats import log1p

EPS2 = tl.constexpr(_EPS * _EPS)


class Kind(NamedTuple):
    """Which divergence, as kernels take it."""

    name: tl.constexpr
    beta: float  # of jsd: the teacher's part of the mixture,
    own: float  # and the student's; apart, as fp32 cannot tell 1 - beta near 1

    @staticmethod
    def of(heads: Heads) -> Kind:
        return Kind(tl.constexpr(heads.kind), float(heads.beta), 1.0 - heads.beta)


class PairTerms(NamedTuple):
    """What dz takes from its row: the forward's results and the upstream gradients, [M] fp32 each."""

    lse: Tensor
    ref_lse: Tensor
    mean: Tensor | None
    logps: Tensor | None
    ref_logps: Tensor | None
    entropy: Tensor | None
    total: Tensor | None
    coef_divergence: Tensor
    coef: Tensor | None  # of logps
    coef_entropy: Tensor | None
    routes_logps: tl.constexpr  # shares are at least the block's part of the student's tail

    @staticmethod
    def of(heads: Heads, saved: DivergenceForward, upstream: DivergenceUpstream) -> PairTerms:
        return PairTerms(
            saved.lse,
            saved.ref_lse,
            saved.mean,
            saved.logps,
            saved.ref_logps,
            None if upstream.coef_entropy is None else saved.entropy,
            saved.total,
            upstream.coef_divergence,
            upstream.coef if heads.labelled else None,
            upstream.coef_entropy,
            tl.constexpr(heads.routes_logps),
        )


class PairRow(NamedTuple):
    """What a row's dz is made of; all scales are in the factors."""

    active: tl.tensor  # has a gradient
    lse: tl.tensor
    ref_lse: tl.tensor
    mean: tl.tensor
    entropy: tl.tensor
    of_divergence: tl.tensor  # factors
    of_logp: tl.tensor
    of_entropy: tl.tensor
    label: tl.tensor  # dz of the label
    total: tl.tensor  # of the blocks' bounds
    others: tl.tensor  # 1 - p[label]


@triton.jit
def over_mixture(x, kind):
    """log(max(p, r) / m) of x = log(p / r), with no difference of large numbers."""
    own = tl.where(x >= 0, kind.own, kind.beta)
    others = tl.where(x >= 0, kind.beta, kind.own)
    return -tl.log(tl.fma(others, exp(-tl.abs(x)), own))


@triton.jit
def label_over_mixture(x, kind):
    """The same of a label, of which both heads may be sure: to the relative precision of a small x."""
    own = tl.where(x >= 0, kind.own, kind.beta)
    others = tl.where(x >= 0, kind.beta, kind.own)
    return log1p(-others * expm1(-tl.abs(x)) / tl.fma(others, exp(-tl.abs(x)), own))


@triton.jit
def direction(x, kind):
    """What dz of reverse_kl and jsd is in proportion to, but for its mean under p."""
    return over_mixture(x, kind) + tl.minimum(x, 0.0) if kind.name == "jsd" else x


@triton.jit
def label_direction(x, kind):
    return label_over_mixture(x, kind) + tl.minimum(x, 0.0) if kind.name == "jsd" else x


@triton.jit
def jsd_terms(p, r, x, over, kind):
    """What ids add to jsd, of x = log(p / r) and `over` of it."""
    of_p = tl.where(p == 0, 0.0, kind.own * p * (over + tl.minimum(x, 0.0)))
    return of_p + tl.where(r == 0, 0.0, kind.beta * r * (over - tl.maximum(x, 0.0)))


@triton.jit
def pair_rows(row, exists, terms, kind, transform, dz_scale):
    """The PairRow of rows [T]."""
    zero = tl.zeros(row.shape, tl.float32)
    scale = transform.scale * transform.inv_temperature
    if dz_scale is not None:
        scale *= tl.load(dz_scale)
    lse = tl.load(terms.lse + row, mask=exists, other=0.0)
    ref_lse = tl.load(terms.ref_lse + row, mask=exists, other=0.0)
    g = tl.load(terms.coef_divergence + row, mask=exists, other=0.0)
    active, g = g != 0, g * scale
    c, e, mean, entropy, total, label, others = zero, zero, zero, zero, zero, zero, zero + 1.0
    if terms.mean is not None:
        mean = tl.load(terms.mean + row, mask=exists, other=0.0)
    if terms.total is not None:
        total = tl.load(terms.total + row, mask=exists, other=0.0)
    if kind.name == "jsd":
        g *= kind.own
    if terms.coef_entropy is not None:
        e = tl.load(terms.coef_entropy + row, mask=exists, other=0.0)
        active, e = active | (e != 0), e * scale
        entropy = tl.load(terms.entropy + row, mask=exists, other=0.0)
    if terms.logps is not None:
        c = tl.load(terms.coef + row, mask=exists, other=0.0)
        active, c = active | (c != 0), c * scale
        logp = tl.load(terms.logps + row, mask=exists, other=-1.0)
        ref_logp = tl.load(terms.ref_logps + row, mask=exists, other=-1.0)
        others = -expm1(logp)  # before any rounding of p
        p = tl.exp(logp)
        if kind.name == "forward_kl":  # two small numbers where both are sure of the label
            label = tl.fma(g, -others - expm1(ref_logp), c * others)
        else:
            x = label_direction(logp - ref_logp, kind)
            label = tl.fma(g, tl.where(p == 0, 0.0, p * (x - mean)), c * others)
        if terms.coef_entropy is not None:
            label -= e * tl.where(p == 0, 0.0, p * (logp + entropy))
    return PairRow(active, lse, ref_lse, mean, entropy, g, c, e, label, total, others)


@triton.jit
def dz_of_pair(t, ref_t, p, of_row, kind, ENTROPY: tl.constexpr):
    """dz of all but labels, of log p, log r and p; without a softcap's slope."""
    if kind.name == "forward_kl":
        dz = p * (of_row.of_divergence - of_row.of_logp)[:, None] - exp(ref_t) * of_row.of_divergence[:, None]
    else:
        x = direction(t - ref_t, kind)
        factor = tl.fma(x - of_row.mean[:, None], of_row.of_divergence[:, None], -of_row.of_logp[:, None])
        dz = tl.where(p == 0, 0.0, p * factor)
    if ENTROPY:
        dz -= tl.where(p == 0, 0.0, p * (t + of_row.entropy[:, None]) * of_row.of_entropy[:, None])
    return dz


@triton.jit
def bound_of(p, r, x, mean, kind):
    """[T] what a block's sum of |dz| can be, by ...divergence.problem; p and r are 0 in columns that do not count."""
    mass = tl.sum(p, 1)
    if kind.name == "forward_kl":
        squares = tl.fma(x, x, EPS2)
        both = tl.sum(tl.where(p == 0, 0.0, p * squares) + tl.where(r == 0, 0.0, r * squares), 1)
        mass += tl.sum(r, 1)
        bound = 0.5 * tl.sqrt(mass * both)
        return tl.where(bound < mass, bound, mass)  # a NaN here is one of the mass
    else:
        d = direction(x, kind) - mean[:, None]
        return tl.sqrt(mass * tl.sum(tl.where(p == 0, 0.0, p * tl.fma(d, d, EPS2)), 1))


@triton.jit
def at_least(share, least):
    return tl.where(share < least, least, share)  # a NaN stays


@triton.jit
def share_of(bound, total):
    """Of a block's bound in the token's; nothing of nothing is nothing."""
    return tl.where(bound == 0, 0.0, bound / total)
