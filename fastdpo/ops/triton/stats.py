"""The statistics of a token: what a block leaves of them, how blocks and shards add up, and what rows get.

All that is particular to one statistic is in this file, beside its name in problem.STATS.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import BLOCK, VARYING, TokenRange, exp, logit, num_tokens
from .launch import launch


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


@triton.jit
def store_nothing(results, row, is_bad, skipped):
    """Rows without a token: 0, or NaN where the label is out of range."""
    nothing = tl.where(is_bad, float("nan"), 0.0)
    tl.store(results.logps + row, nothing, mask=skipped)
    tl.store(results.lse + row, nothing, mask=skipped)
    if results.entropy is not None:
        tl.store(results.entropy + row, nothing, mask=skipped)
    if results.mean_logit is not None:
        tl.store(results.mean_logit + row, nothing, mask=skipped)
    if results.log_sum_sq_probs is not None:
        tl.store(results.log_sum_sq_probs + row, nothing, mask=skipped)
    if results.is_top1 is not None:
        tl.store(results.is_top1 + row, row < 0, mask=skipped)


@triton.jit
def store_block(product, transform, block, i, exists, label, label_logit, sums, V, num_blocks):
    """One block's products of the tokens `i` -> its BlockSums, and the label's logit if it is here."""
    column = block * BLOCK + tl.arange(0, BLOCK)
    z = logit(product, transform)
    is_label = column[None, :] == label[:, None]
    here = exists & (label >= block * BLOCK) & (label < tl.minimum((block + 1) * BLOCK, V))
    tl.store(label_logit + i, tl.sum(tl.where(is_label, z, 0.0), 1), mask=here)
    where = i * num_blocks + block  # a chunk's sums are far fewer than 2^31
    exists = exists & (i * 0 + block < num_blocks)  # a scalar comparison would lose its type in the interpreter
    if sums.sum is not None:
        tl.store(sums.sum + where, tl.sum(tl.where((column < V)[None, :], z, 0.0), 1), mask=exists)
    rest = tl.where((column < V)[None, :] & ~is_label, z, float("-inf"))
    if sums.before is not None:
        left = tl.where(column[None, :] < label[:, None], rest, float("-inf"))
        right = tl.where(column[None, :] > label[:, None], rest, float("-inf"))
        tl.store(sums.before + where, tl.max(left, 1), mask=exists)
        tl.store(sums.after + where, tl.max(right, 1), mask=exists)
    top = tl.max(rest, 1)
    e = exp(rest - tl.where(top == float("-inf"), 0.0, top)[:, None])
    s = tl.sum(e, 1)
    tl.store(sums.lse + where, top + tl.log(s), mask=exists)
    if sums.mean is not None:
        mean = tl.sum(tl.where(e > 0, e * rest, 0.0), 1) / s
        tl.store(sums.mean + where, tl.where(s == 0, 0.0, mean), mask=exists)
    if sums.lse2 is not None:
        tl.store(sums.lse2 + where, 2 * top + tl.log(tl.sum(e * e, 1)), mask=exists)


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
def _add_exp(m, s, x):
    """Log-sum-exp (m, s) [T] of rows with the values `x` [T, K] added."""
    top = tl.maximum(m, tl.max(x, 1))
    shift = tl.where(top == float("-inf"), 0.0, top)
    return top, s * exp(m - shift) + tl.sum(exp(x - shift[:, None]), 1)


@triton.jit(do_not_specialize=VARYING)
def finish_kernel(
    sums,  # BlockSums
    label_logit,  # [capacity]
    shard,  # [6, capacity] fp32 or None: what a token's blocks sum up to, to be merged with other ranks' shards
    tokens,
    rest_lse,  # [capacity]: log-sum-exp of every logit but the label's
    results,
    first_token,
    capacity,
    num_blocks,
    vocab_size,
    REDUCE: tl.constexpr,  # sum the blocks up (False: `shard` holds the merged sums)
    EMIT: tl.constexpr,  # write results (False: write `shard`)
    T: tl.constexpr,  # tokens of a program
    K: tl.constexpr,  # blocks at a time
):
    """A program sums up the blocks of its tokens, whose rows of the results it has to itself."""
    i = tl.program_id(0) * T + tl.arange(0, T)
    token = first_token + i
    n = num_tokens(tokens, first_token, capacity)
    if tl.program_id(0) * T >= n:
        return
    exists = i < n
    base = i.to(tl.int64)[:, None] * num_blocks
    if REDUCE:
        m, s = tl.full((T,), float("-inf"), tl.float32), tl.zeros((T,), tl.float32)
        m2, s2 = tl.full((T,), float("-inf"), tl.float32), tl.zeros((T,), tl.float32)
        left, right = tl.full((T,), float("-inf"), tl.float32), tl.full((T,), float("-inf"), tl.float32)
        total, mean = tl.zeros((T,), tl.float32), tl.zeros((T,), tl.float32)
        for start in range(0, num_blocks, K):
            b = start + tl.arange(0, K)
            inside = exists[:, None] & (b < num_blocks)[None, :]
            at = base + b[None, :]
            m, s = _add_exp(m, s, tl.load(sums.lse + at, mask=inside, other=float("-inf")))
            if sums.lse2 is not None:
                m2, s2 = _add_exp(m2, s2, tl.load(sums.lse2 + at, mask=inside, other=float("-inf")))
            if sums.sum is not None:
                total += tl.sum(tl.load(sums.sum + at, mask=inside, other=0.0), 1)
            if sums.before is not None:
                left = tl.maximum(left, tl.max(tl.load(sums.before + at, mask=inside, other=float("-inf")), 1))
                right = tl.maximum(right, tl.max(tl.load(sums.after + at, mask=inside, other=float("-inf")), 1))
        rest = m + tl.log(s)
        lse2 = m2 + tl.log(s2)
        if sums.mean is not None:  # sum p z over the vocabulary but the label, relative to `rest`
            for start in range(0, num_blocks, K):
                b = start + tl.arange(0, K)
                inside = exists[:, None] & (b < num_blocks)[None, :]
                x = tl.load(sums.lse + base + b[None, :], mask=inside, other=float("-inf"))
                mu = tl.load(sums.mean + base + b[None, :], mask=inside, other=0.0)
                weighted = exp(x - rest[:, None]) * (mu - rest[:, None])
                mean += tl.sum(tl.where(x == float("-inf"), 0.0, weighted), 1)
        if not EMIT:
            tl.store(shard + 0 * capacity + i, rest, mask=exists)
            tl.store(shard + 1 * capacity + i, mean, mask=exists)
            tl.store(shard + 2 * capacity + i, lse2, mask=exists)
            tl.store(shard + 3 * capacity + i, total, mask=exists)
            tl.store(shard + 4 * capacity + i, left, mask=exists)
            tl.store(shard + 5 * capacity + i, right, mask=exists)
    else:
        rest = tl.load(shard + 0 * capacity + i, mask=exists, other=0.0)
        mean = tl.load(shard + 1 * capacity + i, mask=exists, other=0.0)
        lse2 = tl.load(shard + 2 * capacity + i, mask=exists, other=0.0)
        total = tl.load(shard + 3 * capacity + i, mask=exists, other=0.0)
        left = tl.load(shard + 4 * capacity + i, mask=exists, other=0.0)
        right = tl.load(shard + 5 * capacity + i, mask=exists, other=0.0)
    if EMIT:
        row = tl.load(tokens.rows + token, mask=exists, other=0).to(tl.int64)
        z = tl.load(label_logit + i, mask=exists, other=0.0)
        logp = label_logp(rest, z)
        row_lse = tl.maximum(rest, z) + log1p(tl.exp(-tl.abs(rest - z)))
        tl.store(results.logps + row, logp, mask=exists)
        tl.store(results.lse + row, row_lse, mask=exists)
        if rest_lse is not None:
            tl.store(rest_lse + i, rest, mask=exists)
        p = tl.exp(logp)
        if results.entropy is not None:
            others = tl.exp(rest - row_lse)
            spread = tl.where(others > 0, others * (mean + rest - row_lse), others)
            tl.store(results.entropy + row, -spread - tl.where(p > 0, p * logp, p), mask=exists)
        if results.log_sum_sq_probs is not None:
            double = tl.maximum(lse2, 2 * z)
            shift = tl.where(double == float("-inf"), 0.0, double)
            value = double + tl.log(tl.exp(lse2 - shift) + tl.exp(2 * z - shift)) - 2 * row_lse
            tl.store(results.log_sum_sq_probs + row, value, mask=exists)
        if results.mean_logit is not None:
            tl.store(results.mean_logit + row, total / vocab_size, mask=exists)
        if results.is_top1 is not None:
            tl.store(results.is_top1 + row, (z > left) & (z >= right), mask=exists)


def finish(call, tokens: TokenRange, sums: BlockSums, label_logit, rest_lse, results: Results, shards) -> None:
    """Sums of the blocks -> results, and rest_lse [capacity]: of all ranks where there are `shards`."""

    def run(label_logit: Tensor, shard: Tensor | None, *, reduce: bool, emit: bool) -> None:
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
            num_blocks=call.num_blocks,
            vocab_size=call.rows.vocab_size,
            REDUCE=reduce,
            EMIT=emit,
            T=tile.m,
            K=tile.n,
        )

    if shards is None:
        run(label_logit, None, reduce=True, emit=True)
        return
    mine = torch.empty(6, tokens.capacity, dtype=torch.float32, device=label_logit.device)
    run(label_logit, mine, reduce=True, emit=False)
    run(shards.label_logit(label_logit), _merge(shards, mine), reduce=False, emit=True)


def _merge(shards, sums: Tensor) -> Tensor:
    """What a token's blocks sum up to on every rank -> on all (the rows of finish_kernel's `shard`)."""
    rest, mean, lse2, total, before, after = sums
    all_rest = shards.logsumexp(rest)
    share = torch.where(rest == -torch.inf, 0.0, (rest - all_rest).exp())
    offset = torch.where(rest == -torch.inf, 0.0, rest - all_rest)
    sides = shards.max(torch.stack((before, after)))
    return torch.stack(
        (all_rest, shards.sum(share * (mean + offset)), shards.logsumexp(lse2), shards.sum(total), *sides)
    )
