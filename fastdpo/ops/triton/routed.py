"""The backward's routed kernels, over the lists of kept pairs (triton_lists.py): dz of work tiles [TILE pairs, 128],
gathered; dz.T @ hidden per block, whose rows no other program has; dz @ weight added to the rows of the tiles' tokens.

`flag` is where a routed call decides between these and triton_backward.py's, on the device.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import (
    BLOCK,
    VARYING,
    add_low_rank,
    expm1,
    load_rows,
    load_tile,
    logit,
    logit_slope,
    operand,
    rounded,
    row_offset,
    start_products,
)
from .exact import dz_of, is_off, row_terms
from .route import pair_weight, second_pair_weight


@triton.jit(do_not_specialize=VARYING)
def routed_dz_kernel(
    hidden,  # [outer, inner, H], the caller's strides
    weight, bias, rank, lora_b,  # rank [capacity, R], of tokens from first_token
    rows, token_labels, logps, lse, coef, dz_scale,
    second_bits,  # [M, bitmap_stride] of the smaller set or None
    tile_block, tokens, lengths, first_tile, round_block, flag,  # of Lists
    dz,  # [tiles in memory * TILE, 128], weighted for the listed set
    ratio,  # [tiles in memory * TILE] fp32 or None: what turns that into the smaller set's
    column_sums,  # [tiles in memory, 128] fp32 or None: dz summed over a tile's tokens before it is rounded
    round, first_token, first_block, V, H, inner, outer_stride, inner_stride, weight_stride, rank_size, bitmap_stride,
    logit_scale, softcap, inv_temperature, tau, second_tau,
    COMPUTE: tl.constexpr, SOFTCAP: tl.constexpr, R: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    SECOND: tl.constexpr,  # the smaller set is listed
    RATIO_WEIGHT: tl.constexpr,  # `ratio` is dweight's and dbias's, not dhidden's
    TILE: tl.constexpr, BK: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    if is_off(flag, 1):
        return
    begin = tl.load(first_tile + tl.load(round_block + round))
    end = tl.load(first_tile + tl.load(round_block + round + 1))
    for index in tl.range(begin + tl.program_id(0), end, PROGRAMS):
        local = tl.load(tile_block + index - begin)
        place = (index - tl.load(first_tile + local)) * TILE + tl.arange(0, TILE)
        exists = place < tl.load(lengths + local)
        at = (index - begin) * TILE + tl.arange(0, TILE)
        t = tl.load(tokens + at, mask=exists, other=0)
        token = first_token + t
        row = tl.load(rows + token, mask=exists, other=0).to(tl.int64)
        label = tl.load(token_labels + token, mask=exists, other=-1)
        offsets = row_offset(row, inner, outer_stride, inner_stride)
        block = first_block + local
        column = block * BLOCK + tl.arange(0, BLOCK)
        acc = start_products(bias, block * BLOCK, V, TILE, BLOCK)
        if R > 0:
            acc = add_low_rank(acc, rank, lora_b, t, exists, block * BLOCK, V, rank_size, COMPUTE, R, BLOCK)
        for k in range(0, H, BK):
            a = load_rows(hidden, offsets, exists, k, H, BK)
            b = load_tile(weight, block * BLOCK, k, V, H, weight_stride, BLOCK, BK, TMA)
            acc = tl.dot(operand(a, COMPUTE), operand(b, COMPUTE).T, acc, input_precision=PRECISION)
        z = logit(acc, logit_scale, softcap, inv_temperature, SOFTCAP)
        slope = logit_slope(z, logit_scale, softcap, inv_temperature, SOFTCAP)
        terms = row_terms(row, exists, logps, lse, None, coef, None)
        tile_dz, p = dz_of(z, slope, terms, label, column, V, False)
        # 1 - p[label] from log p, before any rounding; where it is 0 so is dz
        share = tl.sum(p, 1) / -expm1(tl.load(logps + row, mask=exists, other=-1.0))
        own = (label >= block * BLOCK) & (label < (block + 1) * BLOCK)
        w = pair_weight(share, own, tau)
        if SECOND:
            w *= second_pair_weight(share, own, tau, second_tau)
        if dz_scale is not None:
            w *= tl.load(dz_scale)
        tile_dz *= w[:, None]
        at = at.to(tl.int64)
        target = dz + at[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        tl.store(target, rounded(tile_dz, dz.dtype.element_ty))  # padding rows are zero
        if ratio is not None:
            byte = tl.load(second_bits + row * bitmap_stride + block // 8, mask=exists, other=0).to(tl.int32)
            listed = (byte >> (block % 8)) & 1
            second = tl.where(listed != 0, second_pair_weight(share, own, tau, second_tau), 0.0)
            tl.store(ratio + at, second)
        if column_sums is not None:
            if RATIO_WEIGHT:
                tile_dz = tl.where((second == 0)[:, None], 0.0, tile_dz * second[:, None])
            place = column_sums + (index - begin) * BLOCK + tl.arange(0, BLOCK)
            tl.store(place, tl.sum(tile_dz, 0))


@triton.jit
def _weight_part(weight, row, c, V, H, weight_stride, ROWS: tl.constexpr):
    """[ROWS, columns c] of the head from `row` on."""
    r = row + tl.arange(0, ROWS)
    inside = (r < V)[:, None] & (c < H)[None, :]
    return tl.load(weight + r.to(tl.int64)[:, None] * weight_stride + c[None, :], mask=inside, other=0.0)


@triton.jit
def _times_ratio(product, ratio, place, exists):
    if ratio is not None:
        scale = tl.load(ratio + place, mask=exists, other=0.0)[:, None]
        product = tl.where(scale == 0, 0.0, product * scale)
    return product


@triton.jit(do_not_specialize=VARYING)
def routed_dhidden_kernel(
    dz, ratio, weight,  # weight [V, H], or lora_b
    tile_block, tokens, lengths, first_tile, round_block, flag,
    out,  # [capacity, H] fp32, added to by atomics
    round, first_block, V, H, weight_stride, out_stride,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PROGRAMS: tl.constexpr,
):  # fmt: skip
    if is_off(flag, 1):
        return
    begin = tl.load(first_tile + tl.load(round_block + round))
    end = tl.load(first_tile + tl.load(round_block + round + 1))
    tiles_n = tl.cdiv(H, BN)
    for work in tl.range(begin * tiles_n + tl.program_id(0), end * tiles_n, PROGRAMS):
        index, part = work // tiles_n, work % tiles_n
        local = tl.load(tile_block + index - begin)
        rank = (index - tl.load(first_tile + local)) * TILE + tl.arange(0, TILE)
        exists = rank < tl.load(lengths + local)
        place = (index - begin) * TILE + tl.arange(0, TILE)
        t = tl.load(tokens + place, mask=exists, other=0)
        place = place.to(tl.int64)
        c = part * BN + tl.arange(0, BN)
        product = tl.zeros((TILE, BN), tl.float32)
        for k in range(0, BLOCK, BK):
            a = tl.load(dz + place[:, None] * BLOCK + (k + tl.arange(0, BK))[None, :])
            b = _weight_part(weight, (first_block + local) * BLOCK + k, c, V, H, weight_stride, BK)
            product = tl.dot(operand(a, COMPUTE), operand(b, COMPUTE), product, input_precision=PRECISION)
        product = _times_ratio(product, ratio, place, exists)
        target = out + t.to(tl.int64)[:, None] * out_stride + c[None, :]
        tl.atomic_add(target, product, mask=exists[:, None] & (c < H)[None, :], sem="relaxed")


@triton.jit(do_not_specialize=VARYING)
def ordered_dhidden_kernel(
    dz, ratio, weight,  # weight [V, H], or lora_b
    tokens, running, first_tile, round_block, flag,
    out,  # [capacity, H] fp32, added to
    round, first_block, num_blocks, V, H, weight_stride, out_stride,
    token_tiles, group_tiles,  # rows of `running`, and how many of them a program has
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Repeatable: program (columns, group of tokens) has its part of `out` to itself, and adds one block after the
    other. A block's list is in the order of the tokens, so a group's pairs are neighbours in it."""
    if is_off(flag, 1):
        return
    first, last = tl.load(round_block + round), tl.load(round_block + round + 1)
    base = tl.load(first_tile + first)
    row = tl.program_id(1) * group_tiles
    last_row = tl.minimum(row + group_tiles, token_tiles) - 1
    c = tl.program_id(0) * BN + tl.arange(0, BN)
    for local in range(first, last):
        start = tl.load(first_tile + local)
        begin = tl.load(running + (row - 1) * num_blocks + local, mask=row > 0, other=0)
        end = tl.load(running + last_row * num_blocks + local)
        if begin < end:
            b = operand(_weight_part(weight, (first_block + local) * BLOCK, c, V, H, weight_stride, BLOCK), COMPUTE)
            for at in range(begin, end, ROWS):
                rank = at + tl.arange(0, ROWS)
                exists = rank < end
                t = tl.load(tokens + (start - base) * TILE + rank, mask=exists, other=0)
                place = ((start - base) * TILE + rank).to(tl.int64)
                a = tl.load(dz + place[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :], mask=exists[:, None], other=0.0)
                product = tl.dot(operand(a, COMPUTE), b, input_precision=PRECISION)
                product = _times_ratio(product, ratio, place, exists)
                target = out + t.to(tl.int64)[:, None] * out_stride + c[None, :]
                inside = exists[:, None] & (c < H)[None, :]
                tl.store(target, tl.load(target, mask=inside, other=0.0) + product, mask=inside)
                tl.debug_barrier()  # the next block may hold the same tokens


@triton.jit(do_not_specialize=VARYING)
def routed_dweight_kernel(
    dz, ratio, column_sums,
    hidden,  # [outer, inner, H], the caller's strides, or rank [capacity, R] as one outer row
    rows,  # [M], or None: token i is row i of `hidden`
    tokens, lengths, first_tile, round_block, flag, unscale,
    out,  # [V, H]
    out_bias,  # [V], or None: sums of dz over the tokens
    round, first_token, first_block, V, H, inner, outer_stride, inner_stride, out_stride,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Program (block, columns): the block's rows of `out`, written once; blocks without a pair get zeros."""
    if is_off(flag, 1):
        return
    local = tl.load(round_block + round) + tl.program_id(1)
    if local >= tl.load(round_block + round + 1):
        return
    base = tl.load(first_tile + tl.load(round_block + round))
    start = tl.load(first_tile + local)
    length = tl.load(lengths + local)
    c = tl.program_id(0) * BN + tl.arange(0, BN)
    acc = tl.zeros((BLOCK, BN), tl.float32)
    for k in range(0, length, BK):
        place = k + tl.arange(0, BK)
        exists = place < length
        t = tl.load(tokens + (start - base) * TILE + place, mask=exists, other=0)
        at = ((start - base) * TILE + place).to(tl.int64)
        a = tl.load(dz + at[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :], mask=exists[:, None], other=0.0)
        if ratio is not None:
            scale = tl.load(ratio + at, mask=exists, other=0.0)[:, None]
            a = rounded(tl.where(scale == 0, 0.0, a.to(tl.float32) * scale), a.dtype)
        if rows is not None:
            row = tl.load(rows + first_token + t, mask=exists, other=0)
            offsets = row_offset(row, inner, outer_stride, inner_stride)
        else:
            offsets = t.to(tl.int64) * inner_stride
        b = load_rows(hidden, offsets, exists, tl.program_id(0) * BN, H, BN)
        acc = tl.dot(operand(a, COMPUTE).T, operand(b, COMPUTE), acc, input_precision=PRECISION)
    if unscale is not None:
        acc *= tl.load(unscale)
    r = (first_block + local) * BLOCK + tl.arange(0, BLOCK)
    if out is not None:
        target = out + r.to(tl.int64)[:, None] * out_stride + c[None, :]
        tl.store(target, rounded(acc, out.dtype.element_ty), mask=(r < V)[:, None] & (c < H)[None, :])
    if out_bias is not None:
        if tl.program_id(0) == 0:
            total = tl.zeros((BLOCK,), tl.float32)
            for index in range(start - base, start - base + tl.cdiv(length, TILE)):
                total += tl.load(column_sums + index * BLOCK + tl.arange(0, BLOCK))
            if unscale is not None:
                total *= tl.load(unscale)
            tl.store(out_bias + r, rounded(total, out_bias.dtype.element_ty), mask=r < V)
