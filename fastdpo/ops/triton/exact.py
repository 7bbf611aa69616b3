"""The backward's exact kernels: dz of a slab of blocks by a range of tokens [tokens, columns], then two plain products.

`flag` is where a routed call decides between these and triton_routed.py's, on the device: a kernel whose flag is not
`wanted` does nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import (
    BLOCK,
    VARYING,
    add_low_rank,
    exp,
    expm1,
    halves,
    load_tile,
    logit,
    logit_slope,
    num_tokens,
    operand,
    rounded,
    start_products,
    store_tile,
    tile_of,
    tile_offsets,
    within,
)


@triton.jit
def is_off(flag, wanted: tl.constexpr):
    off = False
    if flag is not None:
        off = tl.load(flag) != wanted
    return off


@triton.jit
def row_terms(row, exists, logps, lse, entropy, coef, coef_entropy):
    """What dz takes from its rows: (row has a gradient, lse, coef, dz of the label's logit, two for the entropy's)."""
    c = tl.load(coef + row, mask=exists, other=0.0)
    row_lse = tl.load(lse + row, mask=exists, other=0.0)
    # 1 - p[label] from log p, before any rounding
    own = c * -expm1(tl.load(logps + row, mask=exists, other=0.0))
    active = c != 0
    ce, shift = c, c
    if coef_entropy is not None:
        ce = tl.load(coef_entropy + row, mask=exists, other=0.0)
        shift = ce * (tl.load(entropy + row, mask=exists, other=0.0) - row_lse)
        active = active | (ce != 0)
    return active, row_lse, c, own, ce, shift


@triton.jit
def dz_of(z, slope, terms, label, column, V, ENTROPY: tl.constexpr):
    """(dz, p without the label's) of a tile of logits, fp32."""
    active, row_lse, c, own, ce, shift = terms
    is_label = column[None, :] == label[:, None]
    p = exp(z - row_lse[:, None])
    dz = tl.where(is_label, own[:, None], -c[:, None] * p)
    if ENTROPY:
        dz -= tl.where(p > 0, p * (ce[:, None] * z + shift[:, None]), p)
    inside = (column < V)[None, :]
    dz = tl.where(active[:, None] & inside, dz * slope, 0.0)
    return dz, tl.where(inside & ~is_label, p, 0.0)


@triton.jit(do_not_specialize=VARYING)
def dz_kernel(
    hidden,  # [capacity, pitch] gathered: TMA descriptor or pointer
    weight, bias, rank, lora_b, rows, token_labels, count, logps, lse, entropy, coef, coef_entropy, dz_scale, flag,
    dz,  # [capacity, dz_stride]: columns from first_column on
    column_sums,  # [tiles of BM tokens, dz_stride] fp32 or None: dz summed over a tile's tokens before it is rounded
    first_token, capacity, first_column, last_column, dz_stride, V, H, pitch, weight_stride, rank_size,
    logit_scale, softcap, inv_temperature,
    wanted: tl.constexpr, COMPUTE: tl.constexpr, SOFTCAP: tl.constexpr, R: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Rows without a token and columns from V on get zeros, so that the products need no masks along their sums."""
    if is_off(flag, wanted):
        return
    n = num_tokens(count, first_token, capacity)
    tiles_m, tiles_n = tl.cdiv(capacity, BM), tl.cdiv(last_column - first_column, BN)
    for index in tl.range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS):
        m, v = tile_of(index, tiles_m, tiles_n, GROUP)
        i = m * BM + tl.arange(0, BM)
        exists = i < n
        acc = start_products(bias, first_column + v * BN, V, BM, BN)
        if R > 0:
            acc = add_low_rank(acc, rank, lora_b, i, exists, first_column + v * BN, V, rank_size, COMPUTE, R, BN)
        depth = H if m * BM < n else 0
        for k in range(0, depth, BK):
            a = load_tile(hidden, m * BM, k, capacity, pitch, pitch, BM, BK, TMA)
            b = load_tile(weight, first_column + v * BN, k, V, H, weight_stride, BN, BK, TMA)
            acc = tl.dot(operand(a, COMPUTE), operand(b, COMPUTE).T, acc, input_precision=PRECISION)
        row = tl.load(rows + first_token + i, mask=exists, other=0).to(tl.int64)
        label = tl.load(token_labels + first_token + i, mask=exists, other=-1)
        terms = row_terms(row, exists, logps, lse, entropy, coef, coef_entropy)
        target = dz + (m * BM).to(tl.int64) * dz_stride
        sums = column_sums
        if column_sums is not None:
            sums += m * dz_stride
        scale = 1.0
        if dz_scale is not None:
            scale = tl.load(dz_scale)
        dz_columns(
            acc, v * BN, first_column, i < capacity, label, terms, scale, target, sums, dz_stride, V,
            logit_scale, softcap, inv_temperature, SOFTCAP, coef_entropy is not None,
        )  # fmt: skip


@triton.jit
def dz_columns(
    acc, begin, first_column, inside, label, terms, scale, target, sums, dz_stride, V,
    logit_scale, softcap, inv_temperature, SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    """Products [tokens, columns from first_column + begin on] -> dz, a block of columns at a time to save registers."""
    if acc.shape[1] > BLOCK:
        left, right = halves(acc)
        dz_columns(
            left, begin, first_column, inside, label, terms, scale, target, sums, dz_stride, V,
            logit_scale, softcap, inv_temperature, SOFTCAP, ENTROPY,
        )  # fmt: skip
        dz_columns(
            right, begin + acc.shape[1] // 2, first_column, inside, label, terms, scale, target, sums,
            dz_stride, V, logit_scale, softcap, inv_temperature, SOFTCAP, ENTROPY,
        )  # fmt: skip
    else:
        at = begin + tl.arange(0, BLOCK)
        column = first_column + at
        z = logit(acc, logit_scale, softcap, inv_temperature, SOFTCAP)
        slope = logit_slope(z, logit_scale, softcap, inv_temperature, SOFTCAP)
        tile_dz, _ = dz_of(z, slope, terms, label, column, V, ENTROPY)
        tile_dz *= scale
        where = tl.arange(0, acc.shape[0])[:, None] * dz_stride + at[None, :]
        tl.store(
            target + where, rounded(tile_dz, target.dtype.element_ty), mask=inside[:, None] & (at < dz_stride)[None, :]
        )
        if sums is not None:
            tl.store(sums + at, tl.sum(tile_dz, 0), mask=at < dz_stride)


@triton.jit(do_not_specialize=VARYING)
def dhidden_kernel(
    dz,  # [capacity, dz_stride]: TMA descriptor or pointer
    weight,  # [V, H], or lora_b: TMA descriptor or pointer
    count, flag,
    out,  # [capacity, H] fp32, added to
    first_token, capacity, first_column, last_column, dz_stride, V, H, weight_stride, out_stride,
    wanted: tl.constexpr, COMPUTE: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    if is_off(flag, wanted):
        return
    n = num_tokens(count, first_token, capacity)
    tiles_m, tiles_n = tl.cdiv(n, BM), tl.cdiv(H, BN)
    for index in tl.range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS):
        m, h = tile_of(index, tiles_m, tiles_n, GROUP)
        # added to before the products, while `acc` takes no registers yet
        inside = within(m * BM, h * BN, n, H, BM, BN)
        acc = tl.load(out + tile_offsets(m * BM, h * BN, out_stride, BM, BN), mask=inside, other=0.0)
        for k in range(0, last_column - first_column, BK):
            a = load_tile(dz, m * BM, k, capacity, dz_stride, dz_stride, BM, BK, TMA)
            b = load_tile(weight, first_column + k, h * BN, V, H, weight_stride, BK, BN, TMA)
            acc = tl.dot(operand(a, COMPUTE), operand(b, COMPUTE), acc, input_precision=PRECISION)
        store_tile(out, acc, m * BM, h * BN, n, H, out_stride)


@triton.jit(do_not_specialize=VARYING)
def dweight_kernel(
    dz,  # [capacity, dz_stride]: TMA descriptor or pointer
    column_sums,  # of dz_kernel
    hidden,  # [capacity, pitch], gathered, or rank: TMA descriptor or pointer
    count, flag, unscale,
    partial,  # [columns, H] fp32, or None: sums over the tokens before `first_token`
    partial_bias,  # [columns] fp32, or None
    out,  # [V, H], or None
    out_bias,  # [V], or None
    first_token, capacity, first_column, last_column, dz_stride, H, pitch, out_stride,
    sum_tile,  # tokens of one row of column_sums
    summed_columns,  # of `partial` that hold a sum already
    LAST: tl.constexpr,  # write `out`, else `partial`
    wanted: tl.constexpr, COMPUTE: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """dz.T @ hidden of a slab of columns; capacity is a multiple of BK and rows without a token are zero."""
    if is_off(flag, wanted):
        return
    n = num_tokens(count, first_token, capacity)
    tiles_m, tiles_n = tl.cdiv(last_column - first_column, BM), tl.cdiv(H, BN)
    for index in tl.range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS):
        m, h = tile_of(index, tiles_m, tiles_n, GROUP)
        acc = tl.zeros((BM, BN), tl.float32)
        if partial is not None:
            inside = within(m * BM, h * BN, summed_columns, H, BM, BN)
            acc = tl.load(partial + tile_offsets(m * BM, h * BN, H, BM, BN), mask=inside, other=0.0)
        for k in range(0, n, BK):
            a = load_tile(dz, k, m * BM, capacity, dz_stride, dz_stride, BK, BM, TMA)
            b = load_tile(hidden, k, h * BN, capacity, pitch, pitch, BK, BN, TMA)
            acc = tl.dot(operand(a, COMPUTE).T, operand(b, COMPUTE), acc, input_precision=PRECISION)
        if out is not None:
            if LAST:
                if unscale is not None:
                    acc *= tl.load(unscale)
                store_tile(out, acc, first_column + m * BM, h * BN, last_column, H, out_stride)
            else:
                store_tile(partial, acc, m * BM, h * BN, last_column - first_column, H, H)
        if out_bias is not None:
            if h == 0:
                v = m * BM + tl.arange(0, BM)
                column = first_column + v
                mine = column < last_column
                total = tl.zeros((BM,), tl.float32)
                for index in range(0, tl.cdiv(n, sum_tile)):
                    total += tl.load(column_sums + index * dz_stride + v, mask=mine, other=0.0)
                if partial_bias is not None:
                    total += tl.load(partial_bias + v, mask=v < summed_columns, other=0.0)
                if LAST:
                    if unscale is not None:
                        total *= tl.load(unscale)
                    tl.store(out_bias + column, rounded(total, out_bias.dtype.element_ty), mask=mine)
                else:
                    tl.store(partial_bias + v, total, mask=mine)


@triton.jit(do_not_specialize=VARYING)
def spread_kernel(
    sums,  # [capacity, H] fp32, of tokens from first_token
    position, unscale,
    out,  # [M, H]
    num_rows, first_token, capacity, H,
    BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """dhidden of the rows of these tokens; with the first of them, of the rows that are no token: 0, or NaN."""
    r = tl.program_id(0) * BM + tl.arange(0, BM)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    token = tl.load(position + r, mask=r < num_rows, other=-3)
    here = (token >= first_token) & (token < first_token + capacity)
    at = (token - first_token).to(tl.int64)[:, None] * H + k[None, :]
    x = tl.load(sums + at, mask=here[:, None] & (k < H)[None, :], other=0.0)
    if unscale is not None:
        x *= tl.load(unscale)
    x = tl.where((token == -2)[:, None], float("nan"), x)
    write = here | ((token < 0) & (token > -3) & (token * 0 + first_token == 0))
    target = out + r.to(tl.int64)[:, None] * H + k[None, :]
    tl.store(target, rounded(x, out.dtype.element_ty), mask=write[:, None] & (k < H)[None, :])
