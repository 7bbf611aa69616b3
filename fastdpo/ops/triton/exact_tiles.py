"""Tiles of the exact backward: dz of a step, its products, and rows of dhidden."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .common import (
    BLOCK,
    INTERPRET,
    columns_of,
    dot,
    dz_of,
    hidden_offset,
    is_plain,
    load_rows,
    load_tile,
    rounded,
    row_terms,
    rows_in_blocks,
    start_products,
    store_tile,
    tile_of,
    tile_offsets,
    within,
)

ROWS, COLUMNS = tl.constexpr(64 if INTERPRET.value else 16), tl.constexpr(256)  # of a tile of dhidden


class Work(NamedTuple):
    """What one step leaves for the next."""

    done: Tensor  # [1 + 2 steps] int32, zeros: items taken; of each step, items of dz and of its products that are done
    dz: Tensor  # [chunk, slab]
    column_sums: Tensor | None  # [tiles of a chunk, slab] fp32: dz summed over a tile's tokens before it is rounded
    # sums over earlier chunks of the head's gradients of a slab, fp32, where there are several
    weight: Tensor | None
    bias: Tensor | None
    lora_b: Tensor | None
    multiple: tl.constexpr  # 16, or 1: of which H is one,
    lora_multiple: tl.constexpr  # and the low-rank head's rank


class Outputs(NamedTuple):
    """Gradients that are written, those of the sweep; and the fp32 sums that are added to."""

    hidden: Tensor | None  # [M, H], from hidden_sums
    weight: Tensor | None
    bias: Tensor | None
    lora_b: Tensor | None
    hidden_sums: Tensor | None  # [capacity, H]: dz @ weight
    low_rank_sums: Tensor | None  # [capacity, pitch]: dz @ lora_b
    adds: tl.constexpr  # the head's weight: what is there before counts


class Scales(NamedTuple):
    """Of fp16, [] fp32 both: dz is multiplied by the one before it is rounded, and its products by the other."""

    dz: Tensor | None
    unscale: Tensor | None


class Step(NamedTuple):
    """Tokens [first_token, +num_tokens) of the range by columns [first_column, last_column) of the vocabulary."""

    first_token: tl.tensor
    num_tokens: tl.tensor
    first_column: tl.tensor
    last_column: tl.tensor
    chunks_left: tl.tensor  # of this slab


@triton.jit
def dz_tile(
    at, step, hidden, weight, head, H, low_rank, transform, tokens, terms, scales, work, first_token, dz_stride, form
):
    """A tile [BM tokens, BN columns] of dz, and of column_sums; columns from V on get zeros."""
    tl.static_assert(form.BN % BLOCK == 0)
    tiles_m = tl.cdiv(step.num_tokens, form.BM)
    m, v = tile_of(at, tiles_m, tl.cdiv(step.last_column - step.first_column, form.BN), form.GROUP)
    i = m * form.BM + tl.arange(0, form.BM)
    exists = i < step.num_tokens
    t = step.first_token + i
    token = first_token + t
    offsets = hidden_offset(tokens, token, exists)
    column = step.first_column + v * form.BN
    acc = start_products(head, low_rank, t, exists, column, form.COMPUTE, form.BM, form.BN)
    for k in tl.range(0, H, form.BK, num_stages=form.STAGES):
        a = load_rows(hidden, offsets, exists, k, H, form.BK)
        b = load_tile(weight, column, k, head.V, H, head.weight_stride, form.BN, form.BK, form.TMA)
        acc = dot(a, b.T, acc, form.COMPUTE)
    row = tl.load(tokens.rows + token, mask=exists, other=0).to(tl.int64)
    label = tl.load(tokens.labels + token, mask=exists, other=-1)
    of_row = row_terms(row, exists, terms, transform, scales.dz)
    rows = rows_in_blocks(label, exists & ~of_row.active, column, form.BN // BLOCK)
    entropy: tl.constexpr = terms.coef_entropy is not None
    target = work.dz + (m * form.BM).to(tl.int64) * dz_stride
    parts = columns_of(acc)
    for j in tl.static_range(form.BN // BLOCK):
        c = v * form.BN + j * BLOCK + tl.arange(0, BLOCK)
        plain = is_plain(rows, j, column, head.V)
        part = dz_of(parts[j], transform, of_row, label, step.first_column + c, head.V, plain, entropy)
        where = tl.arange(0, form.BM)[:, None] * dz_stride + c[None, :]  # 32 bits
        tl.store(target + where, rounded(part, work.dz.dtype.element_ty), mask=(c < dz_stride)[None, :])
        if work.column_sums is not None:
            tl.store(work.column_sums + m * dz_stride + c, tl.sum(part, 0), mask=c < dz_stride)


@triton.jit
def by_token_tile(at, step, work, operand, out, V, WIDTH, stride, operand_stride, dz_stride, form):
    """A tile [BM tokens, BN columns] of `out` [*, WIDTH]: dz @ operand [V, WIDTH] of a step is added."""
    tiles_m, tiles_n = tl.cdiv(step.num_tokens, form.BM), tl.cdiv(WIDTH, form.BN)
    m, h = tile_of(at, tiles_m, tiles_n, form.GROUP)
    out += step.first_token.to(tl.int64) * stride
    # added to before the products, while `acc` takes no registers yet
    inside = within(m * form.BM, h * form.BN, step.num_tokens, WIDTH, form.BM, form.BN)
    acc = tl.load(out + tile_offsets(m * form.BM, h * form.BN, stride, form.BM, form.BN), mask=inside, other=0.0)
    # dz has been written by this launch: through pointers it is seen, through a descriptor it need not be
    source = work.dz + (m * form.BM).to(tl.int64) * dz_stride + tl.arange(0, form.BM)[:, None] * dz_stride
    for k in tl.range(0, step.last_column - step.first_column, form.BK, num_stages=form.STAGES):
        a = tl.load(source + (k + tl.arange(0, form.BK))[None, :])
        b = load_tile(operand, step.first_column + k, h * form.BN, V, WIDTH, operand_stride, form.BK, form.BN, form.TMA)
        acc = dot(a, b, acc, form.COMPUTE)
    store_tile(out, acc, m * form.BM, h * form.BN, step.num_tokens, WIDTH, stride)


@triton.jit
def _store_sum(partial, out, x, where, mine, target, inside, step, scales, ADDS: tl.constexpr):
    """`x` with what earlier chunks left: to `out` where it is the last, else left for the next."""
    left = where * 0 + step.chunks_left  # a scalar comparison would lose its type in the interpreter
    if partial is not None:
        x += tl.load(partial + where, mask=mine & (where * 0 + step.first_token > 0), other=0.0)
        tl.store(partial + where, x, mask=mine & (left > 0))
    if scales.unscale is not None:
        x *= tl.load(scales.unscale)
    if ADDS:
        x += tl.load(out + target, mask=inside & (left == 0), other=0.0).to(tl.float32)
    tl.store(out + target, rounded(x, out.dtype.element_ty), mask=inside & (left == 0))


@triton.jit
def of_head_tile(
    at,
    step,
    operand,
    operand_stride,
    tokens,
    work,
    scales,
    partial,
    out,
    ADDS: tl.constexpr,
    WIDTH,
    first_token,
    dz_stride,
    form,
):
    """A tile [BM columns of the vocabulary, BN] of dz.T @ operand [tokens, WIDTH], over a step's tokens. Operand's rows
    begin where the tokens say, or at multiples of its stride where that is not None."""
    tiles_m, tiles_n = tl.cdiv(step.last_column - step.first_column, form.BM), tl.cdiv(WIDTH, form.BN)
    m, h = tile_of(at, tiles_m, tiles_n, form.GROUP)
    acc = tl.zeros((form.BM, form.BN), tl.float32)
    c = m * form.BM + tl.arange(0, form.BM)
    for k in tl.range(0, step.num_tokens, form.BK, num_stages=form.STAGES):
        i = k + tl.arange(0, form.BK)
        exists = i < step.num_tokens
        t = step.first_token + i
        if operand_stride is None:
            offsets = hidden_offset(tokens, first_token + t, exists)
        else:
            offsets = t.to(tl.int64) * operand_stride
        mask = exists[:, None] & (c < dz_stride)[None, :]
        a = tl.load(work.dz + i.to(tl.int64)[:, None] * dz_stride + c[None, :], mask=mask, other=0.0)
        b = load_rows(operand, offsets, exists, h * form.BN, WIDTH, form.BN)
        acc = dot(a.T, b, acc, form.COMPUTE)
    parts = columns_of(acc)
    COLUMNS: tl.constexpr = min(form.BN, BLOCK)
    for j in tl.static_range(form.BN // COLUMNS):
        column = h * form.BN + j * COLUMNS
        where = tile_offsets(m * form.BM, column, WIDTH, form.BM, COLUMNS)
        target = tile_offsets(step.first_column + m * form.BM, column, WIDTH, form.BM, COLUMNS)
        last = step.last_column - step.first_column
        mine = within(m * form.BM, column, last, WIDTH, form.BM, COLUMNS)
        _store_sum(partial, out, parts[j], where, mine, target, mine, step, scales, ADDS)


@triton.jit
def bias_tile(at, step, work, scales, out, dz_stride, TOKENS: tl.constexpr):
    """COLUMNS of column_sums, over a step's tokens: TOKENS of each row of it."""
    c = at * COLUMNS + tl.arange(0, COLUMNS)
    mine = c < step.last_column - step.first_column
    total = tl.zeros((COLUMNS,), tl.float32)
    for index in range(0, tl.cdiv(step.num_tokens, TOKENS)):
        total += tl.load(work.column_sums + index * dz_stride + c, mask=mine, other=0.0)
    _store_sum(work.bias, out, total, c, mine, step.first_column + c, mine, step, scales, False)


@triton.jit
def hidden_tile(at, low_rank, tokens, scales, outputs, num_rows, first_token, capacity, H):
    """A tile of dhidden, of the rows of these tokens, from their sums; with the first tokens also of those that are
    none: 0, or NaN. What goes through lora_a is added here."""
    tiles_n = tl.cdiv(H, COLUMNS)
    r = at // tiles_n * ROWS + tl.arange(0, ROWS)
    c = at % tiles_n * COLUMNS + tl.arange(0, COLUMNS)
    token = tl.load(tokens.token_of_row + r, mask=r < num_rows, other=-3)
    here = (token >= first_token) & (token < first_token + capacity)
    t = (token - first_token).to(tl.int64)
    x = tl.load(outputs.hidden_sums + t[:, None] * H + c[None, :], mask=here[:, None] & (c < H)[None, :], other=0.0)
    if low_rank.product is not None:
        for first in tl.range(0, low_rank.lora_rank, 16, num_stages=1):
            k = first + tl.arange(0, 16)
            sums = outputs.low_rank_sums + t[:, None] * low_rank.pitch + k[None, :]
            a = tl.load(sums, mask=here[:, None], other=0.0)  # zero from lora_rank on
            inside = (k < low_rank.lora_rank)[:, None] & (c < H)[None, :]
            b = tl.load(low_rank.lora_a + k[:, None] * H + c[None, :], mask=inside, other=0.0)
            b = rounded(b, outputs.hidden.dtype.element_ty)
            x = dot(a * low_rank.scale, b, x, tl.float32)
    if scales.unscale is not None:
        x *= tl.load(scales.unscale)
    x = tl.where((token == -2)[:, None], float("nan"), x)
    write = here | ((token < 0) & (token > -3) & (token * 0 + first_token == 0))
    target = outputs.hidden + r.to(tl.int64)[:, None] * H + c[None, :]
    tl.store(target, rounded(x, outputs.hidden.dtype.element_ty), mask=write[:, None] & (c < H)[None, :])
