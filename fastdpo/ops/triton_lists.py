"""The bitmap of kept pairs -> per block of the vocabulary the list of its tokens, in the order of the tokens.

Lists are cut into work tiles of TILE pairs, a block's last tile padded; tiles of all blocks are numbered in vocabulary
order, and rounds of whole blocks bound what of them is in memory at once. All sizes stay on the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import cuda_lists
from .triton_common import VARYING, num_tokens
from .triton_launch import launch

TOKENS = 128  # of one program, and of one row of `running`: kListTokens in csrc/pair_lists.h
BLOCKS = 32  # of one program


@triton.jit
def _kept(bitmap, coef, rows, count, first_token, capacity, first_block, num_blocks, stride,
          T: tl.constexpr, B: tl.constexpr):  # fmt: skip
    """[T, B] int32: which pairs of this program's tokens and blocks are kept and have an upstream gradient."""
    t = tl.program_id(0) * T + tl.arange(0, T)
    b = tl.program_id(1) * B + tl.arange(0, B)
    exists = t < num_tokens(count, first_token, capacity)
    row = tl.load(rows + first_token + t, mask=exists, other=0).to(tl.int64)
    exists = exists & (tl.load(coef + row, mask=exists, other=0.0) != 0)
    inside = exists[:, None] & (b < num_blocks)[None, :]
    bit = first_block + b
    byte = tl.load(bitmap + row[:, None] * stride + (bit // 8)[None, :], mask=inside, other=0).to(tl.int32)
    return t, b, (byte >> (bit % 8)[None, :]) & 1


@triton.jit(do_not_specialize=VARYING)
def count_kernel(
    bitmap, coef, rows, count,
    counts,  # [tiles of T tokens, num_blocks] int32
    first_token, capacity, first_block, num_blocks, stride,
    T: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    _, b, kept = _kept(bitmap, coef, rows, count, first_token, capacity, first_block, num_blocks, stride, T, B)
    tl.store(counts + tl.program_id(0) * num_blocks + b, tl.sum(kept, 0), mask=b < num_blocks)


@triton.jit(do_not_specialize=VARYING)
def plan_kernel(
    running,  # [token tiles, num_blocks] int32, inclusive sums over token tiles
    count,
    lengths,  # [num_blocks] int32
    first_tile,  # [num_blocks + 1] int32, of each block
    round_block,  # [rounds + 1] int32, first block of each round
    is_routed,  # [1] int32: few enough pairs live for the routed kernels to pay
    first_token, capacity, num_blocks, token_tiles, rounds, tiles_per_round, crossover,
    TILE: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """One program: every block's tiles, and which blocks make a round."""
    b = tl.arange(0, B)
    length = tl.load(running + (token_tiles - 1) * num_blocks + b, mask=b < num_blocks, other=0)
    tl.store(lengths + b, length, mask=b < num_blocks)
    tiles = tl.cdiv(length, TILE)
    end = tl.cumsum(tiles, 0)
    begin = end - tiles
    tl.store(first_tile + b, begin, mask=b < num_blocks)
    tl.store(first_tile + num_blocks, tl.sum(tiles, 0))
    n = num_tokens(count, first_token, capacity)
    live = tl.sum(length.to(tl.float32), 0)
    tl.store(is_routed, (live <= crossover * n.to(tl.float32) * num_blocks).to(tl.int32))
    for r in range(0, rounds):
        tl.store(round_block + r, tl.sum(((begin < r * tiles_per_round) & (b < num_blocks)).to(tl.int32), 0))
    tl.store(round_block + rounds, num_blocks)


@triton.jit(do_not_specialize=VARYING)
def fill_kernel(
    bitmap, coef, rows, count, running, first_tile, is_routed,
    tile_block,  # [max tiles] int32, block of each tile
    tokens,  # [max tiles * TILE] int32, token of each pair, from first_token; padding is not written
    first_token, capacity, first_block, num_blocks, stride,
    TILE: tl.constexpr, T: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    if tl.load(is_routed) == 0:
        return
    t, b, kept = _kept(bitmap, coef, rows, count, first_token, capacity, first_block, num_blocks, stride, T, B)
    tile = tl.load(first_tile + b, mask=b < num_blocks, other=0)
    mine = tl.sum(kept, 0)
    before = tl.load(running + tl.program_id(0) * num_blocks + b, mask=b < num_blocks, other=0) - mine
    rank = before[None, :] + tl.cumsum(kept, 0) - kept
    at = tile[None, :] * TILE + rank
    tl.store(tokens + at, (t[:, None] + b[None, :] * 0), mask=kept != 0)
    starts = (kept != 0) & (rank % TILE == 0)  # the first pair of a tile names the tile's block
    tl.store(tile_block + tile[None, :] + rank // TILE, (b[None, :] + t[:, None] * 0), mask=starts)


@dataclass(frozen=True)
class Lists:
    """The pairs of a range of tokens by a range of blocks. Sizes are bounds: the true ones are on the device."""

    running: Tensor  # [ceil(capacity / TOKENS), num_blocks] int32, pairs of a block up to this many tokens, inclusive
    lengths: Tensor  # [num_blocks] int32
    first_tile: Tensor  # [num_blocks + 1] int32
    tile_block: Tensor  # [max tiles] int32
    tokens: Tensor  # [max tiles * TILE] int32
    round_block: Tensor  # [rounds + 1] int32
    is_routed: Tensor  # [1] int32
    rounds: int
    tiles_in_memory: int  # at most, in one round


def build(
    bitmap: Tensor,  # [M, bytes] uint8
    coef: Tensor,  # [M]
    rows: Tensor,  # [M] int32, of token i
    count: Tensor,  # [1] int32
    first_token: int,
    capacity: int,
    first_block: int,
    num_blocks: int,
    *,
    tile: int,
    max_pairs_in_memory: int,
    crossover: float,
) -> Lists:
    """Three launches where csrc's kernels can run and four otherwise, whatever the sizes."""
    device = bitmap.device

    def ints(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    max_tiles = int(crossover * capacity * num_blocks) // tile + num_blocks
    tiles_per_round = max(1, max_pairs_in_memory // tile)
    rounds = max_tiles // tiles_per_round + 1
    lists = Lists(
        running=ints(triton.cdiv(capacity, TOKENS), num_blocks),
        lengths=ints(num_blocks),
        first_tile=ints(num_blocks + 1),
        tile_block=ints(max_tiles),
        tokens=ints(max_tiles * tile),
        round_block=ints(rounds + 1),
        is_routed=ints(1),
        rounds=rounds,
        tiles_in_memory=tiles_per_round + triton.cdiv(capacity, tile),
    )
    where = (first_token, capacity, first_block, num_blocks)
    fill = cuda_lists.fill if cuda_lists.available(device) else _fill
    fill(lists, bitmap, coef, rows, count, *where, tile, tiles_per_round, crossover)
    return lists


def _fill(
    lists: Lists, bitmap, coef, rows, count, first_token, capacity, first_block, num_blocks,
    tile, tiles_per_round, crossover,
) -> None:  # fmt: skip
    token_tiles = lists.running.shape[0]
    grid = (token_tiles, triton.cdiv(num_blocks, BLOCKS))
    where = (first_token, capacity, first_block, num_blocks, bitmap.stride(0))
    launch(count_kernel, grid, bitmap, coef, rows, count, lists.running, *where, T=TOKENS, B=BLOCKS)
    lists.running.cumsum_(0, dtype=torch.int32)
    launch(
        plan_kernel, (1,), lists.running, count, lists.lengths, lists.first_tile, lists.round_block, lists.is_routed,
        first_token, capacity, num_blocks, token_tiles, lists.rounds, tiles_per_round, crossover,
        TILE=tile, B=max(16, triton.next_power_of_2(num_blocks)),
    )  # fmt: skip
    launch(
        fill_kernel, grid, bitmap, coef, rows, count, lists.running, lists.first_tile, lists.is_routed,
        lists.tile_block, lists.tokens, *where, TILE=tile, T=TOKENS, B=BLOCKS,
    )  # fmt: skip
