"""The forward's kernels.

compact   labels -> the completion tokens' rows, counted on the device; what ignored and bad rows get
gather    hidden rows of a chunk of tokens -> contiguous, in the type to multiply in
rank      hidden @ lora_a.T of a low-rank head
fold      tiles of logits -> per block of 128 columns what the sums over the vocabulary need
finish    blocks -> logps, lse and statistics
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import (
    BLOCK,
    VARYING,
    add_low_rank,
    exp,
    halves,
    label_logp,
    load_tile,
    log1p,
    logit,
    num_tokens,
    operand,
    rounded,
    row_offset,
    start_products,
    tile_of,
)


@triton.jit
def _is_scored(labels, coef, coef_entropy, r, num_rows, ignore_index, vocab_size):
    """(scored, label, label is out of range) of rows `r`; with `coef`, only rows that have an upstream gradient."""
    label = tl.load(labels + r, mask=r < num_rows, other=0).to(tl.int64)
    bad = (label != ignore_index) & ((label < 0) | (label >= vocab_size))
    scored = (r < num_rows) & (label != ignore_index) & ~bad
    if coef is not None:
        active = tl.load(coef + r, mask=r < num_rows, other=0.0) != 0
        if coef_entropy is not None:
            active = active | (tl.load(coef_entropy + r, mask=r < num_rows, other=0.0) != 0)
        scored = scored & active
    return scored, label, bad & (r < num_rows)


@triton.jit(do_not_specialize=VARYING)
def compact_kernel(
    labels,  # [M] int32 or int64
    coef,  # [M] fp32 or None
    coef_entropy,  # [M] fp32 or None
    rows,  # [M] int32, row of token i
    token_labels,  # [M] int32, label of token i as a column of this shard; outside [0, V): on another
    position,  # [M] int32, token of row r; -1: ignored, -2: label out of range
    count,  # [1] int32
    logps, lse, entropy, mean_logit, is_top1, log_sum_sq_probs,  # [M] or None: filled where no token is
    num_rows, ignore_index, vocab_start, vocab_size,
    B: tl.constexpr,
):  # fmt: skip
    """Tokens in the order of their rows. Every program counts the rows before its own: no second launch, no wait."""
    first = tl.program_id(0) * B
    before = 0
    for start in range(0, first, B):
        r = start + tl.arange(0, B)
        scored, _, _ = _is_scored(labels, coef, coef_entropy, r, num_rows, ignore_index, vocab_size)
        before += tl.sum(scored.to(tl.int32), 0)
    r = first + tl.arange(0, B)
    scored, label, bad = _is_scored(labels, coef, coef_entropy, r, num_rows, ignore_index, vocab_size)
    flags = scored.to(tl.int32)
    token = before + tl.cumsum(flags, 0) - flags
    tl.store(rows + token, r, mask=scored)
    tl.store(token_labels + token, (label - vocab_start).to(tl.int32), mask=scored)
    tl.store(position + r, tl.where(scored, token, tl.where(bad, -2, -1)), mask=r < num_rows)
    tl.store(count, before + tl.sum(flags, 0), mask=first + B >= num_rows)
    skipped = (r < num_rows) & ~scored
    nothing = tl.where(bad, float("nan"), 0.0)
    if logps is not None:
        tl.store(logps + r, nothing, mask=skipped)
        tl.store(lse + r, nothing, mask=skipped)
    if entropy is not None:
        tl.store(entropy + r, nothing, mask=skipped)
    if mean_logit is not None:
        tl.store(mean_logit + r, nothing, mask=skipped)
    if log_sum_sq_probs is not None:
        tl.store(log_sum_sq_probs + r, nothing, mask=skipped)
    if is_top1 is not None:
        tl.store(is_top1 + r, r < 0, mask=skipped)


@triton.jit(do_not_specialize=VARYING)
def gather_kernel(
    hidden,  # [outer, inner, H], the caller's strides
    rows, count,
    out,  # [capacity, pitch], in the type to multiply in; rows without a token and columns from H on are 0
    flag,  # [1] int32 or None: nothing to do unless it is `wanted`
    first_token, capacity, inner, outer_stride, inner_stride, H, pitch,
    wanted: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    if flag is not None:
        if tl.load(flag) != wanted:
            return
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    exists = i < num_tokens(count, first_token, capacity)
    row = tl.load(rows + first_token + i, mask=exists, other=0)
    offset = row_offset(row, inner, outer_stride, inner_stride)
    x = tl.load(hidden + offset[:, None] + k[None, :], mask=exists[:, None] & (k < H)[None, :], other=0.0)
    where = i.to(tl.int64)[:, None] * pitch + k[None, :]
    tl.store(out + where, rounded(x, out.dtype.element_ty), mask=(i < capacity)[:, None] & (k < pitch)[None, :])


@triton.jit(do_not_specialize=VARYING)
def rank_kernel(
    hidden,  # [capacity, pitch] gathered
    lora_a,  # [rank_size, H]
    out,  # [capacity, R] fp32 = lora_scale * hidden @ lora_a.T
    capacity, pitch, H, rank_size, lora_scale,
    BM: tl.constexpr, BK: tl.constexpr, R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    r = tl.arange(0, R)
    compute: tl.constexpr = hidden.dtype.element_ty
    acc = tl.zeros((BM, R), tl.float32)
    for k0 in range(0, H, BK):
        k = k0 + tl.arange(0, BK)
        inside = (i < capacity)[:, None] & (k < H)[None, :]
        x = tl.load(hidden + i.to(tl.int64)[:, None] * pitch + k[None, :], mask=inside, other=0.0)
        a = tl.load(lora_a + r[:, None] * H + k[None, :], mask=(r < rank_size)[:, None] & (k < H)[None, :], other=0.0)
        acc = tl.dot(operand(x, compute), operand(a, compute).T, acc, input_precision=PRECISION)
    tl.store(out + i.to(tl.int64)[:, None] * R + r[None, :], acc * lora_scale, mask=(i < capacity)[:, None])


@triton.jit(do_not_specialize=VARYING)
def fold_kernel(
    hidden,  # [capacity, pitch] gathered tokens: TMA descriptor or pointer
    weight,  # [V, H]: TMA descriptor or pointer
    bias,  # [V] or None
    rank, lora_b,  # [capacity, R] fp32 and [V, rank_size], or None
    token_labels, count,
    label_logit,  # [capacity] fp32
    block_lse,  # [capacity, num_blocks] fp32, the label's own logit left out, as in the following
    block_mean,  # sum p z / sum p inside the block, or None
    block_lse2,  # log sum exp(2 z), or None
    block_sum,  # sum z, the label's included, or None
    block_before, block_after,  # largest z left and right of the label, or None
    first_token, capacity, V, H, pitch, weight_stride, num_blocks, rank_size,
    logit_scale, softcap, inv_temperature,
    COMPUTE: tl.constexpr, SOFTCAP: tl.constexpr, R: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Persistent over tiles [BM tokens, BN columns]; logits stay in registers, fp32."""
    BLOCKS: tl.constexpr = BN // BLOCK
    n = num_tokens(count, first_token, capacity)
    tiles_m, tiles_n = tl.cdiv(n, BM), tl.cdiv(V, BN)
    for index in tl.range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS):
        m, v = tile_of(index, tiles_m, tiles_n, GROUP)
        i = m * BM + tl.arange(0, BM)
        acc = start_products(bias, v * BN, V, BM, BN)
        if R > 0:
            acc = add_low_rank(acc, rank, lora_b, i, i < n, v * BN, V, rank_size, COMPUTE, R, BN)
        for k in range(0, H, BK):
            a = load_tile(hidden, m * BM, k, capacity, pitch, pitch, BM, BK, TMA)
            b = load_tile(weight, v * BN, k, V, H, weight_stride, BN, BK, TMA)
            acc = tl.dot(operand(a, COMPUTE), operand(b, COMPUTE).T, acc, input_precision=PRECISION)
        label = tl.load(token_labels + first_token + i, mask=i < n, other=-1)
        _fold_blocks(
            acc, v * BLOCKS, i, i < n, label, label_logit,
            block_lse, block_mean, block_lse2, block_sum, block_before, block_after,
            V, num_blocks, logit_scale, softcap, inv_temperature, SOFTCAP,
        )  # fmt: skip


@triton.jit
def _fold_blocks(
    acc, block, i, exists, label, label_logit,
    block_lse, block_mean, block_lse2, block_sum, block_before, block_after,
    V, num_blocks, logit_scale, softcap, inv_temperature, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Sums of products [tokens i, columns from block on], one block after the other to save registers."""
    if acc.shape[1] > BLOCK:
        left, right = halves(acc)
        _fold_blocks(
            left, block, i, exists, label, label_logit,
            block_lse, block_mean, block_lse2, block_sum, block_before, block_after,
            V, num_blocks, logit_scale, softcap, inv_temperature, SOFTCAP,
        )  # fmt: skip
        _fold_blocks(
            right, block + acc.shape[1] // (2 * BLOCK), i, exists, label, label_logit,
            block_lse, block_mean, block_lse2, block_sum, block_before, block_after,
            V, num_blocks, logit_scale, softcap, inv_temperature, SOFTCAP,
        )  # fmt: skip
    else:
        column = block * BLOCK + tl.arange(0, BLOCK)
        z = logit(acc, logit_scale, softcap, inv_temperature, SOFTCAP)
        is_label = column[None, :] == label[:, None]
        here = exists & (label >= block * BLOCK) & (label < tl.minimum((block + 1) * BLOCK, V))
        tl.store(label_logit + i, tl.sum(tl.where(is_label, z, 0.0), 1), mask=here)
        where = i * num_blocks + block  # a chunk's sums are far fewer than 2^31
        exists = exists & (i * 0 + block < num_blocks)  # a scalar comparison would lose its type in the interpreter
        if block_sum is not None:
            tl.store(block_sum + where, tl.sum(tl.where((column < V)[None, :], z, 0.0), 1), mask=exists)
        rest = tl.where((column < V)[None, :] & ~is_label, z, float("-inf"))
        if block_before is not None:
            left = tl.where(column[None, :] < label[:, None], rest, float("-inf"))
            right = tl.where(column[None, :] > label[:, None], rest, float("-inf"))
            tl.store(block_before + where, tl.max(left, 1), mask=exists)
            tl.store(block_after + where, tl.max(right, 1), mask=exists)
        top = tl.max(rest, 1)
        e = exp(rest - tl.where(top == float("-inf"), 0.0, top)[:, None])
        s = tl.sum(e, 1)
        tl.store(block_lse + where, top + tl.log(s), mask=exists)
        if block_mean is not None:
            mean = tl.sum(tl.where(e > 0, e * rest, 0.0), 1) / s
            tl.store(block_mean + where, tl.where(s == 0, 0.0, mean), mask=exists)
        if block_lse2 is not None:
            tl.store(block_lse2 + where, 2 * top + tl.log(tl.sum(e * e, 1)), mask=exists)


@triton.jit
def _add_exp(m, s, x):
    """Log-sum-exp (m, s) [T] of rows with the values `x` [T, K] added."""
    top = tl.maximum(m, tl.max(x, 1))
    shift = tl.where(top == float("-inf"), 0.0, top)
    return top, s * exp(m - shift) + tl.sum(exp(x - shift[:, None]), 1)


@triton.jit(do_not_specialize=VARYING)
def finish_kernel(
    block_lse, block_mean, block_lse2, block_sum, block_before, block_after,  # [capacity, num_blocks] or None
    label_logit,  # [capacity]
    shard,  # [6, capacity] fp32 or None: what a token's blocks sum up to, to be merged with other ranks' shards
    rows, count,
    rest_lse,  # [capacity] or None: log-sum-exp of every logit but the label's
    logps, lse, entropy, mean_logit, is_top1, log_sum_sq_probs,  # [M] or None
    first_token, capacity, num_blocks, vocab_size,
    REDUCE: tl.constexpr,  # sum the blocks up (False: `shard` holds the merged sums)
    EMIT: tl.constexpr,  # write results (False: write `shard`)
    T: tl.constexpr,  # tokens of a program
    K: tl.constexpr,  # blocks at a time
):  # fmt: skip
    i = tl.program_id(0) * T + tl.arange(0, T)
    token = first_token + i
    n = num_tokens(count, first_token, capacity)
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
            m, s = _add_exp(m, s, tl.load(block_lse + at, mask=inside, other=float("-inf")))
            if block_lse2 is not None:
                m2, s2 = _add_exp(m2, s2, tl.load(block_lse2 + at, mask=inside, other=float("-inf")))
            if block_sum is not None:
                total += tl.sum(tl.load(block_sum + at, mask=inside, other=0.0), 1)
            if block_before is not None:
                left = tl.maximum(left, tl.max(tl.load(block_before + at, mask=inside, other=float("-inf")), 1))
                right = tl.maximum(right, tl.max(tl.load(block_after + at, mask=inside, other=float("-inf")), 1))
        rest = m + tl.log(s)
        lse2 = m2 + tl.log(s2)
        if block_mean is not None:  # sum p z over the vocabulary but the label, relative to `rest`
            for start in range(0, num_blocks, K):
                b = start + tl.arange(0, K)
                inside = exists[:, None] & (b < num_blocks)[None, :]
                x = tl.load(block_lse + base + b[None, :], mask=inside, other=float("-inf"))
                mu = tl.load(block_mean + base + b[None, :], mask=inside, other=0.0)
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
        row = tl.load(rows + token, mask=exists, other=0).to(tl.int64)
        z = tl.load(label_logit + i, mask=exists, other=0.0)
        logp = label_logp(rest, z)
        row_lse = tl.maximum(rest, z) + log1p(tl.exp(-tl.abs(rest - z)))
        tl.store(logps + row, logp, mask=exists)
        tl.store(lse + row, row_lse, mask=exists)
        if rest_lse is not None:
            tl.store(rest_lse + i, rest, mask=exists)
        p = tl.exp(logp)
        if entropy is not None:
            others = tl.exp(rest - row_lse)
            spread = tl.where(others > 0, others * (mean + rest - row_lse), others)
            tl.store(entropy + row, -spread - tl.where(p > 0, p * logp, p), mask=exists)
        if log_sum_sq_probs is not None:
            double = tl.maximum(lse2, 2 * z)
            shift = tl.where(double == float("-inf"), 0.0, double)
            value = double + tl.log(tl.exp(lse2 - shift) + tl.exp(2 * z - shift)) - 2 * row_lse
            tl.store(log_sum_sq_probs + row, value, mask=exists)
        if mean_logit is not None:
            tl.store(mean_logit + row, total / vocab_size, mask=exists)
        if is_top1 is not None:
            tl.store(is_top1 + row, (z > left) & (z >= right), mask=exists)
