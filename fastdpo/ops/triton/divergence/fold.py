"""Tiles of both heads' logits, side by side in registers -> per block of 128 columns its PairSums."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..common import BLOCK, VARYING, LowRank, TokenRange, columns_of, logit_products, num_tokens, tile_of
from ..launch import launch
from .call import TwoHeads
from .log_ratio import Kind
from .sums import PairSums, store_jsd_block, store_pair_block


@triton.jit(do_not_specialize=VARYING)
def divergence_fold_kernel(
    hidden,  # [capacity, pitch] gathered, and weight [V, H]: TMA descriptors or pointers
    weight,
    head,  # Columns
    low_rank,
    transform,
    ref_hidden,  # the teacher's, of a hidden size of its own
    ref_weight,
    ref_head,
    ref_low_rank,  # of Nones
    ref_transform,
    kind,
    tokens,
    label_logits,  # [2, capacity] of the student, of the teacher: written by the tile that holds the label
    sums,
    lse,  # [M] of the student's logits, and of the teacher's: jsd's second sweep; or None
    ref_lse,
    first_token,
    capacity,
    num_blocks,
    pitch,
    ref_pitch,
    form,
    ref_form,
):
    """A program has tiles [BM tokens, BN columns] of both heads; a tile's blocks of `sums` are its own."""
    tl.static_assert(form.BN % BLOCK == 0)
    BLOCKS: tl.constexpr = form.BN // BLOCK
    n = num_tokens(tokens, first_token, capacity)
    tiles_m, tiles_n = tl.cdiv(n, form.BM), tl.cdiv(head.V, form.BN)
    for index in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        m, v = tile_of(index, tiles_m, tiles_n, form.GROUP)
        i = m * form.BM + tl.arange(0, form.BM)
        exists = i < n
        label = tl.load(tokens.labels + first_token + i, mask=exists, other=-1)
        acc = logit_products(
            hidden, weight, head, low_rank, m * form.BM, exists, v * form.BN, head.H, capacity, pitch, form
        )
        ref_acc = logit_products(ref_hidden, ref_weight, ref_head, ref_low_rank, m * form.BM, exists, v * form.BN,
                                 ref_head.H, capacity, ref_pitch, ref_form)  # fmt: skip
        parts, ref_parts = columns_of(acc), columns_of(ref_acc)
        if lse is not None:
            row = tl.load(tokens.rows + first_token + i, mask=exists, other=0).to(tl.int64)
            z, w = tl.load(lse + row, mask=exists, other=0.0), tl.load(ref_lse + row, mask=exists, other=0.0)
        for j in tl.static_range(BLOCKS):
            if lse is not None:
                store_jsd_block(parts[j], ref_parts[j], transform, ref_transform, kind, v * BLOCKS + j, i, exists,
                                label, z, w, sums, head.V, num_blocks)  # fmt: skip
            else:
                store_pair_block(parts[j], ref_parts[j], transform, ref_transform, v * BLOCKS + j, i, exists,
                                 label, label_logits, sums, head.V, capacity, num_blocks)  # fmt: skip


def fold(
    call: TwoHeads,
    tokens: TokenRange,
    hidden: Tensor,
    ref_hidden: Tensor,
    low_rank: LowRank,
    label_logits: Tensor,
    sums: PairSums,
    lse: Tensor | None = None,
    ref_lse: Tensor | None = None,
) -> None:
    """Gathered hidden of these tokens -> `sums` of every block and label_logits; with `lse` what jsd has of them."""
    teacher, tile = call.teacher, call.fold_tile(jsd=lse is not None, routed=sums.spread is not None)
    tiles = triton.cdiv(tokens.capacity, tile.m) * triton.cdiv(call.vocab_size, tile.n)
    form, a, b = call.form(tile, (hidden, tile.m, tile.k), (call.weight, tile.n, tile.k))
    ref_form, ref_a, ref_b = teacher.form(tile, (ref_hidden, tile.m, tile.k), (teacher.weight, tile.n, tile.k))
    launch(
        divergence_fold_kernel,
        call.grid(tile, most=tiles),
        tile,
        hidden=a,
        weight=b,
        head=call.columns,
        low_rank=low_rank,
        transform=call.transform,
        ref_hidden=ref_a,
        ref_weight=ref_b,
        ref_head=teacher.columns,
        ref_low_rank=LowRank(),
        ref_transform=teacher.transform,
        kind=Kind.of(call.heads),
        label_logits=label_logits,
        sums=sums,
        lse=lse,
        ref_lse=ref_lse,
        num_blocks=call.num_blocks,
        pitch=call.pitch,
        ref_pitch=teacher.pitch,
        form=form,
        ref_form=ref_form,
        **tokens._asdict(),
    )
