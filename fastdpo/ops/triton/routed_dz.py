"""dz of the listed pairs: work tiles of one block of the vocabulary and the tokens that keep it, gathered."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ...head import Routing
from ...routing import set_bytes
from ..problem import Forward
from .common import (
    BLOCK,
    VARYING,
    dot,
    exp,
    hidden_offset,
    is_plain,
    load_rows,
    load_tile,
    log_probs,
    rounded,
    row_terms,
    rows_in_blocks,
    start_products,
    times_slope,
)
from .launch import launch
from .lists import Kept, Lists, pairs_of, round_of
from .route import pair_weight, second_pair_weight
from .sweep import Sweep


class Sets(NamedTuple):
    """The kept pairs that a sweep lists, and the second set of pairs inside them that one gradient takes."""

    listed: Kept
    inside: Tensor | None  # [M, bytes] uint8
    tau: float
    second_tau: float  # 0 where there is one set
    second: bool  # the second set is listed: nothing else is wanted
    ratio_hidden: bool  # dhidden takes the set inside
    ratio_weight: bool

    @staticmethod
    def of(sweep: Sweep, saved: Forward, routing: Routing) -> Sets:
        hidden, head = bool(sweep.by_token), sweep.of_head
        smaller_hidden, smaller_weight = hidden and routing.hidden_set == 1, head and routing.weight_set == 1
        one, smaller, both = set_bytes(sweep.call.num_blocks), smaller_hidden or smaller_weight, hidden and head
        first, second = saved.bitmap[:, :one], saved.bitmap[:, one:]
        kept = Kept(second if smaller and not both else first, first.stride(0), saved.most_pairs, sweep.coef)
        return Sets(
            kept,
            second if smaller and both else None,
            routing.tau,
            routing.second_tau or 0.0,  # a number always: None would be another form
            smaller and not both,
            smaller_hidden and both,
            smaller_weight and both,
        )


@triton.jit
def weights(share, own, tau, second_tau, SECOND: tl.constexpr):
    """1 / q of the listed set."""
    w = pair_weight(share, own, tau)
    if SECOND:
        w *= second_pair_weight(share, own, tau, second_tau)
    return w


@triton.jit
def store_pairs(tile_dz, share, own, row, exists, block, slot, tile, second_bits, dz, ratio, column_sums, bitmap_stride,
                tau, second_tau, RATIO_WEIGHT: tl.constexpr):  # fmt: skip
    """A tile's weighted dz, and what else is wanted of it, into its slots."""
    slot = slot.to(tl.int64)
    target = dz + slot[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(target, rounded(tile_dz, dz.dtype.element_ty))  # padding rows are zero
    if ratio is not None:
        byte = tl.load(second_bits + row * bitmap_stride + block // 8, mask=exists, other=0).to(tl.int32)
        listed = (byte >> (block % 8)) & 1
        second = tl.where(listed != 0, second_pair_weight(share, own, tau, second_tau), 0.0)
        tl.store(ratio + slot, second)
    if column_sums is not None:
        if RATIO_WEIGHT:
            tile_dz = tl.where((second == 0)[:, None], 0.0, tile_dz * second[:, None])
        tl.store(column_sums + tile * BLOCK + tl.arange(0, BLOCK), tl.sum(tile_dz, 0))


@triton.jit(do_not_specialize=VARYING)
def routed_dz_kernel(
    hidden,
    weight,  # TMA descriptor or pointer
    head,  # Columns
    low_rank,  # LowRank of the tokens from first_token
    transform,
    tokens,
    terms,  # RowTerms
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
    BRANCH: tl.constexpr,  # a way without masks for tiles that need none
    RATIO_WEIGHT: tl.constexpr,  # `ratio` is dweight's and dbias's, not dhidden's
    form,
):
    """Persistent over the round's tiles [BM pairs, 128 columns], whose slots of the results are a program's own."""
    if tl.load(lists.is_routed) == 0:
        return
    begin, end = round_of(lists, round)
    for index in tl.range(begin + tl.program_id(0), end, tl.num_programs(0)):
        local, exists, slot, t = pairs_of(lists, index, begin, form.BM)
        token = first_token + t
        row = tl.load(tokens.rows + token, mask=exists, other=0).to(tl.int64)
        label = tl.load(tokens.labels + token, mask=exists, other=-1)
        offsets = hidden_offset(tokens, token, exists)
        block = first_block + local
        acc = start_products(head, low_rank, t, exists, block * BLOCK, form.COMPUTE, form.BM, BLOCK)
        for k in range(0, head.H, form.BK):
            a = load_rows(hidden, offsets, exists, k, head.H, form.BK)
            b = load_tile(weight, block * BLOCK, k, head.V, head.H, head.weight_stride, BLOCK, form.BK, form.TMA)
            acc = dot(a, b.T, acc, form.COMPUTE)
        of_row = row_terms(row, exists, terms, transform, dz_scale)
        log_p, x = log_probs(acc, transform, of_row.lse)
        p = exp(log_p)
        column = block * BLOCK + tl.arange(0, BLOCK)
        plain: tl.constexpr = False
        if BRANCH:
            plain = is_plain(rows_in_blocks(label, False, block * BLOCK, 1), 0, block * BLOCK, head.V)
        if not plain:
            p = tl.where((column < head.V)[None, :] & (column[None, :] != label[:, None]), p, 0.0)
        share = tl.sum(p, 1) / of_row.others  # where that is 0 so is dz
        own = (label >= block * BLOCK) & (label < (block + 1) * BLOCK)
        w = weights(share, own, tau, second_tau, SECOND)
        tile_dz = p * (of_row.of_p * w)[:, None]
        if not plain:
            tile_dz = tl.where(column[None, :] == label[:, None], (of_row.label * w)[:, None], tile_dz)
        store_pairs(times_slope(tile_dz, x, transform), share, own, row, exists, block, slot, index - begin,
                    second_bits, dz, ratio, column_sums, bitmap_stride, tau, second_tau, RATIO_WEIGHT)  # fmt: skip


def routed_dz(
    sweep: Sweep, sets: Sets, lists: Lists, blocks: range, round: int, dz: Tensor, ratio: Tensor | None, column_sums
) -> None:
    """The round's pairs -> dz, and ratio and column_sums where wanted."""
    call = sweep.call
    # beside a softcap's slope that way takes registers which only Hopper's and Blackwell's products leave
    branch = call.transform.softcap is None or call.target.tiles in (90, 100)
    launch_dz(routed_dz_kernel, sweep, sets, lists, blocks, round, dz, ratio, column_sums, BRANCH=branch)


def launch_dz(
    kernel, sweep: Sweep, sets: Sets, lists: Lists, blocks: range, round: int, dz, ratio, column_sums, **more
):
    """`kernel` on the round's pairs; `more`: its arguments beside those of routed_dz_kernel."""
    call = sweep.call
    tile = call.tile("routed_dz")
    form, weight = call.form(tile, (call.weight, BLOCK.value, tile.k))
    launch(
        kernel,
        call.grid(tile),
        tile,
        hidden=call.hidden,
        weight=weight,
        head=call.columns,
        low_rank=sweep.low_rank,
        transform=call.transform,
        tokens=sweep.tokens.tokens,
        terms=sweep.terms,
        lists=lists,
        dz_scale=sweep.dz_scale,
        second_bits=sets.inside,
        dz=dz,
        ratio=ratio,
        column_sums=column_sums,
        round=round,
        first_token=sweep.tokens.first_token,
        first_block=blocks.start,
        bitmap_stride=sets.listed.stride,
        tau=sets.tau,
        second_tau=sets.second_tau,
        SECOND=sets.second,
        RATIO_WEIGHT=sets.ratio_weight,
        form=form,
        **more,
    )
