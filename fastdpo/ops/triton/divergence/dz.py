"""dz of two heads: a tile of both heads' products, side by side in registers -> dz of the student's logits, for the
exact backward, and for the routed one weighted by the share that is found from the tile."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..common import (
    BLOCK,
    VARYING,
    Columns,
    TokenList,
    Transform,
    columns_of,
    dot,
    exp,
    hidden_offset,
    load_rows,
    load_tile,
    log_probs,
    rounded,
    start_products,
    tile_of,
    times_slope,
)
from ..lists import pairs_of, round_of
from ..routed_dz import Sets, launch_dz, store_pairs, weights
from ..sweep import Sweep
from .log_ratio import Kind, at_least, bound_of, dz_of_pair, pair_rows, share_of

NOTHING = {
    "ref_hidden": None,
    "ref_weight": None,
    "ref_head": Columns(None, 0, 0, 0),
    "ref_transform": Transform(0.0, None, 0.0),
    "ref_tokens": TokenList(),
    "kind": Kind(tl.constexpr(""), 0.0, 0.0),
    "ref_form": None,
}


def teacher_arguments(sweep: Sweep, tile, columns: int) -> dict:
    """What a kernel takes of a sweep's teacher for tiles of dz of so many columns."""
    call, teacher = sweep.call, sweep.call.teacher
    if teacher is None:
        return NOTHING
    form, weight = teacher.form(tile, (teacher.weight, columns, tile.k))
    return {
        "ref_hidden": teacher.hidden,
        "ref_weight": weight,
        "ref_head": teacher.columns,
        "ref_transform": teacher.transform,
        "ref_tokens": sweep.ref_tokens,
        "kind": Kind.of(call.heads),
        "ref_form": form,
    }


@triton.jit
def _products(hidden, weight, head, H, tokens, token, exists, column, acc, COLUMNS: tl.constexpr, form):
    """`acc` and the products of gathered tokens with columns of a head."""
    offsets = hidden_offset(tokens, token, exists)
    for k in tl.range(0, H, form.BK, num_stages=form.STAGES):
        a = load_rows(hidden, offsets, exists, k, H, form.BK)
        b = load_tile(weight, column, k, head.V, H, head.weight_stride, COLUMNS, form.BK, form.TMA)
        acc = dot(a, b.T, acc, form.COMPUTE)
    return acc


@triton.jit
def _start(head, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """start_products of a head without a low-rank part."""
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    if head.bias is not None:
        c = column + tl.arange(0, COLUMNS)
        acc += tl.load(head.bias + c, mask=c < head.V, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def pair_dz_tile(at, step, hidden, weight, head, H, low_rank, transform, ref_hidden, ref_weight, ref_head,
                 ref_transform, kind, tokens, ref_tokens, terms, scales, work, first_token, dz_stride, form,
                 ref_form):  # fmt: skip
    """exact_tiles.dz_tile of two heads."""
    tl.static_assert(form.BN % BLOCK == 0)
    tiles_m = tl.cdiv(step.num_tokens, form.BM)
    m, v = tile_of(at, tiles_m, tl.cdiv(step.last_column - step.first_column, form.BN), form.GROUP)
    i = m * form.BM + tl.arange(0, form.BM)
    exists = i < step.num_tokens
    t = step.first_token + i
    token = first_token + t
    column = step.first_column + v * form.BN
    ref_acc = _products(ref_hidden, ref_weight, ref_head, ref_head.H, ref_tokens, token, exists, column,
                        _start(ref_head, column, form.BM, form.BN), form.BN, ref_form)  # fmt: skip
    acc = start_products(head, low_rank, t, exists, column, form.COMPUTE, form.BM, form.BN)
    acc = _products(hidden, weight, head, H, tokens, token, exists, column, acc, form.BN, form)
    row = tl.load(tokens.rows + token, mask=exists, other=0).to(tl.int64)
    label = tl.load(tokens.labels + token, mask=exists, other=-1)
    of_row = pair_rows(row, exists, terms, kind, transform, scales.dz)
    target = work.dz + (m * form.BM).to(tl.int64) * dz_stride
    parts, ref_parts = columns_of(acc), columns_of(ref_acc)
    for j in tl.static_range(form.BN // BLOCK):
        c = v * form.BN + j * BLOCK + tl.arange(0, BLOCK)
        log_p, x = log_probs(parts[j], transform, of_row.lse)
        log_r, _ = log_probs(ref_parts[j], ref_transform, of_row.ref_lse)
        part = dz_of_pair(log_p, log_r, exp(log_p), of_row, kind, terms.coef_entropy is not None)
        part = tl.where((step.first_column + c)[None, :] == label[:, None], of_row.label[:, None], part)
        part = times_slope(part, x, transform)
        part = tl.where(of_row.active[:, None] & (step.first_column + c < head.V)[None, :], part, 0.0)
        where = tl.arange(0, form.BM)[:, None] * dz_stride + c[None, :]  # 32 bits
        tl.store(target + where, rounded(part, work.dz.dtype.element_ty), mask=(c < dz_stride)[None, :])
        if work.column_sums is not None:
            tl.store(work.column_sums + m * dz_stride + c, tl.sum(part, 0), mask=c < dz_stride)


@triton.jit(do_not_specialize=VARYING)
def divergence_routed_dz_kernel(
    hidden,
    weight,  # TMA descriptor or pointer
    head,  # Columns
    low_rank,  # LowRank of the tokens from first_token
    transform,
    ref_hidden,  # the teacher's, as the next four
    ref_weight,
    ref_head,
    ref_transform,
    ref_tokens,
    kind,
    tokens,
    terms,  # PairTerms
    lists,
    dz_scale,
    second_bits,  # [M, bitmap_stride] of the smaller set or None
    dz,  # [tiles in memory * BM, 128], weighted for the listed set
    ratio,  # [tiles in memory * BM] fp32 or None: what turns that into the smaller set's
    column_sums,  # [tiles in memory, 128] fp32 or None: dz summed over a tile's tokens before it is rounded
    round,
    first_token,
    first_block,
    bitmap_stride,
    tau,
    second_tau,
    SECOND: tl.constexpr,  # the smaller set is listed
    RATIO_WEIGHT: tl.constexpr,  # `ratio` is dweight's and dbias's, not dhidden's
    form,
    ref_form,
):
    """routed_dz_kernel of two heads."""
    if tl.load(lists.is_routed) == 0:
        return
    begin, end = round_of(lists, round)
    for index in tl.range(begin + tl.program_id(0), end, tl.num_programs(0)):
        local, exists, slot, t = pairs_of(lists, index, begin, form.BM)
        token = first_token + t
        row = tl.load(tokens.rows + token, mask=exists, other=0).to(tl.int64)
        label = tl.load(tokens.labels + token, mask=exists, other=-1)
        block = first_block + local
        ref_acc = _products(ref_hidden, ref_weight, ref_head, ref_head.H, ref_tokens, token, exists, block * BLOCK,
                            _start(ref_head, block * BLOCK, form.BM, BLOCK), BLOCK, ref_form)  # fmt: skip
        acc = start_products(head, low_rank, t, exists, block * BLOCK, form.COMPUTE, form.BM, BLOCK)
        acc = _products(hidden, weight, head, head.H, tokens, token, exists, block * BLOCK, acc, BLOCK, form)
        of_row = pair_rows(row, exists, terms, kind, transform, dz_scale)
        log_p, x = log_probs(acc, transform, of_row.lse)
        log_r, _ = log_probs(ref_acc, ref_transform, of_row.ref_lse)
        column = block * BLOCK + tl.arange(0, BLOCK)
        is_label = column[None, :] == label[:, None]
        counts = (column < head.V)[None, :] & ~is_label
        p, r = tl.where(counts, exp(log_p), 0.0), tl.where(counts, exp(log_r), 0.0)
        share = share_of(bound_of(p, r, log_p - log_r, of_row.mean, kind), of_row.total)
        if terms.routes_logps:
            share = at_least(share, tl.sum(p, 1) / of_row.others)
        own = (label >= block * BLOCK) & (label < (block + 1) * BLOCK)
        w = weights(share, own, tau, second_tau, SECOND)
        tile_dz = dz_of_pair(log_p, log_r, p, of_row, kind, False)
        tile_dz = tl.where(counts & of_row.active[:, None], tile_dz * w[:, None], 0.0)
        tile_dz = tl.where(is_label, (of_row.label * w)[:, None], tile_dz)
        store_pairs(times_slope(tile_dz, x, transform), share, own, row, exists, block, slot, index - begin,
                    second_bits, dz, ratio, column_sums, bitmap_stride, tau, second_tau, RATIO_WEIGHT)  # fmt: skip


def routed_dz(
    sweep: Sweep, sets: Sets, lists, blocks: range, round: int, dz: Tensor, ratio: Tensor | None, column_sums
) -> None:
    """The round's pairs -> dz, and ratio and column_sums where wanted."""
    teacher = teacher_arguments(sweep, sweep.call.tile("routed_dz"), BLOCK.value)
    launch_dz(divergence_routed_dz_kernel, sweep, sets, lists, blocks, round, dz, ratio, column_sums, **teacher)
