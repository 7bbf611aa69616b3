"""The lists of kept pairs against the pairs that fastdpo/routing.py keeps."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from triton_case import DEVICE

from fastdpo import routing
from fastdpo.ops.triton import lists as pair_lists
from fastdpo.ops.triton.common import TokenList, TokenRange

TOKENS, BLOCKS, SEED = 700, 77, 11


def kept_pairs(kind: str) -> torch.Tensor:
    """[TOKENS, BLOCKS] bool"""
    if kind == "empty":
        return torch.zeros(TOKENS, BLOCKS, dtype=torch.bool)
    labels = torch.randint(0, BLOCKS * routing.BLOCK, (TOKENS,))
    spread = {"random": 4.0, "flat": 0.0, "one-hot": 1e4}[kind]
    share = (spread * torch.randn(TOKENS, BLOCKS)).softmax(1)
    bitmap, _ = routing.route(share, labels, (2.0**-7,), SEED, torch.arange(TOKENS))
    return routing.unpack_bits(bitmap, BLOCKS)


def build(kept, coef, count, first_token, capacity, first_block, num_blocks, most=None, tile=16, crossover=1.0):
    """(what fills rounds, Lists) from rows that lie in another order than their tokens."""
    shuffled = torch.randperm(TOKENS)
    bitmap = torch.full((TOKENS, 13), 255, dtype=torch.uint8)[:, :10].to(DEVICE)  # rows are not contiguous
    bitmap[shuffled] = routing.pack_bits(kept).to(DEVICE)
    coef_rows, most_rows = torch.empty(TOKENS), torch.empty(TOKENS, dtype=torch.int32)
    coef_rows[shuffled] = coef
    most_rows[shuffled] = (kept.sum(1) if most is None else most).int()
    tokens = TokenList(rows=shuffled.int().to(DEVICE), count=torch.tensor([count], dtype=torch.int32, device=DEVICE))
    blocks = range(first_block, first_block + num_blocks)
    sweep = SimpleNamespace(
        part=SimpleNamespace(lists=lambda _: [blocks]),
        call=SimpleNamespace(pair_tile=tile, num_blocks=BLOCKS, hidden_size=5, low_rank_pitch=16),
        tokens=TokenRange(tokens, first_token, capacity),
        routed_pairs=1000,
        done=torch.full((9,), 7, dtype=torch.int32, device=DEVICE),
        dhidden=torch.full((capacity, 5), 7.0, device=DEVICE),
        dlow_rank=None,
    )
    pairs = pair_lists.Kept(bitmap, bitmap.stride(0), most_rows.to(DEVICE), coef_rows.to(DEVICE))
    items = torch.zeros(pair_lists.ITEMS, dtype=torch.int32, device=DEVICE)
    lists = pair_lists.empty(sweep, blocks, crossover, items)
    pair_lists.fill(sweep, pairs, lists, blocks, 0, crossover)
    assert not sweep.done.any() and sweep.dhidden.any() == (first_block > 0)

    def fill(round):
        items.zero_()
        pair_lists.fill(sweep, pairs, lists, blocks, round, crossover)

    return fill, lists


@pytest.mark.slow
@pytest.mark.parametrize("ranges", [(128, 512, 5, 61), (0, 768, 0, 77), (640, 128, 32, 1)], ids=str)
@pytest.mark.parametrize("kind", ["random", "flat", "one-hot", "empty"])
def test_lists_hold_the_pairs_in_the_order_of_the_tokens(kind, ranges):
    first_token, capacity, first_block, num_blocks = ranges
    if num_blocks == BLOCKS and kind != "random" and not torch.cuda.is_available():
        pytest.skip("20 seconds in the interpreter")
    kept, coef, count, tile = kept_pairs(kind), torch.ones(TOKENS), TOKENS - 5, 16
    coef[135] = 0
    fill, lists = build(kept, coef, count, *ranges, tile=tile)
    wanted = (kept & (coef != 0)[:, None])[first_token : min(first_token + capacity, count)]
    first_tile, edges = lists.first_tile.tolist(), lists.round_block.tolist()
    assert first_tile[0] == 0 and lists.is_routed.item() == 1
    assert edges[0] == 0 and edges[-1] == num_blocks and edges == sorted(edges)
    for round, (low, high) in enumerate(itertools.pairwise(edges)):
        assert first_tile[high] - first_tile[low] <= len(lists.tile_block)
        fill(round)
        for b in range(low, high):
            column = wanted[:, first_block + b]
            expected = column.nonzero()[:, 0].tolist()
            assert lists.lengths[b] == len(expected)
            begin, end = first_tile[b] - first_tile[low], first_tile[b + 1] - first_tile[low]
            assert lists.tokens[begin * tile : begin * tile + len(expected)].tolist() == expected
            assert end - begin == -(-len(expected) // tile) and (lists.tile_block[begin:end] == b).all()
            parts = torch.nn.functional.pad(column, (0, capacity - len(column))).split(pair_lists.TOKENS.value)
            assert lists.running[:, b].tolist() == list(itertools.accumulate(int(part.sum()) for part in parts))


def test_the_expected_number_of_pairs_decides_and_never_the_drawn_one():
    """Of the tokens in range that have an upstream gradient."""
    kept, coef = torch.rand(TOKENS, BLOCKS) < 0.5, torch.ones(TOKENS)
    coef[::3] = 0
    most = torch.randint(20, 40, (TOKENS,))
    share = most[: TOKENS - 60][coef[: TOKENS - 60] != 0].sum().item() / ((TOKENS - 60) * BLOCKS)
    for drawn in (kept, kept & (torch.rand(TOKENS, BLOCKS) < 0.2)):
        for crossover in (share * 0.99, share * 1.01):
            _, lists = build(drawn, coef, TOKENS - 60, 0, 768, 0, BLOCKS, most, crossover=crossover)
            assert lists.is_routed.item() == (crossover > share)
            wanted = (drawn & (coef != 0)[:, None])[: TOKENS - 60]
            assert lists.lengths.cpu().equal(wanted.sum(0).int())
