"""What each kernel costs, as a function of sizes: operations, bytes of memory, bytes through the L2 cache, instructions
of epilogues. `steps.py` takes the sizes from the launches that the engine makes.

Assumptions, all of them here:

main loop   runs at the rate of a large plain product, whatever the tile; tiles count whole, padding is paid for, and
            so are the multiprocessors that have no tile in the last round
L2 cache    every program reads its tiles of both operands through it; multiprocessors that ask for the same line at the
            same time do not share the answer. `multicast`: so many programs of a cluster share the columns' tile.
            An atomic addition of fp32 counts 4 bytes there and 4 back, as a read and a write do
memory      operands that several programs read come from memory once per group of tiles; of rows that are used again
            and again, in no particular order, as many bytes as the cache does not hold (`Gpu.cache`)
epilogue    ISSUE instructions per clock and multiprocessor: of 4, two warps per scheduler in chains that wait for
            themselves reach half. At most EXPS exponentials per clock (16 by the CUDA programming guide). The
            tensor cores wait meanwhile, unless the epilogue overlaps: by its design, or because another program of
            the same multiprocessor has a tile to multiply
fill        a program alone on its multiprocessor waits FILL seconds for the first operands of every tile
sum         kernels run one after the other, `Gpu.launch` apart
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from .gpus import Gpu

BLOCK = 128
ISSUE = 2.0
EXPS = 16.0
FILL = 0.5e-6


class Epilogue(NamedTuple):
    """Of one element of a tile."""

    instructions: float
    exps: float = 0.0
    overlaps: bool = False

    @property
    def clocks(self) -> float:
        """Of a multiprocessor."""
        return max(self.instructions / (32 * ISSUE), self.exps / EXPS)


# Instructions per element of a common tile, counted in machine code: of logits by `python -m tools.kernels --counts`
# per architecture; of the rest on sm_90, all that stands outside of the main loop over the elements of a thread.
_OF_LOGITS = {
    80: {"fold": 7.5, "dz": 9.6, "routed_dz": 22.6},
    90: {"fold": 6.0, "dz": 6.0, "routed_dz": 7.2},
    100: {"fold": 4.8, "dz": 6.0, "routed_dz": 9.3},
    120: {"fold": 7.8, "dz": 9.4, "routed_dz": 23.7},
}
_OTHERS = {"dhidden": 10, "dweight": 5.3, "routed_dhidden": 13.6, "routed_dweight": 10}


def epilogues(capability: int) -> dict[str, Epilogue]:
    """By kernel; of an architecture between two of these, the older one's."""
    counted = max(known for known in _OF_LOGITS if known <= capability)
    found = {name: Epilogue(n) for name, n in _OTHERS.items()}
    return found | {name: Epilogue(n, 1) for name, n in _OF_LOGITS[counted].items()}


OVERLAPPED = Epilogue(6.0, 1, True)  # one consumer folds while the other multiplies


class Tile(NamedTuple):
    m: int
    n: int
    k: int = 64
    group: int = 8  # tiles of rows that go through the columns together
    per_sm: int = 1  # programs of one multiprocessor
    multicast: int = 1


@dataclass
class Cost:
    flops: float = 0.0  # of matrix products
    bytes: float = 0.0  # from and to memory
    launches: int = 0
    l2: float = 0.0  # bytes between the L2 cache and the multiprocessors
    idle: float = 0.0  # operations that multiprocessors without a tile could have done
    after: float = 0.0  # clocks of multiprocessors, all of them together, in epilogues that the tensor cores wait for
    beside: float = 0.0  # and in those that overlap
    fills: float = 0.0  # tiles, one after the other, that wait for their first operands

    def floor(self, gpu: Gpu) -> float:
        """Seconds: no kernel with these products and these bytes of memory is faster."""
        return max(self.flops / gpu.flops, self.bytes / gpu.bandwidth) + self.launches * gpu.launch

    def parts(self, gpu: Gpu) -> dict[str, float]:
        """Seconds of each thing that takes time at once, and of the two that come after."""
        clocks = gpu.multiprocessors * gpu.clock
        return {
            "tensor": (self.flops + self.idle) / gpu.flops,
            "memory": self.bytes / gpu.bandwidth,
            "L2": self.l2 / gpu.l2,
            "beside": self.beside / clocks,
            "after": self.after / clocks + self.fills * FILL,
            "launches": self.launches * gpu.launch,
        }

    def expected(self, gpu: Gpu) -> float:
        """Seconds, by the assumptions above."""
        parts = self.parts(gpu)
        after = parts.pop("after") + parts.pop("launches")
        return max(parts.values()) + after

    def bound(self, gpu: Gpu) -> str:
        """What takes longest of what happens at once, or before it."""
        parts = self.parts(gpu)
        return max(("tensor", "memory", "L2", "beside", "launches"), key=parts.get)

    def __iadd__(self, other: Cost) -> Cost:
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))
        return self

    def plus(self, **more: float) -> Cost:
        self += Cost(**more)
        return self


def padded(n: float, tile: int) -> float:
    return math.ceil(n / tile) * tile


def missed(used: float, distinct: float, cache: float) -> float:
    """Bytes from memory of `used` bytes in rows of `distinct` bytes altogether, used in no particular order."""
    return min(distinct, used) + max(0.0, used - distinct) * max(0.0, 1 - cache / distinct)


def tiled(tiles: float, tile: Tile, depth: float, multiprocessors: int, item: int, epilogue: Epilogue) -> Cost:
    """So many tiles of products `depth` deep."""
    each, rounds = 2.0 * tile.m * tile.n * depth, math.ceil(tiles / multiprocessors)
    overlaps = epilogue.overlaps or tile.per_sm > 1
    clocks = rounds * multiprocessors * tile.m * tile.n * epilogue.clocks
    return Cost(
        tiles * each,
        l2=tiles * (tile.m + tile.n / tile.multicast) * depth * item,
        idle=(rounds * multiprocessors - tiles) * each,
        after=0.0 if overlaps else clocks,
        beside=clocks if overlaps else 0.0,
        fills=0 if overlaps else rounds,
    )


def product(rows, columns, depth, tile: Tile, multiprocessors: int, item: int, epilogue: Epilogue) -> Cost:
    tiles = math.ceil(rows / tile.m) * math.ceil(columns / tile.n)
    return tiled(tiles, tile, depth, multiprocessors, item, epilogue)


# The forward and the exact backward: n tokens, columns of the vocabulary, H


def fold(n, columns, H, tile, multiprocessors, item, epilogue, *, sums: int = 1) -> Cost:
    """`sums`: fp32 numbers per token and block."""
    m = padded(n, tile.m)
    groups, out = math.ceil(m / (tile.m * tile.group)), 4 * sums * m * math.ceil(columns / BLOCK)
    cost = product(n, columns, H, tile, multiprocessors, item, epilogue)
    return cost.plus(bytes=item * (groups * columns * H + m * H) + out, l2=out)


def dz(n, columns, H, tile, multiprocessors, item, epilogue) -> Cost:
    m, c = padded(n, tile.m), padded(columns, tile.n)
    cost = product(n, columns, H, tile, multiprocessors, item, epilogue)
    return cost.plus(bytes=item * (c * H + m * H + m * c), l2=item * m * c)


def dhidden(n, columns, H, tile, multiprocessors, item, epilogue) -> Cost:
    """Added to fp32 sums, once for all of these columns."""
    sums, m = 8 * n * H, padded(n, tile.m)
    cost = product(n, H, columns, tile, multiprocessors, item, epilogue)
    return cost.plus(bytes=item * (m * columns + columns * H) + sums, l2=sums)


def dweight(n, columns, H, tile, multiprocessors, item, epilogue, *, partial: int = 0, last: bool = True) -> Cost:
    """`partial`: bytes per element of sums over other chunks of tokens that are read and written."""
    n, m = padded(n, tile.k), padded(columns, tile.m)
    out = (item * last + partial) * m * H
    cost = product(columns, H, n, tile, multiprocessors, item, epilogue)
    return cost.plus(bytes=item * n * (m + H) + out, l2=out)


# The routed backward: `lengths`, pairs of each block, of so many tokens


def tiles_of(lengths: Tensor, m: int) -> float:
    return (lengths / m).ceil().sum().item()


def _touched(lengths: Tensor, H: int, item: int) -> float:
    """Bytes of the head's rows that have a pair."""
    return (lengths > 0).sum().item() * BLOCK * H * item


def routed_dz(lengths, tokens, H, tile, multiprocessors, item, epilogue, cache) -> Cost:
    tiles = tiles_of(lengths, tile.m)
    rows = missed(item * lengths.sum().item() * H, item * tokens * H, cache)
    out = item * tiles * tile.m * BLOCK
    cost = tiled(tiles, tile, H, multiprocessors, item, epilogue)
    return cost.plus(bytes=rows + _touched(lengths, H, item) + out, l2=out)


def routed_dhidden(lengths, tokens, H, tile, multiprocessors, item, epilogue, cache) -> Cost:
    """Tiles [m pairs, n of H], added by atomics to the tokens' rows, which memory holds where the cache does not."""
    tiles, pairs = tiles_of(lengths, tile.m), lengths.sum().item()
    added = missed(8 * pairs * H, 8 * tokens * H, cache)
    cost = tiled(tiles * math.ceil(H / tile.n), tile, BLOCK, multiprocessors, item, epilogue)
    return cost.plus(bytes=item * tiles * tile.m * BLOCK + _touched(lengths, H, item) + added, l2=8 * pairs * H)


def ordered_dhidden(lengths, tokens, H, tile, multiprocessors, item, epilogue, cache, *, groups: int) -> Cost:
    """The same by groups of tokens, each of which reads the blocks' parts of the head again."""
    shares = torch.poisson((lengths / groups).expand(groups, -1), generator=torch.Generator().manual_seed(0))
    tiles, pairs, parts = (shares / tile.m).ceil().sum().item(), lengths.sum().item(), math.ceil(H / tile.n)
    added = missed(8 * pairs * H, 8 * tokens * H, cache)
    cost = tiled(tiles * parts, tile, BLOCK, multiprocessors, item, epilogue)
    # a program reads its part of a block once, if it has pairs there
    cost.l2 = parts * item * BLOCK * (pairs + (shares > 0).sum().item() * tile.n) + 8 * pairs * H
    return cost.plus(bytes=item * pairs * BLOCK + _touched(lengths, H, item) + added)


def routed_dweight(lengths, tokens, H, tile, multiprocessors, item, epilogue, cache) -> Cost:
    """Programs of one block by n of H, as deep as the block's list; the longest list delays nobody."""
    depth, parts = tiles_of(lengths, tile.k) * tile.k, math.ceil(H / tile.n)
    clocks = len(lengths) * parts * BLOCK * tile.n * epilogue.clocks
    rows = missed(item * depth * parts * tile.n, item * tokens * H, cache)
    out = item * len(lengths) * BLOCK * H
    return Cost(
        2.0 * depth * BLOCK * parts * tile.n,
        rows + item * depth * BLOCK + out,
        l2=item * depth * parts * (BLOCK + tile.n) + out,
        beside=clocks,
    )
