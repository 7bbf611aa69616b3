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


def _several(rank, size, engine, head, labels, options):
    os.environ["FASTDPO_ENGINE"] = engine
    rows = slice(0, SPLIT) if rank == 0 else slice(SPLIT, None)
    part = slice(None) if size == 1 else rows
    group = None if size == 1 else dist.group.WORLD
    x = head.leaves(torch.float32, False)
    lora = (x.lora[0], x.lora[1][part].clone(), x.lora[2])
    x = type(head)(x.hidden, x.weight[part].clone(), x.labels, x.bias[part].clone(), lora).leaves(torch.float32)
    stats = fastdpo.linear_token_stats(
        x.hidden, x.weight, labels, x.bias, lora=x.lora, vocab_group=group, **OPTIONS, **options
    )
    ((stats.logps * torch.linspace(-1, 2, labels.shape[1])).sum() + (stats.lse**2).sum()).backward()
    del os.environ["FASTDPO_ENGINE"]
    return [y.detach() for y in stats], {name: y.grad for name, y in x.tensors().items()}


@pytest.mark.parametrize("how", ["exact", "routed, every pair"])
def test_several_labels_on_two_shards(engine, how, ranks):
    head, labels = small_head(N=20, V=1000, bias=True, lora=True), torch.randint(0, 1000, (20, 5))
    labels[torch.rand(20, 5) < 0.3] = -100
    labels[:, 1], labels[3] = labels[:, 0], -100
    labels[6] = torch.randint(SPLIT, 1000, (5,))  # all on the second rank
    head = head.leaves(torch.float64, False)
    results = ranks(2)(_several, engine, head, labels, HOW[how])
    stats, grads = _several(0, 1, "reference", head, labels, HOW[how])
    for rank in range(2):
        for ours, expected in zip(results[rank][0], stats):
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
        for name in ("hidden", "lora_a"):
            assert relative_error(results[rank][1][name], grads[name]) < 5e-6, name
    for mine, others in zip(*(found for found, _ in results)):
        assert torch.equal(mine, others)
    for name in ("weight", "bias", "lora_b"):
        joined = torch.cat([results[rank][1][name] for rank in range(2)])
        assert relative_error(joined, grads[name]) < 5e-6, name


def _other_labels(rank, size, labels, what):
    torch.manual_seed(0)
    head = small_head(N=6, V=300).leaves(torch.float32)
    if what == "labels of a row" and rank:
        labels = labels[:, :2]
    stats = fastdpo.linear_token_stats(head.hidden, head.weight[:150], labels, vocab_group=dist.group.WORLD)
    loss = stats.logps.sum() + (stats.lse.sum() if what == "lse" and rank else 0.0)
    loss.backward()


@pytest.mark.parametrize("what,found", [("labels of a row", "rank 0 has 3, rank 1 has 2"), ("lse", "logps and lse")])
def test_ranks_compare_several_labels_and_lse(ranks, what, found):
    errors = ranks(2).errors(_other_labels, torch.zeros(6, 3, dtype=torch.int64), what)
    for error in errors:
        assert "they differ in" in str(error) and found in str(error), error


def test_fp64_shards_are_summed_in_fp64(ranks, monkeypatch):
    monkeypatch.setenv("FASTDPO_ENGINE", "reference")
    head = small_head(V=1000, bias=True, lora=True, masked=True)
    results = ranks(2)(_rank, "reference", head.leaves(torch.float64, False), torch.float64, HOW["exact"])
    stats, grads = _scored(head.leaves(torch.float64), **HOW["exact"])
    for (logps, *_), found in results:
        torch.testing.assert_close(logps, stats.logps.detach(), rtol=1e-12, atol=1e-12)
        for name in ("hidden", "lora_a"):
            assert relative_error(found[name], grads[name]) < 1e-12, name
