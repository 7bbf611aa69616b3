"""The lists of kept pairs, by Triton and by csrc/pair_lists.h, against the pairs that fastdpo/routing.py keeps."""

from __future__ import annotations

import itertools
import os
from functools import partial

import pytest
import torch

import fastdpo
from fastdpo import routing
from fastdpo.ops import native

if fastdpo.backends()["engines"]["triton"]["reason"]:
    pytest.skip(fastdpo.backends()["engines"]["triton"]["reason"], allow_module_level=True)

from fastdpo.ops import cuda_lists, triton_lists

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
TOKENS, BLOCKS, SEED = 700, 77, 11


@pytest.fixture(params=["triton", "csrc"])
def builder(request, monkeypatch):
    """csrc: its kernels on a GPU, on the CPU their twin."""
    on_host = DEVICE == "cpu"
    if request.param == "csrc":
        problem = native.reason() if on_host else native.cuda_problem()
        if problem:
            pytest.skip(problem)
        monkeypatch.setattr(cuda_lists, "fill", partial(cuda_lists.fill, on_host=on_host))
    monkeypatch.setattr(cuda_lists, "available", lambda device: request.param == "csrc")


def kept_pairs(kind: str) -> torch.Tensor:
    """[TOKENS, BLOCKS] bool"""
    if kind == "empty":
        return torch.zeros(TOKENS, BLOCKS, dtype=torch.bool)
    labels = torch.randint(0, BLOCKS * routing.BLOCK, (TOKENS,))
    spread = {"random": 4.0, "flat": 0.0, "one-hot": 1e4}[kind]
    mass = (spread * torch.randn(TOKENS, BLOCKS)).softmax(1)
    uniforms = routing.pair_uniforms(SEED, torch.arange(TOKENS), torch.arange(BLOCKS))
    return routing.kept_pairs(mass, labels, 2.0**-7, uniforms)


def build(kept, coef, count, first_token, capacity, first_block, num_blocks, **options):
    """From rows that lie in another order than their tokens."""
    shuffled = torch.randperm(TOKENS)
    bitmap = torch.full((TOKENS, 13), 255, dtype=torch.uint8)[:, :10]  # rows are not contiguous
    bitmap[shuffled] = routing.pack_bits(kept)
    coef_rows = torch.empty(TOKENS)
    coef_rows[shuffled] = coef
    count = torch.tensor([count], dtype=torch.int32)
    inputs = (x.to(DEVICE) for x in (bitmap, coef_rows, shuffled.int(), count))
    options = {"tile": 16, "max_pairs_in_memory": 1000, "crossover": 1.0, **options}
    return triton_lists.build(*inputs, first_token, capacity, first_block, num_blocks, **options)


@pytest.mark.parametrize("ranges", [(128, 512, 5, 61), (0, 768, 0, 77), (640, 128, 32, 1)], ids=str)
@pytest.mark.parametrize("kind", ["random", "flat", "one-hot", "empty"])
def test_lists_hold_the_pairs_in_the_order_of_the_tokens(kind, ranges, builder):
    first_token, capacity, first_block, num_blocks = ranges
    kept, coef, count, tile = kept_pairs(kind), torch.ones(TOKENS), TOKENS - 5, 16
    coef[135] = 0
    lists = build(kept, coef, count, *ranges, tile=tile)
    wanted = (kept & (coef != 0)[:, None])[first_token : min(first_token + capacity, count)]
    first_tile = lists.first_tile.tolist()
    assert first_tile[0] == 0
    for b in range(num_blocks):
        column = wanted[:, first_block + b]
        expected = column.nonzero()[:, 0].tolist()
        assert lists.lengths[b] == len(expected)
        start = first_tile[b] * tile
        assert lists.tokens[start : start + len(expected)].tolist() == expected
        assert first_tile[b + 1] - first_tile[b] == -(-len(expected) // tile)
        assert (lists.tile_block[first_tile[b] : first_tile[b + 1]] == b).all()
        parts = torch.nn.functional.pad(column, (0, capacity - len(column))).split(triton_lists.TOKENS)
        assert lists.running[:, b].tolist() == list(itertools.accumulate(int(part.sum()) for part in parts))
    edges = lists.round_block.tolist()
    assert edges[0] == 0 and edges[-1] == num_blocks and edges == sorted(edges)
    in_rounds = [first_tile[end] - first_tile[begin] for begin, end in itertools.pairwise(edges)]
    assert max(in_rounds) <= lists.tiles_in_memory and lists.is_routed.item() == 1


def test_too_many_pairs_are_not_listed(builder):
    kept = torch.rand(TOKENS, BLOCKS) < 0.5
    share = kept[: TOKENS - 60].float().mean().item()
    for crossover in (share * 0.99, share * 1.01):
        lists = build(kept, torch.ones(TOKENS), TOKENS - 60, 0, 768, 0, BLOCKS, crossover=crossover)
        assert lists.is_routed.item() == (crossover > share)
        assert lists.lengths.cpu().equal(kept[: TOKENS - 60].sum(0).int())
