"""The bitmap of kept pairs -> per block of the vocabulary the list of its tokens, in the order of the tokens.

Lists are cut into work tiles of TILE pairs, a block's last tile padded; tiles of all blocks are numbered in vocabulary
order, and rounds of whole blocks bound what of them is in memory at once. All sizes stay on the device.

Whether the lists are used at all hangs on the expected number of pairs, never on the drawn one: the mean over draws
would not be the exact gradient any more.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import VARYING, num_tokens
from .launch import launch
from .sweep import Sweep

TOKENS = tl.constexpr(128)  # of one program, and of one row of `running`
BLOCKS = tl.constexpr(32)  # of one program


class Kept(NamedTuple):
    """The forward's choice of pairs, and which tokens have a gradient."""

    bitmap: Tensor  # [M, bytes] uint8 of one set, a row `stride` bytes after the other
    stride: int
    most_pairs: Tensor  # [M] int32
    coef: Tensor  # [M] fp32


class Lists(NamedTuple):
    """The pairs of a range of tokens by a range of blocks. Sizes are bounds: the true ones are on the device."""

    running: Tensor  # [ceil(capacity / TOKENS), num_blocks] int32, pairs of a block up to this many tokens, inclusive
    lengths: Tensor  # [num_blocks] int32
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
    """[TOKENS, BLOCKS] int32: which pairs are kept."""
    inside = exists[:, None] & (b < num_blocks)[None, :]
    bit = first_block + b
    byte = tl.load(kept.bitmap + row[:, None] * kept.stride + (bit // 8)[None, :], mask=inside, other=0).to(tl.int32)
    return (byte >> (bit % 8)[None, :]) & 1


@triton.jit(do_not_specialize=VARYING)
def count_kernel(kept, tokens, counts, most, first_token, capacity, first_block, num_blocks):
    """A program counts the pairs of TOKENS tokens and BLOCKS blocks into `counts` [tiles of TOKENS, num_blocks] int32;
    those of the first blocks write `most` [tiles of TOKENS] int64, pairs of all blocks whatever the draw."""
    t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    b = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    row, exists = _rows(kept, tokens, t, first_token, capacity)
    pairs = tl.sum(_kept(kept, row, exists, b, first_block, num_blocks), 0)
    tl.store(counts + tl.program_id(0) * num_blocks + b, pairs, mask=b < num_blocks)
    if tl.program_id(1) == 0:
        tl.store(most + tl.program_id(0), tl.sum(tl.load(kept.most_pairs + row, mask=exists, other=0).to(tl.int64), 0))


@triton.jit(do_not_specialize=VARYING)
def plan_kernel(
    lists,
    most,  # [token tiles] int64
    tokens,
    first_token,
    capacity,
    num_blocks,
    all_blocks,
    token_tiles,
    rounds,
    tiles_per_round,
    crossover,
    TILE: tl.constexpr,
    B: tl.constexpr,
    T: tl.constexpr,
):
    """One program: every block's tiles, which blocks make a round, and whether the lists are used."""
    b = tl.arange(0, B)
    length = tl.load(lists.running + (token_tiles - 1) * num_blocks + b, mask=b < num_blocks, other=0)
    tl.store(lists.lengths + b, length, mask=b < num_blocks)
    tiles = tl.cdiv(length, TILE)
    end = tl.cumsum(tiles, 0)
    begin = end - tiles
    tl.store(lists.first_tile + b, begin, mask=b < num_blocks)
    tl.store(lists.first_tile + num_blocks, tl.sum(tiles, 0))
    n = num_tokens(tokens, first_token, capacity)
    t = tl.arange(0, T)
    live = tl.sum(tl.load(most + t, mask=t < token_tiles, other=0), 0)
    tl.store(lists.is_routed, (live.to(tl.float32) <= crossover * n.to(tl.float32) * all_blocks).to(tl.int32))
    for r in range(0, rounds):
        tl.store(lists.round_block + r, tl.sum(((begin < r * tiles_per_round) & (b < num_blocks)).to(tl.int32), 0))
    tl.store(lists.round_block + rounds, num_blocks)


@triton.jit(do_not_specialize=VARYING)
def fill_kernel(kept, tokens, lists, round, first_token, capacity, first_block, num_blocks, TILE: tl.constexpr):
    """A program writes the pairs of TOKENS tokens and BLOCKS blocks, if the round has any of these, to where the pairs
    of earlier tokens end. The first pair of a tile names the tile's block."""
    if tl.load(lists.is_routed) == 0:
        return
    low, high = tl.load(lists.round_block + round), tl.load(lists.round_block + round + 1)
    if (tl.program_id(1) * BLOCKS >= high) | (tl.program_id(1) * BLOCKS + BLOCKS <= low):
        return
    t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    b = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    row, exists = _rows(kept, tokens, t, first_token, capacity)
    pairs = _kept(kept, row, exists, b, first_block, num_blocks)
    pairs = tl.where(((b >= low) & (b < high))[None, :], pairs, 0)
    tile = tl.load(lists.first_tile + b, mask=b < num_blocks, other=0) - tl.load(lists.first_tile + low)
    mine = tl.sum(pairs, 0)
    before = tl.load(lists.running + tl.program_id(0) * num_blocks + b, mask=b < num_blocks, other=0) - mine
    position = before[None, :] + tl.cumsum(pairs, 0) - pairs
    slot = tile[None, :] * TILE + position
    tl.store(lists.tokens + slot, (t[:, None] + b[None, :] * 0), mask=pairs != 0)
    starts = (pairs != 0) & (position % TILE == 0)
    tl.store(lists.tile_block + tile[None, :] + position // TILE, (b[None, :] + t[:, None] * 0), mask=starts)


def build(sweep: Sweep, kept: Kept, blocks: range, crossover: float) -> Lists:
    """Lists of no round yet: three launches, and one more to fill every round."""
    capacity, num_blocks, all_blocks = sweep.tokens.capacity, len(blocks), sweep.call.num_blocks
    tile = sweep.call.pair_tile
    max_pairs = min(capacity * num_blocks, int(crossover * capacity * all_blocks))
    tiles_per_round = max(1, sweep.routed_pairs // tile)
    rounds = (max_pairs // tile + num_blocks) // tiles_per_round + 1
    tiles = tiles_per_round + triton.cdiv(capacity, tile)  # in memory
    token_tiles = triton.cdiv(capacity, TOKENS.value)
    shapes = ((token_tiles, num_blocks), num_blocks, num_blocks + 1, rounds + 1, 1, tiles, tiles * tile)
    device = kept.coef.device
    lists = Lists(*map(partial(torch.empty, dtype=torch.int32, device=device), shapes))
    most = torch.empty(token_tiles, dtype=torch.int64, device=device)
    launch(
        count_kernel,
        (token_tiles, triton.cdiv(num_blocks, BLOCKS.value)),
        kept=kept,
        counts=lists.running,
        most=most,
        first_block=blocks.start,
        num_blocks=num_blocks,
        **sweep.tokens._asdict(),
    )
    lists.running.cumsum_(0, dtype=torch.int32)
    launch(
        plan_kernel,
        (1,),
        lists=lists,
        most=most,
        num_blocks=num_blocks,
        all_blocks=all_blocks,
        token_tiles=token_tiles,
        rounds=rounds,
        tiles_per_round=tiles_per_round,
        crossover=crossover,
        TILE=tile,
        B=max(16, triton.next_power_of_2(num_blocks)),
        T=max(16, triton.next_power_of_2(token_tiles)),
        **sweep.tokens._asdict(),
    )
    return lists


def fill(sweep: Sweep, kept: Kept, lists: Lists, blocks: range, round: int) -> None:
    """Lists the round's pairs, in place of another's."""
    token_tiles, num_blocks = lists.running.shape
    launch(
        fill_kernel,
        (token_tiles, triton.cdiv(num_blocks, BLOCKS.value)),
        kept=kept,
        lists=lists,
        round=round,
        first_block=blocks.start,
        num_blocks=num_blocks,
        TILE=sweep.call.pair_tile,
        **sweep.tokens._asdict(),
    )
