"""The products of the listed pairs' dz: dz @ weight, added to the tiles' tokens; dz.T @ hidden per block."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import BLOCK, VARYING, TokenList, dot, hidden_offset, load_rows, rounded
from .launch import launch
from .lists import Lists, pairs_of, round_of, row_pitch
from .sweep import Sweep


@triton.jit
def _weight_part(weight, row, c, V, H, weight_stride, ROWS: tl.constexpr):
    """[ROWS, columns c] of the head from `row` on."""
    r = row + tl.arange(0, ROWS)
    inside = (r < V)[:, None] & (c < H)[None, :]
    return tl.load(weight + r.to(tl.int64)[:, None] * weight_stride + c[None, :], mask=inside, other=0.0)


@triton.jit
def _times_ratio(product, ratio, slot, exists):
    if ratio is not None:
        scale = tl.load(ratio + slot, mask=exists, other=0.0)[:, None]
        product = tl.where(scale == 0, 0.0, product * scale)
    return product


@triton.jit(do_not_specialize=VARYING)
def routed_dhidden_kernel(
    dz,  # of routed_dz_kernel, as the ratio
    ratio,
    weight,  # [V, H], or lora_b
    lists,
    out,  # [capacity, H] fp32
    round,
    first_block,
    V,
    H,
    weight_stride,
    out_stride,
    TILE: tl.constexpr,
    form,
):
    """Persistent over the round's tiles [TILE pairs, BN of H]: adds dz @ weight to rows of `out` by atomics, as
    other blocks' programs do."""
    if tl.load(lists.is_routed) == 0:
        return
    begin, end = round_of(lists, round)
    tiles_n = tl.cdiv(H, form.BN)
    for work in tl.range(begin * tiles_n + tl.program_id(0), end * tiles_n, tl.num_programs(0)):
        index, part = work // tiles_n, work % tiles_n
        local, exists, slot, t = pairs_of(lists, index, begin, TILE)
        slot = slot.to(tl.int64)
        c = part * form.BN + tl.arange(0, form.BN)
        product = tl.zeros((TILE, form.BN), tl.float32)
        for k in range(0, BLOCK, form.BK):
            a = tl.load(dz + slot[:, None] * BLOCK + (k + tl.arange(0, form.BK))[None, :])
            b = _weight_part(weight, (first_block + local) * BLOCK + k, c, V, H, weight_stride, form.BK)
            product = dot(a, b, product, form.COMPUTE)
        product = _times_ratio(product, ratio, slot, exists)
        target = out + t.to(tl.int64)[:, None] * out_stride + c[None, :]
        tl.atomic_add(target, product, mask=exists[:, None] & (c < H)[None, :], sem="relaxed")


@triton.jit(do_not_specialize=VARYING)
def ordered_dhidden_kernel(
    dz,  # of routed_dz_kernel, as the ratio
    ratio,
    weight,  # [V, H], or lora_b
    lists,
    out,  # [capacity, H] fp32, added to
    round,
    first_block,
    num_blocks,
    V,
    H,
    weight_stride,
    out_stride,
    token_tiles,  # rows of lists.running, and how many of them a program has
    group_tiles,
    TILE: tl.constexpr,
    form,
):
    """Repeatable: a program has BN columns of `out` and a group of tokens to itself, and adds one block after the
    other, BM pairs at a time. A block's list is in the order of the tokens: a group's pairs are neighbours in it."""
    if tl.load(lists.is_routed) == 0:
        return
    first, last = tl.load(lists.round_block + round), tl.load(lists.round_block + round + 1)
    base = tl.load(lists.first_tile + first)
    row = tl.program_id(1) * group_tiles
    last_row = tl.minimum(row + group_tiles, token_tiles) - 1
    c = tl.program_id(0) * form.BN + tl.arange(0, form.BN)
    for local in range(first, last):
        start = tl.load(lists.first_tile + local)
        begin = tl.load(lists.running + (row - 1) * row_pitch(num_blocks) + local, mask=row > 0, other=0)
        end = tl.load(lists.running + last_row * row_pitch(num_blocks) + local)
        if begin < end:
            b = _weight_part(weight, (first_block + local) * BLOCK, c, V, H, weight_stride, BLOCK)
            for at in range(begin, end, form.BM):
                position = at + tl.arange(0, form.BM)
                exists = position < end
                t = tl.load(lists.tokens + (start - base) * TILE + position, mask=exists, other=0)
                slot = ((start - base) * TILE + position).to(tl.int64)
                a = tl.load(dz + slot[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :], mask=exists[:, None], other=0.0)
                product = dot(a, b, tl.zeros((form.BM, form.BN), tl.float32), form.COMPUTE)
                product = _times_ratio(product, ratio, slot, exists)
                target = out + t.to(tl.int64)[:, None] * out_stride + c[None, :]
                inside = exists[:, None] & (c < H)[None, :]
                tl.store(target, tl.load(target, mask=inside, other=0.0) + product, mask=inside)
                tl.debug_barrier()  # the next block may hold the same tokens


def routed_dhidden(
    sweep: Sweep, lists: Lists, blocks: range, round: int, dz: Tensor, ratio, weight: Tensor, out: Tensor
) -> None:
    """Adds dz @ weight to `out`; in the order of the blocks where torch's algorithms are to be deterministic."""
    call, columns, low_rank = sweep.call, weight.shape[1], weight is sweep.call.lora_b
    ordered = torch.are_deterministic_algorithms_enabled()
    kind, compute = ("low_rank", tl.float32) if low_rank else (None, None)
    tile = call.tile("ordered_dhidden" if ordered else "routed_dhidden", columns, kind)
    (form,) = call.form(tile, compute=compute)
    arguments = {
        "dz": dz,
        "ratio": ratio,
        "weight": weight,
        "lists": lists,
        "out": out,
        "round": round,
        "first_block": blocks.start,
        "V": call.vocab_size,
        "H": columns,
        "weight_stride": weight.stride(0),
        "out_stride": out.stride(0),
        "TILE": call.pair_tile,
        "form": form,
    }
    if not ordered:
        launch(routed_dhidden_kernel, call.grid(tile), tile, **arguments)
        return
    token_tiles, num_blocks = lists.running.shape
    parts = triton.cdiv(columns, tile.n)
    group_tiles = triton.cdiv(token_tiles * parts, call.grid(tile)[0])
    grid = (parts, triton.cdiv(token_tiles, group_tiles))
    sizes = {"num_blocks": num_blocks, "token_tiles": token_tiles, "group_tiles": group_tiles}
    launch(ordered_dhidden_kernel, grid, tile, **arguments, **sizes)


@triton.jit(do_not_specialize=VARYING)
def routed_dweight_kernel(
    dz,  # of routed_dz_kernel, as the two that follow
    ratio,
    column_sums,
    hidden,  # or LowRank.product [capacity, pitch], where `tokens` is empty
    tokens,
    lists,
    unscale,
    out,  # [V, H], or None
    out_bias,  # [V], or None: sums of dz over the tokens
    round,
    first_token,
    first_block,
    V,
    H,
    pitch,
    out_stride,
    ADDS: tl.constexpr,  # to what `out` holds
    TILE: tl.constexpr,
    form,
):
    """dz.T @ hidden: a program has BN columns of a block's rows of `out`, and writes them once; blocks without a pair
    get zeros. The programs of the first columns write the bias."""
    if tl.load(lists.is_routed) == 0:
        return
    local = tl.load(lists.round_block + round) + tl.program_id(1)
    if local >= tl.load(lists.round_block + round + 1):
        return
    base = tl.load(lists.first_tile + tl.load(lists.round_block + round))
    start = tl.load(lists.first_tile + local)
    length = tl.load(lists.lengths + local)
    c = tl.program_id(0) * form.BN + tl.arange(0, form.BN)
    acc = tl.zeros((BLOCK, form.BN), tl.float32)
    for k in range(0, length, form.BK):
        position = k + tl.arange(0, form.BK)
        exists = position < length
        t = tl.load(lists.tokens + (start - base) * TILE + position, mask=exists, other=0)
        slot = ((start - base) * TILE + position).to(tl.int64)
        a = tl.load(dz + slot[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :], mask=exists[:, None], other=0.0)
        if ratio is not None:
            scale = tl.load(ratio + slot, mask=exists, other=0.0)[:, None]
            a = rounded(tl.where(scale == 0, 0.0, a.to(tl.float32) * scale), a.dtype)
        if tokens.offsets is not None:
            offsets = hidden_offset(tokens, first_token + t, exists)
        else:
            offsets = t.to(tl.int64) * pitch
        b = load_rows(hidden, offsets, exists, tl.program_id(0) * form.BN, H, form.BN)
        acc = dot(a.T, b, acc, form.COMPUTE)
    if unscale is not None:
        acc *= tl.load(unscale)
    r = (first_block + local) * BLOCK + tl.arange(0, BLOCK)
    if out is not None:
        target = out + r.to(tl.int64)[:, None] * out_stride + c[None, :]
        inside = (r < V)[:, None] & (c < H)[None, :]
        if ADDS:
            acc += tl.load(target, mask=inside, other=0.0).to(tl.float32)
        tl.store(target, rounded(acc, out.dtype.element_ty), mask=inside)
    if out_bias is not None:
        if tl.program_id(0) == 0:
            total = tl.zeros((BLOCK,), tl.float32)
            for index in range(start - base, start - base + tl.cdiv(length, TILE)):
                total += tl.load(column_sums + index * BLOCK + tl.arange(0, BLOCK))
            if unscale is not None:
                total *= tl.load(unscale)
            tl.store(out_bias + r, rounded(total, out_bias.dtype.element_ty), mask=r < V)


def routed_dweight(
    sweep: Sweep, lists: Lists, blocks: range, round: int, dz: Tensor, ratio, column_sums: Tensor | None
) -> None:
    """The round's blocks of the head's gradients."""
    call = sweep.call

    def product(
        hidden,
        tokens,
        out: Tensor | None,
        columns: int,
        *,
        kind=None,
        compute=None,
        column_sums=None,
        out_bias=None,
        adds: bool = False,
    ):
        tile = call.tile("routed_dweight", columns, kind)
        (form,) = call.form(tile, compute=compute)
        launch(
            routed_dweight_kernel,
            (triton.cdiv(columns, tile.n), len(blocks)),
            tile,
            dz=dz,
            ratio=ratio,
            column_sums=column_sums,
            hidden=hidden,
            tokens=tokens,
            lists=lists,
            unscale=sweep.unscale,
            out=out,
            out_bias=out_bias,
            round=round,
            first_token=sweep.tokens.first_token,
            first_block=blocks.start,
            V=call.vocab_size,
            H=columns,
            pitch=call.low_rank_pitch,
            out_stride=0 if out is None else out.stride(0),
            ADDS=adds,
            TILE=call.pair_tile,
            form=form,
        )

    if sweep.dweight is not None or sweep.dbias is not None:
        product(
            call.hidden,
            sweep.tokens.tokens,
            sweep.dweight,
            call.hidden_size,
            column_sums=column_sums,
            out_bias=sweep.dbias,
            adds=sweep.adds.value,
            kind="narrow" if sweep.adds.value and call.kind == "half" else None,
        )
    if sweep.dlora_b is not None:
        product(sweep.low_rank.product, TokenList(), sweep.dlora_b, call.lora_rank, kind="low_rank", compute=tl.float32)
