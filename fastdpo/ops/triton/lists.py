"""The bitmap of kept pairs -> per block of the vocabulary the list of its tokens, in the order of the tokens.

Lists are cut into work tiles of TILE pairs, a block's last tile padded; tiles of all blocks are numbered in vocabulary
order, and rounds of whole blocks bound what of them is in memory at once. All sizes stay on the device.

Whether the lists are used at all hangs on the expected number of pairs, never on the drawn one: the mean over draws
would not be the exact gradient any more.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import VARYING, num_tokens
from .items import finished, take, wait
from .launch import launch
from .sweep import Sweep

TOKENS = tl.constexpr(128)  # of one row of `running`, and of an item that fills lists
BLOCKS = tl.constexpr(32)  # of an item that fills lists
COUNTED = tl.constexpr(8)  # blocks of an item that counts, whose bits are one byte of a row; it has
TILES = tl.constexpr(8)  # rows of `running` at a time
CLEARED = tl.constexpr(4096)  # numbers at a time
ITEMS = 4  # int32 of a list's items: whole 16 bytes, or every second list would be another form of its kernels


class Kept(NamedTuple):
    """The forward's choice of pairs, and which tokens have a gradient."""

    bitmap: Tensor  # [M, bytes] uint8 of one set, a row `stride` bytes after the other
    stride: int
    most_pairs: Tensor  # [M] int32
    coef: Tensor  # [M] fp32


class Lists(NamedTuple):
    """The pairs of a range of tokens by a range of blocks. Sizes are bounds: the true ones are on the device."""

    items: Tensor  # [ITEMS] int32: items taken of the launch that counts, and of those that count done
    running: Tensor  # [ceil(capacity / TOKENS), num_blocks] int32, pairs of a block up to this many tokens, inclusive;
    # rows are row_pitch(num_blocks) apart
    lengths: Tensor  # [num_blocks] int32: the last row of `running`
    most: Tensor  # [1] int64, pairs of all blocks of the vocabulary, whatever the draw
    first_tile: Tensor  # [num_blocks + 1] int32
    round_block: Tensor  # [rounds + 1] int32, first block of each round
    is_routed: Tensor  # [1] int32: few enough pairs live for the routed kernels to pay
    tile_block: Tensor  # [tiles in memory] int32, block of each tile of the round that was filled last
    tokens: (
        Tensor  # [tiles in memory * TILE] int32, token of each of its pairs, from first_token; padding is not written
    )

    @property
    def rounds(self) -> int:
        return len(self.round_block) - 1


class Cleared(NamedTuple):
    """What a routed sweep sets to zero with its first launch."""

    done: Tensor  # int32, of exact.py
    hidden: Tensor | None  # fp32 sums
    low_rank: Tensor | None


@triton.jit
def row_pitch(num_blocks):
    """Of `running`: whole 16 bytes, so that its last row is as aligned as any."""
    return tl.cdiv(num_blocks, 4) * 4


@triton.jit
def round_of(lists, round):
    """[begin, end) of the round's tiles."""
    begin = tl.load(lists.first_tile + tl.load(lists.round_block + round))
    return begin, tl.load(lists.first_tile + tl.load(lists.round_block + round + 1))


@triton.jit
def pairs_of(lists, tile, begin, TILE: tl.constexpr):
    """(block, which pairs exist, their slots in memory, their tokens) of a tile of the round that begins at `begin`."""
    block = tl.load(lists.tile_block + tile - begin)
    position = (tile - tl.load(lists.first_tile + block)) * TILE + tl.arange(0, TILE)
    exists = position < tl.load(lists.lengths + block)
    slot = (tile - begin) * TILE + tl.arange(0, TILE)
    return block, exists, slot, tl.load(lists.tokens + slot, mask=exists, other=0)


@triton.jit
def _rows(kept, tokens, t, first_token, capacity):
    """(rows of tokens `t` of the range, which of them exist and have an upstream gradient)."""
    exists = t < num_tokens(tokens, first_token, capacity)
    row = tl.load(tokens.rows + first_token + t, mask=exists, other=0).to(tl.int64)
    return row, exists & (tl.load(kept.coef + row, mask=exists, other=0.0) != 0)


@triton.jit
def _kept(kept, row, exists, b, first_block, num_blocks):
    """[tokens, blocks] int32: which pairs are kept."""
    inside = exists[:, None] & (b < num_blocks)[None, :]
    bit = first_block + b
    byte = tl.load(kept.bitmap + row[:, None] * kept.stride + (bit // 8)[None, :], mask=inside, other=0).to(tl.int32)
    return (byte >> (bit % 8)[None, :]) & 1


@triton.jit
def _clear(target, size, share, shares):
    """One of `shares` parts of `size` zeros."""
    at = tl.cast(share, tl.int64) * CLEARED
    while at < size:
        i = at + tl.arange(0, CLEARED)
        tl.store(target + i, tl.zeros((CLEARED,), target.dtype.element_ty), mask=i < size)
        at += shares * CLEARED


@triton.jit
def _count(at, kept, tokens, lists, first_token, capacity, first_block, num_blocks):
    """Of COUNTED blocks and all tokens into `running`; the first blocks' also sums up `most`."""
    b = at * COUNTED + tl.arange(0, COUNTED)
    token_tiles = tl.cdiv(capacity, TOKENS)
    length, most = tl.zeros((COUNTED,), tl.int32), tl.zeros((1,), tl.int64)
    for first in range(0, token_tiles, TILES):
        row, exists = _rows(kept, tokens, first * TOKENS + tl.arange(0, TILES * TOKENS), first_token, capacity)
        pairs = _kept(kept, row, exists, b, first_block, num_blocks)
        pairs = tl.sum(tl.reshape(pairs, (TILES, TOKENS, COUNTED)), 1)
        tile = first + tl.arange(0, TILES)
        inside = (tile < token_tiles)[:, None] & (b < num_blocks)[None, :]
        running = lists.running + tile[:, None] * row_pitch(num_blocks) + b[None, :]
        tl.store(running, length[None, :] + tl.cumsum(pairs, 0), mask=inside)
        length += tl.sum(pairs, 0)
        if at == 0:
            most += tl.sum(tl.load(kept.most_pairs + row, mask=exists, other=0).to(tl.int64), 0)
    if at == 0:
        tl.store(lists.most + tl.arange(0, 1), most)


@triton.jit(do_not_specialize=VARYING)
def list_kernel(
    kept,
    tokens,
    lists,
    cleared,
    steps,  # numbers of cleared.done
    H,
    pitch,
    round,
    rounds,
    tiles_per_round,
    crossover,
    first_token,
    capacity,
    first_block,
    num_blocks,
    all_blocks,
    TILE: tl.constexpr,
    B: tl.constexpr,  # all blocks of the lists, at least
):
    """A program has one item. In the first round these are first COUNTED blocks each, whose pairs are counted, while
    `cleared` is cleared; then TOKENS tokens by BLOCKS blocks, whose pairs are written, if the round has any of them, to
    where the pairs of earlier tokens end. The first pair of a tile names the tile's block.

    Every program finds out which blocks make the round, and whether the lists are used; one of them writes it down.
    """
    counting = tl.where(round == 0, tl.cdiv(num_blocks, COUNTED), 0)
    at = tl.program_id(0)
    if counting > 0:
        at = take(lists.items)
        if at < counting:
            _clear(cleared.done, steps, at, counting)
            if cleared.hidden is not None:
                _clear(cleared.hidden, tl.cast(capacity, tl.int64) * H, at, counting)
            if cleared.low_rank is not None:
                _clear(cleared.low_rank, tl.cast(capacity, tl.int64) * pitch, at, counting)
            _count(at, kept, tokens, lists, first_token, capacity, first_block, num_blocks)
            finished(lists.items + 1)
            return
        wait(lists.items + 1, counting)
    at -= counting
    all_b = tl.arange(0, B)
    tiles = tl.cdiv(tl.load(lists.lengths + all_b, mask=all_b < num_blocks, other=0), TILE)
    end = tl.cumsum(tiles, 0)
    begin = tl.where(all_b < num_blocks, end - tiles, 2147483647)
    n = num_tokens(tokens, first_token, capacity)
    routed = (tl.load(lists.most).to(tl.float32) <= crossover * n.to(tl.float32) * all_blocks).to(tl.int32)
    if (round == 0) & (at == 0):
        tl.store(lists.first_tile + all_b, begin, mask=all_b < num_blocks)
        tl.store(lists.first_tile + num_blocks, tl.sum(tiles, 0))
        tl.store(lists.is_routed, routed)
        for r in range(0, rounds):
            tl.store(lists.round_block + r, tl.sum((begin < r * tiles_per_round).to(tl.int32), 0))
        tl.store(lists.round_block + rounds, num_blocks)
    low = tl.sum((begin < round * tiles_per_round).to(tl.int32), 0)
    high = num_blocks
    if round + 1 < rounds:
        high = tl.sum((begin < (round + 1) * tiles_per_round).to(tl.int32), 0)
    groups = tl.cdiv(num_blocks, BLOCKS)
    token_tile, first = at // groups, at % groups * BLOCKS
    if (routed == 0) | (first >= high) | (first + BLOCKS <= low):
        return
    t = token_tile * TOKENS + tl.arange(0, TOKENS)
    b = first + tl.arange(0, BLOCKS)
    row, exists = _rows(kept, tokens, t, first_token, capacity)
    pairs = _kept(kept, row, exists, b, first_block, num_blocks)
    pairs = tl.where(((b >= low) & (b < high))[None, :], pairs, 0)
    own = tl.cdiv(tl.load(lists.lengths + b, mask=b < num_blocks, other=0), TILE)
    before = tl.sum(tl.where(all_b < first, tiles, 0), 0) - tl.sum(tl.where(all_b < low, tiles, 0), 0)
    tile = before + tl.cumsum(own, 0) - own
    mine = tl.sum(pairs, 0)
    start = tl.load(lists.running + token_tile * row_pitch(num_blocks) + b, mask=b < num_blocks, other=0) - mine
    position = start[None, :] + tl.cumsum(pairs, 0) - pairs
    slot = tile[None, :] * TILE + position
    tl.store(lists.tokens + slot, (t[:, None] + b[None, :] * 0), mask=pairs != 0)
    starts = (pairs != 0) & (position % TILE == 0)
    tl.store(lists.tile_block + tile[None, :] + position // TILE, (b[None, :] + t[:, None] * 0), mask=starts)


def empty(sweep: Sweep, blocks: range, crossover: float, items: Tensor) -> Lists:
    """Lists whose pairs are not counted yet; `items` [ITEMS] int32: zeros."""
    capacity, num_blocks, all_blocks = sweep.tokens.capacity, len(blocks), sweep.call.num_blocks
    tile = sweep.call.pair_tile
    max_pairs = min(capacity * num_blocks, int(crossover * capacity * all_blocks))
    rounds = (max_pairs // tile + num_blocks) // _tiles_per_round(sweep) + 1
    tiles = _tiles_per_round(sweep) + triton.cdiv(capacity, tile)  # in memory

    def make(*shape: int, dtype=torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=items.device)

    running = make(triton.cdiv(capacity, TOKENS.value), triton.cdiv(num_blocks, 4) * 4)[:, :num_blocks]
    most = make(1, dtype=torch.int64)
    sizes = (num_blocks + 1, rounds + 1, 1, tiles, tiles * tile)
    return Lists(items, running, running[-1], most, *map(make, sizes))


def _tiles_per_round(sweep: Sweep) -> int:
    return max(1, sweep.routed_pairs // sweep.call.pair_tile)


def fill(sweep: Sweep, kept: Kept, lists: Lists, blocks: range, round: int, crossover: float) -> None:
    """Lists the round's pairs, in place of another's; in the first round they are counted too, and with the first of a
    sweep's lists its sums are cleared."""
    token_tiles, num_blocks = lists.running.shape
    counting = triton.cdiv(num_blocks, COUNTED.value) if round == 0 else 0
    sums = (sweep.dhidden, sweep.dlow_rank) if blocks.start == 0 else (None, None)
    launch(
        list_kernel,
        (counting + token_tiles * triton.cdiv(num_blocks, BLOCKS.value),),
        kept=kept,
        lists=lists,
        cleared=Cleared(sweep.done, *sums),
        steps=len(sweep.done),
        H=sweep.call.hidden_size,
        pitch=sweep.call.low_rank_pitch,
        round=round,
        rounds=lists.rounds,
        tiles_per_round=_tiles_per_round(sweep),
        crossover=crossover,
        first_block=blocks.start,
        num_blocks=num_blocks,
        all_blocks=sweep.call.num_blocks,
        TILE=sweep.call.pair_tile,
        B=max(16, triton.next_power_of_2(len(sweep.part.lists(sweep.call.num_blocks)[0]))),
        **sweep.tokens._asdict(),
    )
