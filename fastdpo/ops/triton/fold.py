"""Tiles of logits -> per block of 128 columns what the sums over the vocabulary need."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .common import (
    BLOCK,
    VARYING,
    LowRank,
    TokenRange,
    columns_of,
    is_plain,
    logit_products,
    num_tokens,
    rows_in_blocks,
    tile_of,
)
from .launch import launch
from .special import fold_of
from .stats import BlockSums, store_block


@triton.jit(do_not_specialize=VARYING)
def fold_kernel(
    hidden, weight, head, low_rank, transform, tokens, label_logit, sums, first_token, capacity, num_blocks, pitch, form
):
    """A program has tiles [BM tokens, BN columns], whose logits stay in registers, fp32; a tile's blocks of `sums` are
    its own, and label_logit [capacity] is written by the tile that holds the label. hidden [capacity, pitch] gathered
    and weight [V, H]: TMA descriptors or pointers; head: Columns."""
    tl.static_assert(form.BN % BLOCK == 0)
    BLOCKS: tl.constexpr = form.BN // BLOCK
    n = num_tokens(tokens, first_token, capacity)
    tiles_m, tiles_n = tl.cdiv(n, form.BM), tl.cdiv(head.V, form.BN)
    for index in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        m, v = tile_of(index, tiles_m, tiles_n, form.GROUP)
        i = m * form.BM + tl.arange(0, form.BM)
        # here, as nothing else hides how long it takes
        label = tl.load(tokens.labels + first_token + i, mask=i < n, other=-1)
        acc = logit_products(
            hidden, weight, head, low_rank, m * form.BM, i < n, v * form.BN, head.H, capacity, pitch, form
        )
        rows = rows_in_blocks(label, False, v * form.BN, BLOCKS)
        parts = columns_of(acc)
        for j in tl.static_range(BLOCKS):
            plain = is_plain(rows, j, v * form.BN, head.V)
            store_block(
                parts[j], transform, v * BLOCKS + j, i, i < n, label, plain, label_logit, sums, head.V, num_blocks
            )


def fold(call, tokens: TokenRange, hidden: Tensor, low_rank: LowRank, label_logit: Tensor, sums: BlockSums) -> None:
    """Gathered hidden of these tokens -> `sums` of every block and label_logit [capacity]."""
    fold_of(call, low_rank, sums, plain_fold)(call, tokens, hidden, low_rank, label_logit, sums)


def plain_fold(
    call, tokens: TokenRange, hidden: Tensor, low_rank: LowRank, label_logit: Tensor, sums: BlockSums
) -> None:
    """What every call can go through."""
    tile = call.tile("fold", kind="narrow" if call.kind == "half" and sums.before is not None else None)
    tiles = triton.cdiv(tokens.capacity, tile.m) * triton.cdiv(call.vocab_size, tile.n)
    form, a, b = call.form(tile, (hidden, tile.m, tile.k), (call.weight, tile.n, tile.k))
    launch(
        fold_kernel,
        call.grid(tile, most=tiles),
        tile,
        hidden=a,
        weight=b,
        head=call.columns,
        low_rank=low_rank,
        transform=call.transform,
        label_logit=label_logit,
        sums=sums,
        num_blocks=call.num_blocks,
        pitch=call.pitch,
        form=form,
        **tokens._asdict(),
    )
