"""The statistics of a token: what a block leaves of them, how blocks and shards add up, and what rows get.

All that is particular to one statistic is in this file, beside its name in problem.FOLDED.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...routing import set_bytes
from .common import BLOCK, LOG2E, VARYING, TokenRange, exp, num_tokens, squashed, unit
from .launch import launch
from .route import NOTHING_ROUTED, Draw, route_tokens


class Results(NamedTuple):
    """[M], as Forward has them."""

    logps: Tensor | None = None
    lse: Tensor | None = None
    entropy: Tensor | None = None
    mean_logit: Tensor | None = None
    is_top1: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None

    @staticmethod
    def empty(stats: Collection[str], m: int, device: torch.device) -> Results:
        columns = {}
        for name in ("logps", "lse", *stats):
            columns[name] = torch.empty(m, dtype=torch.bool if name == "is_top1" else torch.float32, device=device)
        return Results(**columns)


class BlockSums(NamedTuple):
    """[capacity, num_blocks] fp32: what a block of a chunk's tokens leaves, the label's own logit left out."""

    lse: Tensor
    mean: Tensor | None  # sum p z / sum p inside the block
    lse2: Tensor | None  # log sum exp(2 z)
    sum: Tensor | None  # sum z, the label's included
    before: Tensor | None  # largest z left of the label
    after: Tensor | None

    @staticmethod
    def wanted(stats: Collection[str]) -> tuple[bool, ...]:
        top1 = "is_top1" in stats
        return True, "entropy" in stats, "log_sum_sq_probs" in stats, "mean_logit" in stats, top1, top1

    @staticmethod
    def empty(stats: Collection[str], capacity: int, num_blocks: int, device: torch.device) -> BlockSums:
        shape = (capacity, num_blocks)
        wanted = BlockSums.wanted(stats)
        return BlockSums(*(torch.empty(shape, dtype=torch.float32, device=device) if one else None for one in wanted))


class Sums(NamedTuple):
    """[T] fp32: what a token's blocks, and the shards of its vocabulary, add up to."""

    rest: tl.tensor  # log-sum-exp of every logit but the label's
    mean: tl.tensor  # sum p z over these, relative to `rest`
    lse2: tl.tensor
    total: tl.tensor
    before: tl.tensor
    after: tl.tensor


LOWEST = tl.constexpr(-1e8)  # logits far below are those of columns ruled out
NUM_SUMS = tl.constexpr(len(Sums._fields))


@triton.jit
def store_nothing(results, COUNT: tl.constexpr, row, is_bad, skipped):
    """Rows without a token: 0, or NaN (False) where the label is out of range. `COUNT`: of the fields of `results`."""
    for j in tl.static_range(COUNT):
        if results[j] is not None:
            if results[j].dtype.element_ty == tl.int1:
                tl.store(results[j] + row, row < 0, mask=skipped)
            else:
                tl.store(results[j] + row, tl.where(is_bad, float("nan"), 0.0), mask=skipped)


@triton.jit
def store_block(product, transform, block, i, exists, label, is_plain, label_logit, sums, V, num_blocks):
    """One block's products of the tokens `i` -> its BlockSums, and the label's logit if it is here.

    Most blocks hold no label of their rows, and a whole program skips what needs masks. A logit then takes one fused
    multiplication and one exponential, exp2(x * s - shift); what `shift` was rounded by goes to the row's result.
    """
    x, scale = squashed(product, transform), unit(transform)
    where = i * num_blocks + block  # a chunk's sums are far fewer than 2^31
    exists = exists & (i * 0 + block < num_blocks)  # a scalar comparison would lose its type in the interpreter
    is_plain = is_plain & (scale > 0)
    # A mask changes no bit of what other rows of the program get: a row must not see its neighbours' labels.
    if is_plain:
        if sums.sum is not None:
            tl.store(sums.sum + where, tl.sum(x, 1) * scale, mask=exists)
    else:
        if scale <= 0:  # the largest x is not of the largest logit
            x *= scale
            scale = tl.cast(1.0, tl.float32)
        x = _masked(x, scale, block, where, i, exists, label, label_logit, sums, V)
    s2 = scale * LOG2E
    top = tl.max(x, 1)
    largest = tl.maximum(top, LOWEST)
    shift = largest * s2
    shift = tl.fma(tl.abs(shift), 2.0**-23, shift)  # no exponent is above 0, however large the logits
    t = tl.fma(x, s2, -shift[:, None])
    e = tl.exp2(t)
    s = tl.sum(e, 1)
    top = top * scale
    z = top - tl.fma(largest, s2, -shift) * (1 / LOG2E)
    # where every exponent is too far below 0, the largest logit is all that fp32 can tell
    tl.store(sums.lse + where, tl.where(s == 0, top, z + tl.log(s)), mask=exists)
    if sums.mean is not None:
        mean = tl.sum(e * tl.maximum(t, -1000.0), 1) / s * (1 / LOG2E)  # 0 * -inf would be NaN
        tl.store(sums.mean + where, tl.where(s == 0, top, z + mean), mask=exists)
    if sums.lse2 is not None:
        squares = tl.sum(e * e, 1)
        tl.store(sums.lse2 + where, 2 * tl.where(squares == 0, top, z + tl.log(squares) / 2), mask=exists)
    if sums.before is not None:
        if is_plain:
            is_before = label >= block * BLOCK
            tl.store(sums.before + where, tl.where(is_before, top, float("-inf")), mask=exists)
            tl.store(sums.after + where, tl.where(is_before, float("-inf"), top), mask=exists)


@triton.jit
def _masked(x, scale, block, where, i, exists, label, label_logit, sums, V):
    """`x`, a logit's part of `scale`, without the labels' own and without columns from V on; stores what needs to tell
    them apart."""
    column = block * BLOCK + tl.arange(0, BLOCK)
    here = exists & (label >= block * BLOCK) & (label < tl.minimum((block + 1) * BLOCK, V))
    tl.store(label_logit + i, tl.sum(tl.where(column[None, :] == label[:, None], x, 0.0), 1) * scale, mask=here)
    if sums.sum is not None:
        tl.store(sums.sum + where, tl.sum(tl.where((column < V)[None, :], x, 0.0), 1) * scale, mask=exists)
    if sums.before is not None:
        left = tl.where(column[None, :] < tl.minimum(label, V)[:, None], x, float("-inf"))
        tl.store(sums.before + where, tl.max(left, 1) * scale, mask=exists)
        right = tl.where((column[None, :] > label[:, None]) & (column < V)[None, :], x, float("-inf"))
        tl.store(sums.after + where, tl.max(right, 1) * scale, mask=exists)
    return tl.where((column[None, :] != label[:, None]) & (column < V)[None, :], x, float("-inf"))


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0 to fp32's relative precision: 2 atanh(x / (2 + x)) by its series where x is small."""
    s = x / (2.0 + x)
    q = s * s
    series = 2.0 * s * (1.0 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q / 11)))))
    return tl.where(x < 0.5, series, tl.log(1.0 + x))


@triton.jit
def label_logp(rest_lse, label_logit):
    """log p(label) = -log(1 + exp(rest - label)), which keeps its relative precision near 0."""
    d = rest_lse - label_logit
    return tl.where(d > 20.0, -d - tl.exp(-d), -log1p(tl.exp(tl.where(d > 20.0, 0.0, d))))


@triton.jit
def add_exp(m, s, x):
    """Log-sum-exp (m, s) [T] of rows with the values `x` [T, K] added."""
    top = tl.maximum(m, tl.max(x, 1))
    shift = tl.where(top == float("-inf"), 0.0, top)
    return top, s * exp(m - shift) + tl.sum(exp(x - shift[:, None]), 1)


@triton.jit
def _add_up(sums, first, exists, num_blocks, T: tl.constexpr, K: tl.constexpr):
    """The Sums of tokens whose blocks begin at element `first` [T]."""
    low, zero = tl.full((T,), float("-inf"), tl.float32), tl.zeros((T,), tl.float32)
    m, s, m2, s2, total, mean, before, after = low, zero, low, zero, zero, zero, low, low
    for start in range(0, num_blocks, K):
        b = start + tl.arange(0, K)
        inside = exists[:, None] & (b < num_blocks)[None, :]
        at = first[:, None] + b[None, :]
        m, s = add_exp(m, s, tl.load(sums.lse + at, mask=inside, other=float("-inf")))
        if sums.lse2 is not None:
            m2, s2 = add_exp(m2, s2, tl.load(sums.lse2 + at, mask=inside, other=float("-inf")))
        if sums.sum is not None:
            total += tl.sum(tl.load(sums.sum + at, mask=inside, other=0.0), 1)
        if sums.before is not None:
            before = tl.maximum(before, tl.max(tl.load(sums.before + at, mask=inside, other=float("-inf")), 1))
            after = tl.maximum(after, tl.max(tl.load(sums.after + at, mask=inside, other=float("-inf")), 1))
    rest = m + tl.log(s)
    if sums.mean is not None:
        for start in range(0, num_blocks, K):
            b = start + tl.arange(0, K)
            inside = exists[:, None] & (b < num_blocks)[None, :]
            at = first[:, None] + b[None, :]
            x = tl.load(sums.lse + at, mask=inside, other=float("-inf"))
            weighted = exp(x - rest[:, None]) * (tl.load(sums.mean + at, mask=inside, other=0.0) - rest[:, None])
            mean += tl.sum(tl.where(x == float("-inf"), 0.0, weighted), 1)
    return Sums(rest, mean, m2 + tl.log(s2), total, before, after)


@triton.jit
def _store_stats(results, row, exists, sums, z, logp, row_lse, vocab_size):
    """The statistics of tokens with the label's logit `z`."""
    p = tl.exp(logp)
    if results.entropy is not None:
        others = tl.exp(sums.rest - row_lse)
        spread = tl.where(others > 0, others * (sums.mean + sums.rest - row_lse), others)
        tl.store(results.entropy + row, -spread - tl.where(p > 0, p * logp, p), mask=exists)
    if results.log_sum_sq_probs is not None:
        double = tl.maximum(sums.lse2, 2 * z)
        shift = tl.where(double == float("-inf"), 0.0, double)
        value = double + tl.log(tl.exp(sums.lse2 - shift) + tl.exp(2 * z - shift)) - 2 * row_lse
        tl.store(results.log_sum_sq_probs + row, value, mask=exists)
    if results.mean_logit is not None:
        tl.store(results.mean_logit + row, sums.total / vocab_size, mask=exists)
    if results.is_top1 is not None:
        tl.store(results.is_top1 + row, (z > sums.before) & (z >= sums.after), mask=exists)


@triton.jit(do_not_specialize=VARYING)
def finish_kernel(
    sums,  # BlockSums
    label_logit,  # [capacity]
    shard,  # [Sums, capacity] fp32 or None: to be merged with other ranks' shards
    tokens,
    rest_lse,  # [capacity]: Sums.rest, or None
    results,
    draw,  # the pairs that the backward computes
    first_token,
    capacity,
    num_blocks,
    vocab_size,
    set_bytes,
    REDUCE: tl.constexpr,  # sum the blocks up (False: `shard` holds the merged sums)
    EMIT: tl.constexpr,  # write results (False: write `shard`)
    T: tl.constexpr,  # tokens of a program
    K: tl.constexpr,  # blocks at a time
):
    """A program sums up the blocks of its tokens, whose rows of the results it has to itself."""
    i = tl.program_id(0) * T + tl.arange(0, T)
    n = num_tokens(tokens, first_token, capacity)
    if tl.program_id(0) * T >= n:
        return
    exists = i < n
    if REDUCE:
        added = _add_up(sums, i.to(tl.int64) * num_blocks, exists, num_blocks, T, K)
        if not EMIT:
            for j in tl.static_range(NUM_SUMS):
                tl.store(shard + j * capacity + i, added[j], mask=exists)
    else:
        loaded = ()
        for j in tl.static_range(NUM_SUMS):
            loaded = loaded + (tl.load(shard + j * capacity + i, mask=exists, other=0.0),)
        added = Sums(*loaded)
    if EMIT:
        row = tl.load(tokens.rows + first_token + i, mask=exists, other=0).to(tl.int64)
        z = tl.load(label_logit + i, mask=exists, other=0.0)
        logp = label_logp(added.rest, z)
        row_lse = tl.maximum(added.rest, z) + log1p(tl.exp(-tl.abs(added.rest - z)))
        tl.store(results.logps + row, logp, mask=exists)
        tl.store(results.lse + row, row_lse, mask=exists)
        if rest_lse is not None:
            tl.store(rest_lse + i, added.rest, mask=exists)
        if draw.seed is not None:
            token = first_token + i
            label = tl.load(tokens.labels + token, mask=exists, other=-1)
            route_tokens(
                draw, sums.lse, added.rest, label, token, i, row, exists, capacity, num_blocks, set_bytes, T, K
            )
        _store_stats(results, row, exists, added, z, logp, row_lse, vocab_size)


def finish(
    call, tokens: TokenRange, sums: BlockSums, label_logit, results: Results, draw: Draw, shards=None
) -> Tensor | None:
    """Sums of the blocks -> results and, on one rank, the pairs of `draw`. With `shards` results are of all ranks', and
    Sums.rest [capacity] comes back for `route`."""

    def run(label_logit: Tensor, shard: Tensor | None, *, reduce: bool, emit: bool, rest_lse=None) -> None:
        tile, grid = call.token_rows(tokens)
        launch(
            finish_kernel,
            grid,
            tile,
            **tokens._asdict(),
            sums=sums,
            label_logit=label_logit,
            shard=shard,
            rest_lse=rest_lse,
            results=results,
            draw=draw if shards is None else NOTHING_ROUTED,
            num_blocks=call.num_blocks,
            vocab_size=call.rows.vocab_size,
            set_bytes=set_bytes(call.num_blocks),
            REDUCE=reduce,
            EMIT=emit,
            T=tile.m,
            K=tile.n,
        )

    if shards is None:
        run(label_logit, None, reduce=True, emit=True)
        return None
    mine = torch.empty(NUM_SUMS.value, tokens.capacity, dtype=torch.float32, device=label_logit.device)
    run(label_logit, mine, reduce=True, emit=False)
    rest_lse = torch.empty_like(label_logit)
    run(shards.label_logit(label_logit), _merge(shards, mine), reduce=False, emit=True, rest_lse=rest_lse)
    return rest_lse


def _merge(shards, sums: Tensor) -> Tensor:
    """[Sums, capacity] of this rank's shard -> of the whole vocabulary."""
    rest, mean, lse2, total, before, after = sums
    all_rest = shards.logsumexp(rest)
    share = torch.where(rest == -torch.inf, 0.0, (rest - all_rest).exp())
    offset = torch.where(rest == -torch.inf, 0.0, rest - all_rest)
    sides = shards.max(torch.stack((before, after)))
    return torch.stack(
        (all_rest, shards.sum(share * (mean + offset)), shards.logsumexp(lse2), shards.sum(total), *sides)
    )
