"""The backward's exact kernels: dz of a slab of blocks by a chunk of tokens [tokens, columns], then two plain products.

In a routed call these do nothing where its `flag` says that the routed kernels do it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    BLOCK,
    VARYING,
    LowRank,
    TokenRange,
    columns_of,
    dot,
    dz_of,
    is_plain,
    load_tile,
    logit_products,
    num_tokens,
    rounded,
    row_terms,
    rows_in_blocks,
    store_tile,
    tile_of,
    tile_offsets,
    within,
)
from .launch import launch
from .sweep import Sweep, gathered
from .tokens import gather


class Slab(NamedTuple):
    """Columns [first_column, last_column) of the vocabulary."""

    first_column: int
    last_column: int


@triton.jit(do_not_specialize=VARYING)
def dz_kernel(
    hidden,  # [capacity, pitch] gathered: TMA descriptor or pointer
    weight,  # TMA descriptor or pointer
    head,  # Columns
    low_rank,  # LowRank
    transform,
    tokens,
    terms,  # RowTerms
    dz_scale,
    flag,
    dz,  # [capacity, dz_stride]: columns from first_column on
    column_sums,  # [tiles of BM tokens, dz_stride] fp32 or None: dz summed over a tile's tokens before it is rounded
    first_token,
    capacity,
    first_column,
    last_column,
    dz_stride,
    pitch,
    form,
):
    """Persistent over tiles [BM tokens, BN columns] of dz and of column_sums, each a program's own. Rows without a
    token and columns from V on get zeros, so that the products need no masks along their sums."""
    if flag is not None:
        if tl.load(flag) != 0:
            return
    n = num_tokens(tokens, first_token, capacity)
    tiles_m, tiles_n = tl.cdiv(capacity, form.BM), tl.cdiv(last_column - first_column, form.BN)
    for index in tl.range(tl.program_id(0), tiles_m * tiles_n, form.PROGRAMS):
        m, v = tile_of(index, tiles_m, tiles_n, form.GROUP)
        i = m * form.BM + tl.arange(0, form.BM)
        exists = i < n
        depth = head.H if m * form.BM < n else 0
        column = first_column + v * form.BN
        acc = logit_products(hidden, weight, head, low_rank, m * form.BM, exists, column, depth, capacity, pitch, form)
        row = tl.load(tokens.rows + first_token + i, mask=exists, other=0).to(tl.int64)
        label = tl.load(tokens.labels + first_token + i, mask=exists, other=-1)
        of_row = row_terms(row, exists, terms, transform, dz_scale)
        rows = rows_in_blocks(label, exists & ~of_row.active, column, form.BN // BLOCK)
        target = dz + (m * form.BM).to(tl.int64) * dz_stride
        entropy: tl.constexpr = terms.coef_entropy is not None
        parts = columns_of(acc)
        for j in tl.static_range(form.BN // BLOCK):
            at = v * form.BN + j * BLOCK + tl.arange(0, BLOCK)
            plain = is_plain(rows, j, column, head.V)
            part = dz_of(parts[j], transform, of_row, label, first_column + at, head.V, plain, entropy)
            inside = (i < capacity)[:, None] & (at < dz_stride)[None, :]
            where = tl.arange(0, form.BM)[:, None] * dz_stride + at[None, :]  # 32 bits
            tl.store(target + where, rounded(part, dz.dtype.element_ty), mask=inside)
            if column_sums is not None:
                tl.store(column_sums + m * dz_stride + at, tl.sum(part, 0), mask=at < dz_stride)


def _dz(sweep: Sweep, tokens: TokenRange, hidden, low_rank: LowRank, slab: Slab, tile, dz, column_sums, flag):
    call = sweep.call
    form, a, b = call.form(tile, (hidden, tile.m, tile.k), (call.weight, tile.n, tile.k))
    launch(
        dz_kernel,
        form.grid,
        tile,
        hidden=a,
        weight=b,
        head=call.columns,
        low_rank=low_rank,
        transform=call.transform,
        terms=sweep.terms,
        dz_scale=sweep.dz_scale,
        flag=flag,
        dz=dz,
        column_sums=column_sums,
        dz_stride=dz.shape[1],
        pitch=call.pitch,
        form=form,
        **tokens._asdict(),
        **slab._asdict(),
    )


@triton.jit(do_not_specialize=VARYING)
def dhidden_kernel(
    dz,  # [capacity, dz_stride]: TMA descriptor or pointer
    weight,  # [V, H], or lora_b: TMA descriptor or pointer
    tokens,
    flag,
    out,  # [capacity, H] fp32, added to
    first_token,
    capacity,
    first_column,
    last_column,
    dz_stride,
    V,
    H,
    weight_stride,
    out_stride,
    form,
):
    """Persistent over tiles [BM tokens, BN of H] of `out`, each a program's own: adds dz @ weight of a slab."""
    if flag is not None:
        if tl.load(flag) != 0:
            return
    n = num_tokens(tokens, first_token, capacity)
    tiles_m, tiles_n = tl.cdiv(n, form.BM), tl.cdiv(H, form.BN)
    for index in tl.range(tl.program_id(0), tiles_m * tiles_n, form.PROGRAMS):
        m, h = tile_of(index, tiles_m, tiles_n, form.GROUP)
        # added to before the products, while `acc` takes no registers yet
        inside = within(m * form.BM, h * form.BN, n, H, form.BM, form.BN)
        offsets = tile_offsets(m * form.BM, h * form.BN, out_stride, form.BM, form.BN)
        acc = tl.load(out + offsets, mask=inside, other=0.0)
        for k in range(0, last_column - first_column, form.BK):
            a = load_tile(dz, m * form.BM, k, capacity, dz_stride, dz_stride, form.BM, form.BK, form.TMA)
            b = load_tile(weight, first_column + k, h * form.BN, V, H, weight_stride, form.BK, form.BN, form.TMA)
            acc = dot(a, b, acc, form.COMPUTE)
        store_tile(out, acc, m * form.BM, h * form.BN, n, H, out_stride)


def _dhidden(sweep: Sweep, tokens: TokenRange, dz: Tensor, weight: Tensor, slab: Slab, out: Tensor, flag) -> None:
    call, low_rank = sweep.call, weight is sweep.call.lora_b
    tile = call.tile("dhidden", weight.shape[1], "low_rank" if low_rank else None)
    compute = tl.float32 if low_rank else None
    form, a, b = call.form(tile, (dz, tile.m, tile.k), (weight, tile.k, tile.n), compute=compute)
    launch(
        dhidden_kernel,
        form.grid,
        tile,
        dz=a,
        weight=b,
        flag=flag,
        out=out,
        dz_stride=dz.shape[1],
        V=call.vocab_size,
        H=weight.shape[1],
        weight_stride=weight.stride(0),
        out_stride=out.stride(0),
        form=form,
        **tokens._asdict(),
        **slab._asdict(),
    )


@triton.jit(do_not_specialize=VARYING)
def dweight_kernel(
    dz,  # [capacity, dz_stride]: TMA descriptor or pointer
    column_sums,  # of dz_kernel
    hidden,  # [capacity, pitch], gathered, or LowRank.product: TMA descriptor or pointer
    tokens,
    flag,
    unscale,
    partial,  # [columns, H] fp32, or None: sums over the tokens before `first_token`
    partial_bias,  # [columns] fp32, or None
    out,  # [V, H], or None
    out_bias,  # [V], or None
    first_token,
    capacity,
    first_column,
    last_column,
    dz_stride,
    H,
    pitch,
    out_stride,
    sum_tile,  # tokens of one row of column_sums
    summed_columns,  # of `partial` that hold a sum already
    LAST: tl.constexpr,  # write `out`, else `partial`
    form,
):
    """dz.T @ hidden of a slab, persistent over tiles [BM columns, BN of H], each a program's own; those of the first BN
    of H write the bias. The capacity is a multiple of BK, and rows without a token are zero."""
    if flag is not None:
        if tl.load(flag) != 0:
            return
    n = num_tokens(tokens, first_token, capacity)
    tiles_m, tiles_n = tl.cdiv(last_column - first_column, form.BM), tl.cdiv(H, form.BN)
    for index in tl.range(tl.program_id(0), tiles_m * tiles_n, form.PROGRAMS):
        m, h = tile_of(index, tiles_m, tiles_n, form.GROUP)
        acc = tl.zeros((form.BM, form.BN), tl.float32)
        if partial is not None:
            inside = within(m * form.BM, h * form.BN, summed_columns, H, form.BM, form.BN)
            acc = tl.load(partial + tile_offsets(m * form.BM, h * form.BN, H, form.BM, form.BN), mask=inside, other=0.0)
        for k in range(0, n, form.BK):
            a = load_tile(dz, k, m * form.BM, capacity, dz_stride, dz_stride, form.BK, form.BM, form.TMA)
            b = load_tile(hidden, k, h * form.BN, capacity, pitch, pitch, form.BK, form.BN, form.TMA)
            acc = dot(a.T, b, acc, form.COMPUTE)
        if out is not None:
            if LAST:
                if unscale is not None:
                    acc *= tl.load(unscale)
                store_tile(out, acc, first_column + m * form.BM, h * form.BN, last_column, H, out_stride)
            else:
                store_tile(partial, acc, m * form.BM, h * form.BN, last_column - first_column, H, H)
        if out_bias is not None:
            if h == 0:
                v = m * form.BM + tl.arange(0, form.BM)
                column = first_column + v
                mine = column < last_column
                total = tl.zeros((form.BM,), tl.float32)
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


def _dweight(
    sweep: Sweep,
    tokens: TokenRange,
    dz: Tensor,
    hidden: Tensor,
    slab: Slab,
    out: Tensor | None,
    partial: Tensor | None,
    *,
    ends: tuple[bool, bool],
    flag=None,
    kind="dweight",
    column_sums=None,
    sum_tile=0,
    out_bias=None,
    partial_bias=None,
) -> None:
    """dz.T @ hidden of a chunk of tokens, the first or the last by `ends` of those that `partial` sums up."""
    call = sweep.call
    columns = call.hidden_size if out is None else out.shape[1]
    low_rank = kind == "dlora_a" or hidden.dtype != call.dtype
    tile = call.tile(kind, columns, "low_rank" if low_rank else None)
    compute = tl.float32 if low_rank else None
    form, a, b = call.form(tile, (dz, tile.k, tile.m), (hidden, tile.k, tile.n), compute=compute)
    launch(
        dweight_kernel,
        form.grid,
        tile,
        dz=a,
        column_sums=column_sums,
        hidden=b,
        flag=flag,
        unscale=sweep.unscale,
        partial=partial,
        partial_bias=partial_bias,
        out=out,
        out_bias=out_bias,
        dz_stride=dz.stride(0),
        H=columns,
        pitch=hidden.stride(0),
        out_stride=0 if out is None else out.stride(0),
        sum_tile=sum_tile,
        summed_columns=0 if ends[0] else slab.last_column - slab.first_column,
        LAST=ends[1],
        form=form,
        **tokens._asdict(),
        **slab._asdict(),
    )


def exact(sweep: Sweep, blocks: range, flag: Tensor | None) -> None:
    """Chunks of tokens by slabs of blocks; a slab's gradients are summed over several chunks in fp32."""
    call, everything, (size, step) = sweep.call, sweep.tokens, sweep.slab
    tile = call.tile("dz", kind="narrow" if sweep.terms.coef_entropy is not None and call.kind == "half" else None)
    chunks = range(0, everything.capacity, size)
    several = sweep.of_head and len(chunks) > 1
    step = min(step, len(blocks))
    slabs = range(blocks.start, blocks.stop, step)

    def sums(wanted: bool, *shape: int) -> Tensor | None:
        return torch.empty(shape, dtype=torch.float32, device=call.device) if wanted else None

    width = step * BLOCK.value
    dz = torch.empty(size, width, dtype=call.dtype, device=call.device)
    column_sums = sums(sweep.dbias is not None, triton.cdiv(size, tile.m), width)
    partial = sums(several and sweep.dweight is not None, width, call.hidden_size)
    partial_bias = sums(several and sweep.dbias is not None, width)
    partial_lora = sums(several and sweep.dlora_b is not None, width, call.lora_rank)
    order = (
        [(at, slab) for slab in slabs for at in chunks] if several else [(at, slab) for at in chunks for slab in slabs]
    )
    held = None
    for at, slab in order:
        rows = min(size, everything.capacity - at)  # a range need not be whole chunks
        tokens = TokenRange(everything.tokens, everything.first_token + at, rows)
        slab = Slab(slab * BLOCK.value, min(min(slab + step, blocks.stop) * BLOCK.value, call.vocab_size))
        if held != at:
            held, hidden, chunk = at, gather(call, tokens, flag), dz[:rows]
            low_rank = sweep.low_rank
            if low_rank.product is not None:
                low_rank = low_rank._replace(product=low_rank.product[at : at + rows])
        _dz(sweep, tokens, hidden, low_rank, slab, tile, chunk, column_sums, flag)
        for out, operand in sweep.by_token:
            _dhidden(sweep, tokens, chunk, operand, slab, out[at : at + rows], flag)
        ends = (at == chunks[0], at == chunks[-1])
        if sweep.dweight is not None or sweep.dbias is not None:
            _dweight(
                sweep,
                tokens,
                chunk,
                hidden,
                slab,
                sweep.dweight,
                partial,
                ends=ends,
                flag=flag,
                column_sums=column_sums,
                sum_tile=tile.m,
                out_bias=sweep.dbias,
                partial_bias=partial_bias,
            )
        if sweep.dlora_b is not None:
            _dweight(sweep, tokens, chunk, low_rank.product, slab, sweep.dlora_b, partial_lora, ends=ends, flag=flag)


def dlora_a(sweep: Sweep, out: Tensor) -> None:
    """dlow_rank.T @ hidden, chunk by chunk in fp32; padding rows of both are zero."""
    call, first = sweep.call, sweep.tokens.first_token
    slab = Slab(0, call.lora_rank)
    for part, rows in gathered(call, sweep.tokens):
        at = part.first_token - first
        ends = (part.first_token == 0, part.first_token + part.capacity >= call.num_rows)
        chunk = sweep.dlow_rank[at : at + part.capacity]
        _dweight(sweep, part, chunk, rows, slab, out, sweep.lora_a_sums, ends=ends, kind="dlora_a")
        if ends[1]:
            break
