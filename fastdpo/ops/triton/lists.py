"""The bitmap of kept pairs -> per block of the vocabulary the list of its tokens, in the order of the tokens.

Lists are cut into work tiles of TILE pairs, a block's last tile padded; tiles of all blocks are numbered in vocabulary
order, and rounds of whole blocks bound what of them is in memory at once. All sizes stay on the device.

Whether the lists are used at all hangs on the expected number of pairs, never on the drawn one: the mean over draws
would not be the exact gradient any more.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import VARYING, num_tokens
from .launch import launch

TOKENS = 128  # of one program, and of one row of `running`
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
    most_pairs,  # [M] int32
    counts,  # [tiles of T tokens, num_blocks] int32
    most,  # [tiles of T tokens] int64: pairs of all blocks, whatever the draw
    first_token, capacity, first_block, num_blocks, stride,
    T: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    _, b, kept = _kept(bitmap, coef, rows, count, first_token, capacity, first_block, num_blocks, stride, T, B)
    tl.store(counts + tl.program_id(0) * num_blocks + b, tl.sum(kept, 0), mask=b < num_blocks)
    if tl.program_id(1) == 0:
        t = tl.program_id(0) * T + tl.arange(0, T)
        exists = t < num_tokens(count, first_token, capacity)
        row = tl.load(rows + first_token + t, mask=exists, other=0).to(tl.int64)
        exists = exists & (tl.load(coef + row, mask=exists, other=0.0) != 0)
        tl.store(most + tl.program_id(0), tl.sum(tl.load(most_pairs + row, mask=exists, other=0).to(tl.int64), 0))


@triton.jit(do_not_specialize=VARYING)
def plan_kernel(
    running,  # [token tiles, num_blocks] int32, inclusive sums over token tiles
    most,  # [token tiles] int64
    count,
    lengths,  # [num_blocks] int32
    first_tile,  # [num_blocks + 1] int32, of each block
    round_block,  # [rounds + 1] int32, first block of each round
    is_routed,  # [1] int32: few enough pairs live for the routed kernels to pay
    first_token, capacity, num_blocks, all_blocks, token_tiles, rounds, tiles_per_round, crossover,
    TILE: tl.constexpr, B: tl.constexpr, T: tl.constexpr,
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
    t = tl.arange(0, T)
    live = tl.sum(tl.load(most + t, mask=t < token_tiles, other=0), 0)
    tl.store(is_routed, (live.to(tl.float32) <= crossover * n.to(tl.float32) * all_blocks).to(tl.int32))
    for r in range(0, rounds):
        tl.store(round_block + r, tl.sum(((begin < r * tiles_per_round) & (b < num_blocks)).to(tl.int32), 0))
    tl.store(round_block + rounds, num_blocks)


@triton.jit(do_not_specialize=VARYING)
def fill_kernel(
    bitmap, coef, rows, count, running, first_tile, round_block, is_routed,
    tile_block,  # [tiles in memory] int32, block of each of the round's tiles
    tokens,  # [tiles in memory * TILE] int32, token of each pair, from first_token; padding is not written
    round, first_token, capacity, first_block, num_blocks, stride,
    TILE: tl.constexpr, T: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    if tl.load(is_routed) == 0:
        return
    low, high = tl.load(round_block + round), tl.load(round_block + round + 1)
    if (tl.program_id(1) * B >= high) | (tl.program_id(1) * B + B <= low):
        return
    t, b, kept = _kept(bitmap, coef, rows, count, first_token, capacity, first_block, num_blocks, stride, T, B)
    kept = tl.where(((b >= low) & (b < high))[None, :], kept, 0)
    tile = tl.load(first_tile + b, mask=b < num_blocks, other=0) - tl.load(first_tile + low)
    mine = tl.sum(kept, 0)
    before = tl.load(running + tl.program_id(0) * num_blocks + b, mask=b < num_blocks, other=0) - mine
    rank = before[None, :] + tl.cumsum(kept, 0) - kept
    at = tile[None, :] * TILE + rank
    tl.store(tokens + at, (t[:, None] + b[None, :] * 0), mask=kept != 0)
    starts = (kept != 0) & (rank % TILE == 0)  # the first pair of a tile names the tile's block
    tl.store(tile_block + tile[None, :] + rank // TILE, (b[None, :] + t[:, None] * 0), mask=starts)


@dataclass(frozen=True)
class Pairs:
    """Kept pairs of a range of tokens, and what says which tokens those are."""

    bitmap: Tensor  # [M, bytes] uint8 of one set
    most_pairs: Tensor  # [M] int32
    coef: Tensor  # [M]
    rows: Tensor  # [M] int32, of token i
    count: Tensor  # [1] int32
    first_token: int
    capacity: int
    all_blocks: int


@dataclass(frozen=True)
class Lists:
    """The pairs of a range of tokens by a range of blocks. Sizes are bounds: the true ones are on the device."""

    pairs: Pairs
    first_block: int
    num_blocks: int
    tile: int
    running: Tensor  # [ceil(capacity / TOKENS), num_blocks] int32, pairs of a block up to this many tokens, inclusive
    lengths: Tensor  # [num_blocks] int32
    first_tile: Tensor  # [num_blocks + 1] int32
    round_block: Tensor  # [rounds + 1] int32
    is_routed: Tensor  # [1] int32
    rounds: int
    tile_block: Tensor  # [tiles in memory] int32: of the round that was filled last, as `tokens`
    tokens: Tensor  # [tiles in memory * tile] int32

    @property
    def tiles_in_memory(self) -> int:
        """At most, in one round."""
        return self.tile_block.shape[0]

    def fill(self, round: int) -> None:
        """Lists the round's pairs, in place of another's."""
        p = self.pairs
        launch(
            fill_kernel, (self.running.shape[0], triton.cdiv(self.num_blocks, BLOCKS)),
            p.bitmap, p.coef, p.rows, p.count, self.running, self.first_tile, self.round_block, self.is_routed,
            self.tile_block, self.tokens, round, p.first_token, p.capacity, self.first_block, self.num_blocks,
            p.bitmap.stride(0), TILE=self.tile, T=TOKENS, B=BLOCKS,
        )  # fmt: skip


def build(
    pairs: Pairs, first_block: int, num_blocks: int, *, tile: int, max_pairs_in_memory: int, crossover: float
) -> Lists:
    """Three launches, and one more for every round."""
    p, device = pairs, pairs.bitmap.device

    def ints(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    max_pairs = min(p.capacity * num_blocks, int(crossover * p.capacity * p.all_blocks))
    tiles_per_round = max(1, max_pairs_in_memory // tile)
    rounds = (max_pairs // tile + num_blocks) // tiles_per_round + 1
    tiles_in_memory = tiles_per_round + triton.cdiv(p.capacity, tile)
    token_tiles = triton.cdiv(p.capacity, TOKENS)
    lists = Lists(
        pairs, first_block, num_blocks, tile,
        running=ints(token_tiles, num_blocks),
        lengths=ints(num_blocks),
        first_tile=ints(num_blocks + 1),
        round_block=ints(rounds + 1),
        is_routed=ints(1),
        rounds=rounds,
        tile_block=ints(tiles_in_memory),
        tokens=ints(tiles_in_memory * tile),
    )  # fmt: skip
    most = ints(token_tiles, dtype=torch.int64)
    launch(
        count_kernel, (token_tiles, triton.cdiv(num_blocks, BLOCKS)),
        p.bitmap, p.coef, p.rows, p.count, p.most_pairs, lists.running, most,
        p.first_token, p.capacity, first_block, num_blocks, p.bitmap.stride(0), T=TOKENS, B=BLOCKS,
    )  # fmt: skip
    lists.running.cumsum_(0, dtype=torch.int32)
    launch(
        plan_kernel, (1,),
        lists.running, most, p.count, lists.lengths, lists.first_tile, lists.round_block, lists.is_routed,
        p.first_token, p.capacity, num_blocks, p.all_blocks, token_tiles, rounds, tiles_per_round, crossover,
        TILE=tile, B=max(16, triton.next_power_of_2(num_blocks)), T=max(16, triton.next_power_of_2(token_tiles)),
    )  # fmt: skip
    return lists
