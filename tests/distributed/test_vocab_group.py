"""Vocabulary shards: two ranks over gloo give what one rank with the whole head gives."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
from heads import relative_error, small_head

import fastdpo

SPLIT = 384  # rows of the first rank: three blocks, the rest ragged
OPTIONS = {"logit_scale": 1.2, "softcap": 6.0, "temperature": 0.8}


def _scored(head, group=None, backward="exact", **options):
    stats = fastdpo.linear_token_stats(
        head.hidden,
        head.weight,
        head.labels,
        head.bias,
        lora=head.lora,
        vocab_group=group,
        backward=backward,
        **OPTIONS,
        **options,
    )
    (stats.logps * torch.arange(1.0, 1 + len(stats.logps))).sum().backward()
    return stats, {name: x.grad for name, x in head.tensors().items()}


def _rank(rank, size, engine, head, dtype, options):
    os.environ["FASTDPO_ENGINE"] = engine
    if engine == "triton":  # few of so few blocks can be skipped: it would compute all
        from fastdpo.ops.triton import backward as gradients
    else:
        from fastdpo.ops.cpu import backward as gradients
    crossover, gradients.CROSSOVER = gradients.CROSSOVER, 1.0
    rows = slice(0, SPLIT) if rank == 0 else slice(SPLIT, None)
    shard = head.leaves(dtype, False)
    lora = (shard.lora[0], shard.lora[1][rows].clone(), shard.lora[2])
    shard = type(head)(shard.hidden, shard.weight[rows].clone(), shard.labels, shard.bias[rows].clone(), lora)
    stats, grads = _scored(shard.leaves(dtype), dist.group.WORLD, **options)
    gradients.CROSSOVER = crossover
    del os.environ["FASTDPO_ENGINE"]
    return [x.detach() for x in stats], grads


ROUTED = {"backward": "routed", "seed": 2**63 + 5}
HOW = {
    "exact": {"backward": "exact"},
    "routed, every pair": {**ROUTED, "tau": 0.0},
    "routed": {**ROUTED, "tau": 0.15},  # the same pairs as of the whole head: a shard begins where the last one ended
    "routed, two sets": {**ROUTED, "tau": (0.3, 0.1)},
}


@pytest.mark.parametrize("how", HOW)
def test_two_shards_equal_one_head(engine, how, ranks, monkeypatch):
    head = small_head(V=1000, bias=True, lora=True, masked=True)
    results = ranks(2)(_rank, engine, head.leaves(torch.float64, False), torch.float32, HOW[how])
    monkeypatch.setenv("FASTDPO_ENGINE", "reference")
    whole = head.leaves(torch.float32)
    stats, grads = _scored(whole, **HOW[how])
    for rank in range(2):
        for name, ours, expected in zip(stats._fields, results[rank][0], stats):
            torch.testing.assert_close(ours, expected.detach(), rtol=1e-5, atol=1e-5, msg=name)
    for name, mine, others in zip(stats._fields, *(stats for stats, _ in results)):
        assert torch.equal(mine, others), name  # bit for bit: ranks take the same steps
    for name in ("hidden", "lora_a"):
        for rank in range(2):
            assert relative_error(results[rank][1][name], grads[name]) < 5e-6, name
    for name in ("weight", "bias", "lora_b"):
        joined = torch.cat([results[rank][1][name] for rank in range(2)])
        assert relative_error(joined, grads[name]) < 5e-6, name


def test_fp64_shards_are_summed_in_fp64(ranks, monkeypatch):
    monkeypatch.setenv("FASTDPO_ENGINE", "reference")
    head = small_head(V=1000, bias=True, lora=True, masked=True)
    results = ranks(2)(_rank, "reference", head.leaves(torch.float64, False), torch.float64, HOW["exact"])
    stats, grads = _scored(head.leaves(torch.float64), **HOW["exact"])
    for (logps, *_), found in results:
        torch.testing.assert_close(logps, stats.logps.detach(), rtol=1e-12, atol=1e-12)
        for name in ("hidden", "lora_a"):
            assert relative_error(found[name], grads[name]) < 1e-12, name
