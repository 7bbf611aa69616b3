"""How the Triton engine spends its workspace: whatever N, V and H, together below 128 MiB.

Every launch costs time on the host, so each sweep takes as much of the workspace as makes its launches fewest.
"""

from __future__ import annotations

import math

from ...routing import BLOCK

# Forward
FORWARD_HIDDEN = 48 << 20  # gathered rows of the tokens that go through the vocabulary together
FORWARD_PARTIAL = 48 << 20  # their sums per block

# Backward: numbers of the kept pairs, and the rest
LISTS = 12 << 20
WORKSPACE = 104 << 20
SUMS = 64 << 20  # fp32 dhidden of a range of tokens: the head is read once per range
HIDDEN = 8 << 20  # gathered rows of a chunk of tokens, beside such sums
LEAST_DZ = 16 << 20


def multiple(x: int, of: int) -> int:
    """The largest multiple of `of` up to `x`, at least one."""
    return max(x // of, 1) * of


def range_size(num_tokens: int, row: int, sums: int) -> tuple[int, bool]:
    """(tokens of a range, whether one range holds all with room for dweight beside it).

    `row` and `sums`: bytes of a gathered row and of a token's fp32 sums.
    """
    everything = -(-num_tokens // 128) * 128
    if everything * (row + sums) + LEAST_DZ <= WORKSPACE:
        return everything, True
    return min(multiple(SUMS // sums, 128), everything), False


def hidden_slab(capacity: int, row: int, item: int, sums: int, *, joint: bool) -> tuple[int, int]:
    """(tokens of a chunk, blocks of a slab) of a sweep for dhidden; joint: of everything in one chunk."""
    tokens = capacity if joint else min(multiple(HIDDEN // row, 128), capacity)
    left = WORKSPACE - capacity * sums - tokens * row
    return tokens, max(1, left // (item * BLOCK * tokens))


def weight_slab(capacity: int, row: int, item: int, sums: int) -> tuple[int, int]:
    """(tokens of a chunk, blocks of a slab) of a sweep for dweight, `sums` bytes of fp32 per column of the slab.

    Pairs of a chunk and a slab are fewest where tokens * blocks is largest: with equal memory for the chunk's rows and
    the slab's sums, and dz between them. One chunk of all tokens needs no sums.
    """
    if capacity * (row + item * BLOCK) <= WORKSPACE:
        return capacity, (WORKSPACE - capacity * row) // (item * BLOCK * capacity)
    per_block = 2 * BLOCK * sums  # rows and sums
    tokens_per_block = BLOCK * sums / row
    quadratic = item * BLOCK * tokens_per_block
    blocks = (math.sqrt(per_block**2 + 4 * quadratic * WORKSPACE) - per_block) / (2 * quadratic)
    tokens = min(multiple(int(blocks * tokens_per_block), 128), capacity)
    return tokens, max(1, int((WORKSPACE - tokens * row) / (BLOCK * (sums + item * tokens))))


def routed_pairs(held: int, item: int) -> int:
    """Pairs whose dz fits beside `held` bytes: the routed path gathers no rows."""
    return (WORKSPACE - held) // (item * BLOCK)


def list_blocks(capacity: int) -> int:
    """Blocks whose pairs are counted together, one number for each tile of lists.TOKENS tokens."""
    return max(1, LISTS // (4 * -(-capacity // 128)))
