"""How the Triton engine spends its workspace: whatever N, V and H, together below 128 MiB.

Every launch costs time on the host, so each sweep takes as much of the workspace as makes its launches fewest.
"""

from __future__ import annotations

from ...routing import BLOCK

# Forward
FORWARD_HIDDEN = 64 << 20  # gathered rows of the tokens that go through the vocabulary together
FORWARD_PARTIAL = 48 << 20  # their sums per block

# Backward: numbers of the kept pairs, and the rest
LISTS = 12 << 20
WORKSPACE = 104 << 20
SUMS = 64 << 20  # fp32 dhidden of a range of tokens: the head is read once per range
LEAST_DZ = 16 << 20


def multiple(x: int, of: int) -> int:
    """The largest multiple of `of` up to `x`, at least one."""
    return max(x // of, 1) * of


def range_size(num_tokens: int, item: int, sums: int) -> tuple[int, bool]:
    """(tokens of a range, whether one range holds all with room for dz); `sums`: bytes of a token's fp32 sums."""
    everything, dz = -(-num_tokens // 128) * 128, item * BLOCK
    if everything * sums + max(LEAST_DZ, everything * dz) <= WORKSPACE:
        return everything, True
    return min(multiple(min(SUMS // sums, WORKSPACE // (sums + dz)), 128), everything), False


def hidden_slab(capacity: int, item: int, sums: int) -> tuple[int, int]:
    """(tokens of a chunk, blocks of a slab) of a sweep for dhidden, whose chunk is everything."""
    return capacity, max(1, (WORKSPACE - capacity * sums) // (item * BLOCK * capacity))


def weight_slab(capacity: int, item: int, sums: int) -> tuple[int, int]:
    """(tokens of a chunk, blocks of a slab) of a sweep for dweight, `sums` bytes of fp32 per column of the slab.

    One chunk of all tokens needs no sums; else they take a quarter, so that both the head's rows and the tokens' are
    read few times.
    """
    if capacity * item * BLOCK <= WORKSPACE:
        return capacity, WORKSPACE // (item * BLOCK * capacity)
    blocks = max(1, WORKSPACE // 4 // (BLOCK * sums))
    return min(multiple((WORKSPACE // blocks - BLOCK * sums) // (BLOCK * item), 128), capacity), blocks


def routed_pairs(held: int, item: int) -> int:
    """Pairs whose dz fits beside `held` bytes."""
    return (WORKSPACE - held) // (item * BLOCK)


def list_blocks(capacity: int) -> int:
    """Blocks whose pairs are counted together, one number for each tile of lists.TOKENS tokens."""
    return max(1, LISTS // (4 * -(-capacity // 128)))
