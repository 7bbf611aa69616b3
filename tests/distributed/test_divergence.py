"""Two heads split along the vocabulary: two ranks over gloo give what one rank with the whole heads gives."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
from divergence_cases import TwoHeads, two_heads

SPLIT = 384  # rows of the first rank: three blocks, the rest ragged
ROUTED = {"backward": "routed", "seed": 2**63 + 5}
HOW = {
    "exact": {"backward": "exact"},
    "routed, every pair": {**ROUTED, "tau": 0.0},
    "routed": {**ROUTED, "tau": 0.15},
    "routed, two sets": {**ROUTED, "tau": (0.3, 0.1)},
}


def scored(heads: TwoHeads, mask: bool, kind: str, group=None, **options):
    stats = ("entropy",) if mask else ("entropy", "logps", "ref_logps")
    found = heads(mask, kind=kind, stats=stats, vocab_group=group, **options)
    weights = torch.arange(1.0, 1 + heads.labels.numel()).view(heads.labels.shape)
    loss = (found.divergence * weights).sum()
    loss = loss if mask else loss - (found.logps * weights).sum()
    return [x.detach() for x in found if x is not None], torch.autograd.grad(loss, heads.leaves)


def shard(heads: TwoHeads, rank: int) -> TwoHeads:
    rows = slice(0, SPLIT) if rank == 0 else slice(SPLIT, None)

    def cut(x):
        return None if x is None else x.detach()[rows].clone().requires_grad_(x.requires_grad)

    factors = (heads.lora[0].detach().clone().requires_grad_(), cut(heads.lora[1]), heads.lora[2])
    hidden = heads.hidden.detach().clone().requires_grad_()
    teacher = heads.ref_hidden, cut(heads.ref_weight)
    biases = cut(heads.bias), cut(heads.ref_bias)
    return TwoHeads(hidden, cut(heads.weight), *teacher, heads.labels, *biases, factors, heads.options)


def _rank(rank, size, engine, heads, mask, kind, options):
    from fastdpo.ops.cpu import backward

    os.environ["FASTDPO_ENGINE"] = engine
    crossover, backward.CROSSOVER = backward.CROSSOVER, 2.0
    found = scored(shard(heads, rank), mask, kind, dist.group.WORLD, **options)
    backward.CROSSOVER = crossover
    del os.environ["FASTDPO_ENGINE"]
    return found


@pytest.mark.parametrize("mask", [False, True], ids=["labels", "mask"])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("engine", ["reference", "cpu"])
@pytest.mark.parametrize("how", HOW)
def test_two_shards_equal_two_heads(engine, how, kind, mask, ranks, monkeypatch):
    heads = two_heads(V=1000, alike=0.6, full=True)
    results = ranks(2)(_rank, engine, heads, mask, kind, HOW[how])
    monkeypatch.setenv("FASTDPO_ENGINE", "reference")
    values, grads = scored(heads, mask, kind, **HOW[how])
    for mine, _ in results:
        for ours, expected in zip(mine, values):
            torch.testing.assert_close(ours, expected, rtol=2e-5, atol=2e-5)
    (_, first), (_, second) = results
    assert torch.equal(first[0], second[0])  # dhidden is whole on every rank
    joined = [first[0], *(torch.cat((a, b)) for a, b in zip(first[1:3], second[1:3])), first[3]]
    joined.append(torch.cat((first[4], second[4])))
    for ours, expected in zip(joined, grads):
        assert (ours - expected).norm() < 3e-5 * expected.norm()


CHANGES = {
    "kind": {"kind": "reverse_kl"},
    "ref_softcap": {"ref_softcap": 3.0},
    "labels_or_mask": {"mask": True},
    "ref_hidden, whose values differ": {"ref_hidden": 1},
}


def _differing(rank, size, heads, name):
    given = shard(heads, rank)
    options = {"kind": "forward_kl"}
    if rank == 1:
        change = dict(CHANGES[name])
        if change.pop("ref_hidden", None):
            given.ref_hidden = given.ref_hidden + 1.0
        if "ref_softcap" in change:
            given.options = {**given.options, **change}
        else:
            options |= change
    try:
        given(vocab_group=dist.group.WORLD, **options)
    except ValueError as error:
        message = str(error)
    else:
        message = None
    shard(heads, rank)(vocab_group=dist.group.WORLD)  # the group is usable
    return message


@pytest.mark.parametrize("name", CHANGES)
def test_ranks_that_are_given_different_teachers_raise_alike(name, ranks):
    messages = ranks(2)(_differing, two_heads(V=1000, full=True), name)
    assert messages[0] == messages[1] and name in messages[0]


def _refusing(rank, size, heads):
    given = shard(heads, rank)
    if rank == 1:
        given.ref_weight = given.ref_weight[:-1]
    try:
        given(vocab_group=dist.group.WORLD)
    except ValueError as error:
        return str(error)


def test_what_one_rank_refuses_all_raise(ranks):
    messages = ranks(2)(_refusing, two_heads(V=1000, full=True))
    assert all("V = 616 but ref_weight has V = 615" in message for message in messages)
