"""Shards of very different widths: ranks exchange a chunk of tokens at a time, as many chunks on every rank."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
from heads import relative_error, small_head

import fastdpo
from fastdpo.distributed import VocabShards


def _uneven(rank, size, engine, head, columns):
    from fastdpo.ops import reference
    from fastdpo.ops.cpu import operands

    os.environ["FASTDPO_ENGINE"] = engine
    reference.LOGITS_BYTES, operands.TILE_BYTES = 20000, 800  # several chunks, of sizes that follow from the width
    head = head.leaves(torch.float32)
    weight = head.weight.detach().split(columns)[rank].clone().requires_grad_()
    stats = fastdpo.linear_token_stats(head.hidden, weight, head.labels, vocab_group=dist.group.WORLD, tau=0.1, seed=3)
    (stats.logps.sum() + stats.entropy.sum()).backward()
    del os.environ["FASTDPO_ENGINE"]
    return [x.detach() for x in stats], head.hidden.grad, weight.grad


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_shards_of_any_widths_go_through_the_same_chunks(ranks, name, monkeypatch):
    if fastdpo.backends()["engines"][name]["reason"] is not None:
        pytest.skip(f"no {name} engine")
    head, columns = small_head(N=60, V=1500, H=4, masked=True), [3, 1300, 197]
    results = ranks(3)(_uneven, name, head.leaves(torch.float64, False), columns)
    whole = head.leaves(torch.float64)
    monkeypatch.setenv("FASTDPO_ENGINE", "reference")
    stats = fastdpo.linear_token_stats(whole.hidden, whole.weight, whole.labels, backward="exact")
    (stats.logps.sum() + stats.entropy.sum()).backward()
    for ours, dhidden, _ in results:
        for x, expected in zip(ours, stats):
            torch.testing.assert_close(x.double(), expected.double(), rtol=2e-5, atol=2e-5)
        assert relative_error(dhidden, whole.hidden.grad) < 2e-6
    assert relative_error(torch.cat([dweight for *_, dweight in results]), whole.weight.grad) < 2e-6


def _placed(rank, size):
    shards = VocabShards.of(dist.group.WORLD, (5, 0, 7))
    return shards.vocab_start, shards.vocab_size, shards.widest, shards.rank


def test_where_a_shard_begins(ranks):
    assert ranks(3)(_placed) == [(0, 12, 7, 0), (5, 12, 7, 1), (5, 12, 7, 2)]
