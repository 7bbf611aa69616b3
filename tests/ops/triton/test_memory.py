"""The workspace's bound."""

from __future__ import annotations

import itertools

from fastdpo.ops.triton import memory


def test_the_workspace_is_spent_within_its_bound():
    """Of every width and length: what a sweep holds at once, and that a range is whole tiles of tokens."""
    for n, h, item in itertools.product([1, 300, 4096, 10_000, 1 << 20], [64, 2304, 2560, 4096, 8192, 16384], [2, 4]):
        sums = 4 * h
        size, fits = memory.range_size(n, item, sums)
        assert size % 128 == 0 and size > 0
        assert not fits or size >= n
        sweeps = [(memory.hidden_slab(size, item, sums), size * sums, 0)]
        assert sweeps[-1][0][0] == size
        everything = -(-n // 128) * 128
        slab = memory.weight_slab(everything, item, sums)
        sweeps.append((slab, 0, 128 * sums if slab[0] < everything else 0))
        for (tokens, blocks), held, per_block in sweeps:
            assert tokens % 128 == 0 and blocks >= 1
            used = held + blocks * (per_block + 128 * item * tokens)
            assert used <= max(memory.WORKSPACE, held + per_block + 128 * item * 128)
            assert used <= 128 << 20
