"""The fold for Hopper: a warp copies, two warpgroups multiply, and each folds its logits while the other multiplies.

Tiles of 128 tokens x 256 columns, a warpgroup to 64 tokens, go step by step of H through a ring of stages in shared
memory, which turns on from tile to tile. A stage is `full` when its boxes have arrived, `empty` when both have read it.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.extra import libdevice
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .common import BLOCK, LOG2E, VARYING, LowRank, TokenRange, columns_of, num_tokens, tile_of
from .launch import Tile, launch
from .stats import BlockSums

load_box = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # its name before Triton 3.7

# By k and stages, 192 or 216 KiB of operands. Short steps let one warpgroup be further ahead of the other, long ones
# wait less often: which is faster is to be measured.
FORMS = {
    "64x4": Tile(128, 256, 64, warps=4, stages=4),
    "32x8": Tile(128, 256, 32, warps=4, stages=8),
    "32x9": Tile(128, 256, 32, warps=4, stages=9),
}
# An accumulator takes 128 registers of a thread; what the copying warps leave is 232.
REGISTERS, COPY_REGISTERS = gl.constexpr(232), gl.constexpr(40)


class Ring(NamedTuple):
    tokens: tl.tensor  # [2 STAGES, BM / 2, BK]
    columns: tl.tensor  # [STAGES, BN, BK]
    full: tl.tensor  # [STAGES, 1] barriers
    empty: tl.tensor


class Tiles(NamedTuple):
    """Of one call: how many, and what each goes along."""

    across_tokens: tl.tensor
    across_columns: tl.tensor
    H: tl.tensor


@gluon.jit
def copy_tiles(hidden, weight, ring, tiles, GROUP: gl.constexpr):
    """The warp that copies."""
    STAGES: gl.constexpr = ring.full.shape[0]
    HALF: gl.constexpr = ring.tokens.shape[1]
    BN: gl.constexpr = ring.columns.shape[1]
    BK: gl.constexpr = ring.columns.shape[2]
    step = 0
    for index in range(gl.program_id(0), tiles.across_tokens * tiles.across_columns, gl.num_programs(0)):
        m, v = tile_of(index, tiles.across_tokens, tiles.across_columns, GROUP)
        for k in range(0, tiles.H, BK):
            stage, turn = step % STAGES, step // STAGES
            mbarrier.wait(ring.empty.index(stage), (turn & 1) ^ 1)  # at once in the first turn
            full = ring.full.index(stage)
            mbarrier.expect(full, 2 * hidden.block_type.nbytes + weight.block_type.nbytes)
            load_box(hidden, [m * 2 * HALF, k], full, ring.tokens.index(2 * stage))
            load_box(hidden, [m * 2 * HALF + HALF, k], full, ring.tokens.index(2 * stage + 1))
            load_box(weight, [v * BN, k], full, ring.columns.index(stage))
            step += 1


@gluon.jit
def fold_tiles(
    half: gl.constexpr,  # of every tile's tokens
    ring,
    tiles,
    labels,
    label_logit,
    lse,
    scale,
    n,
    vocab_size,
    num_blocks,
    GROUP: gl.constexpr,
):
    """A warpgroup."""
    STAGES: gl.constexpr = ring.full.shape[0]
    HALF: gl.constexpr = ring.tokens.shape[1]
    BN: gl.constexpr = ring.columns.shape[1]
    BK: gl.constexpr = ring.columns.shape[2]
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], instr_shape=[16, BN, 16])
    step = 0
    for index in range(gl.program_id(0), tiles.across_tokens * tiles.across_columns, gl.num_programs(0)):
        m, v = tile_of(index, tiles.across_tokens, tiles.across_columns, GROUP)
        acc = gl.zeros([HALF, BN], gl.float32, LAYOUT)
        for k in range(0, tiles.H, BK):
            stage, turn = step % STAGES, step // STAGES
            mbarrier.wait(ring.full.index(stage), turn & 1)
            a, b = ring.tokens.index(2 * stage + half), ring.columns.index(stage).permute((1, 0))
            acc = warpgroup_mma(a, b, acc, is_async=True)
            # This product runs on while the one before, which is done, gives its stage back.
            acc = warpgroup_mma_wait(num_outstanding=1, deps=(acc,))
            mbarrier.arrive(ring.empty.index((step + STAGES - 1) % STAGES), count=1, pred=k > 0)
            step += 1
        i = (2 * m + half) * HALF + gl.arange(0, HALF, gl.SliceLayout(1, LAYOUT))
        label = gl.load(labels + i, mask=i < n, other=-1)  # while the last product runs
        acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
        mbarrier.arrive(ring.empty.index((step + STAGES - 1) % STAGES), count=1)
        store_tile_sums(acc, i, n, label, label_logit, lse, scale, v * BN, vocab_size, num_blocks)


@gluon.jit
def store_tile_sums(acc, i, n, label, label_logit, lse, scale, first_column, vocab_size, num_blocks):
    """What stats.store_block makes of a tile's blocks. Most hold no label of these rows and not the vocabulary's edge:
    only the others are masked."""
    BLOCKS: gl.constexpr = acc.shape[1] // BLOCK
    here = (label >= first_column) & (label < gl.minimum(first_column + BLOCKS * BLOCK, vocab_size))
    bits = gl.where(here, 1 << (gl.maximum(label - first_column, 0) // BLOCK), 0)
    with_label = gl.reduce_or(bits, 0)
    blocks = columns_of(acc)
    LAYOUT: gl.constexpr = gl.SliceLayout(1, blocks[0].type.layout)
    i, label, here = gl.convert_layout(i, LAYOUT), gl.convert_layout(label, LAYOUT), gl.convert_layout(here, LAYOUT)
    for j in gl.static_range(BLOCKS):
        x, block = blocks[j], first_column // BLOCK + j
        if ((with_label >> j) & 1 != 0) | ((block + 1) * BLOCK > vocab_size):
            column = block * BLOCK + gl.arange(0, BLOCK, gl.SliceLayout(0, x.type.layout))
            is_label = column[None, :] == label[:, None]
            own = gl.sum(gl.where(is_label, x, 0.0), 1) * scale
            gl.store(label_logit + i, own, mask=here & (label // BLOCK == block))
            x = gl.where(is_label | (column >= vocab_size)[None, :], float("-inf"), x)
        gl.store(lse + i * num_blocks + block, log_sum_exp(x, scale), mask=(i < n) & (block < num_blocks))


@gluon.jit
def log_sum_exp(x, scale):
    """Of x * scale, by rows; scale > 0. What `shift` was rounded by is in every exponent, and taken out again."""
    s2 = scale * LOG2E
    top = gl.max(x, 1)
    largest = gl.maximum(top, -1e30)  # -inf - -inf would be NaN
    shift = largest * s2
    shift = gl.fma(gl.abs(shift), 2.0**-23, shift)  # no exponent is above 0, however large the logits
    s = gl.sum(gl.exp2(gl.fma(x, s2, -shift[:, None])), 1)
    rest = (libdevice.fast_log2f(s) - gl.fma(largest, s2, -shift)) * (1 / LOG2E)
    # where every exponent is too far below 0, the largest logit is all that fp32 can tell
    return top * scale + gl.where(s == 0, 0.0, rest)


@gluon.jit(do_not_specialize=(*VARYING, "H"))
def hopper_fold_kernel(
    hidden,  # [capacity, pitch] gathered, boxes of [BM / 2, BK]
    weight,  # [V, H], boxes of [BN, BK]
    tokens,
    label_logit,  # [capacity]
    lse,  # [capacity, num_blocks]: of BlockSums
    scale,  # of a product to its logit
    first_token,
    capacity,
    vocab_size,
    num_blocks,
    H,
    COMPUTE: gl.constexpr,
    BM: gl.constexpr,
    BN: gl.constexpr,
    BK: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
):
    """A program has tiles [BM, BN] as one of fold_kernel has, and owns and writes the same."""
    ring = Ring(
        gl.allocate_shared_memory(COMPUTE, [2 * STAGES, BM // 2, BK], hidden.layout),
        gl.allocate_shared_memory(COMPUTE, [STAGES, BN, BK], weight.layout),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
    )
    for stage in gl.static_range(STAGES):
        mbarrier.init(ring.full.index(stage), count=1)
        mbarrier.init(ring.empty.index(stage), count=2)
    fence_async_shared()  # copies signal the barriers, and they see memory by another way than threads do
    n = num_tokens(tokens, first_token, capacity)
    tiles = Tiles(gl.cdiv(n, BM), gl.cdiv(vocab_size, BN), H)
    labels = tokens.labels + first_token
    gl.warp_specialize(
        [
            (fold_tiles, (0, ring, tiles, labels, label_logit, lse, scale, n, vocab_size, num_blocks, GROUP)),
            (fold_tiles, (1, ring, tiles, labels, label_logit, lse, scale, n, vocab_size, num_blocks, GROUP)),
            (copy_tiles, (hidden, weight, ring, tiles, GROUP)),
        ],
        [4, 1],
        [REGISTERS, COPY_REGISTERS],
    )


def serves(call, low_rank: LowRank, sums: BlockSums) -> bool:
    """Whether this kernel computes what is asked for; the bounds keep its exponents within fp32."""
    plain = call.recomputing_kind in ("half", "short") and call.bias is None and low_rank.product is None
    scale = call.transform.scale * call.transform.inv_temperature
    only_lse = all(one is None for one in sums[1:])
    return call.target.capability == 90 and plain and only_lse and 1e-6 < scale < 1e6


def fold(
    call, tokens: TokenRange, hidden: Tensor, low_rank: LowRank, label_logit: Tensor, sums: BlockSums, form: str
) -> None:
    """As fold.fold, in one of FORMS."""
    tile = FORMS[form]
    boxes = []
    for x, rows in ((hidden, tile.m // 2), (call.weight, tile.n)):
        layout = gl.NVMMASharedLayout.get_default_for([rows, tile.k], call.compute)
        boxes.append(TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, tile.k], layout))
    tiles = triton.cdiv(tokens.capacity, tile.m) * triton.cdiv(call.vocab_size, tile.n)
    launch(
        hopper_fold_kernel,
        (min(call.target.programs, tiles),),
        tile,
        hidden=boxes[0],
        weight=boxes[1],
        label_logit=label_logit,
        lse=sums.lse,
        scale=call.transform.scale * call.transform.inv_temperature,
        vocab_size=call.vocab_size,
        num_blocks=call.num_blocks,
        H=call.hidden_size,
        COMPUTE=call.compute,
        BM=tile.m,
        BN=tile.n,
        BK=tile.k,
        STAGES=tile.stages,
        GROUP=tile.group,
        **tokens._asdict(),
    )
