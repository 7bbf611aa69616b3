"""Ranks of a seq_group that differ, or of which one fails, all hear of it by name; and go on together afterwards."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

import fastdpo
from fastdpo.distributed.sequences import _AGREED, SequenceGroup, agree

H, V = 8, 200


def _call(rank, size, changes, door):
    """With `changes` on the last rank; then one in which all is the same."""
    generator = torch.Generator().manual_seed(rank)
    group = dist.group.WORLD

    def call(hidden=None, sequences=4, packed=False, **options):
        tokens = 3 + rank
        if door == "preference_loss":
            logps = [-torch.rand(sequences // 2, generator=generator) for _ in range(4)]
            return fastdpo.preference_loss(*logps, seq_group=group, **options).loss
        hidden = torch.randn(sequences, tokens, H, generator=generator) if hidden is None else hidden
        labels = torch.randint(0, V, (sequences, tokens), generator=generator)
        weight = torch.randn(V, H, generator=torch.Generator().manual_seed(9)).requires_grad_()
        if packed:
            options["cu_seqlens"] = torch.arange(0, sequences + 1) * tokens
            hidden, labels = hidden.flatten(0, 1), labels.flatten()
        if options.pop("bad_label", False):
            labels[0, 0] = V
        if door == "module":
            module = fastdpo.LinearDPOLoss(seq_group=group, **options)
            return module(hidden, weight, labels).loss
        return fastdpo.linear_dpo_loss(hidden, weight, labels, seq_group=group, **options).loss

    ours = {name: x[rank] if isinstance(x, list) else x for name, x in changes.items()}
    ours = {name: x for name, x in ours.items() if x is not None}
    text = None
    try:
        call(**ours)
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
    return text, call()


CONSTANT = torch.zeros(4, 4, H)
DIFFER = {
    "beta": ({"beta": [0.1, 0.2]}, "must agree on beta; got 0.1 on rank 0, 0.2 on rank 1"),
    "loss_type": (
        {"loss_type": ["hinge", ["sigmoid", "sft"]]},
        r"agree on loss_type; got \('hinge',\) on rank 0, \('sigmoid', 'sft'\)",
    ),
    "ld_alpha": ({"ld_alpha": [None, 0.5]}, "agree on ld_alpha; got None on rank 0, 0.5 on rank 1"),
    "softcap": ({"softcap": [3.0, None]}, "agree on softcap; got 3.0 on rank 0, None on rank 1"),
    "average_log_prob": ({"average_log_prob": [True, False]}, "agree on average_log_prob; got True on rank 0, False"),
    "use_weighting": ({"use_weighting": [False, True]}, "agree on use_weighting"),
    "seq_grads": ({"seq_grads": ["mean", "sum"]}, "agree on seq_grads; got 'mean' on rank 0, 'sum' on rank 1"),
    "sequences": ({"sequences": [2, 4]}, "agree on the number of sequences; got 2 on rank 0, 4 on rank 1"),
    "layout": ({"packed": [False, True]}, "agree on the layout; got 'padded' on rank 0, 'packed' on rank 1"),
    "positions": (
        {"ld_alpha": 0.5, "seq_positions": [torch.arange(12).view(4, 3), "zigzag"]},
        "agree on seq_positions; got 'a tensor' on rank 0, 'zigzag' on rank 1",
    ),
    "reference": (
        {"ref_logps": [torch.zeros(4), torch.zeros(4, 4)]},
        "agree on ref_logps; got 'per sequence' on rank 0, 'per token' on rank 1",
    ),
    "one reference": ({"ref_logps": [None, torch.zeros(4)]}, "agree on ref_logps; got None on rank 0, 'per sequence'"),
    "dtype": ({"hidden": [None, CONSTANT.bfloat16()]}, "agree on the dtype of hidden; got 'torch.float32' on rank 0"),
    "gradient": (
        {"hidden": [None, CONSTANT.clone().requires_grad_()]},
        "agree on whether hidden requires a gradient; got False on rank 0, True on rank 1",
    ),
    "kto_kl": ({"loss_type": "kto", "kto_kl": [0.0, 1.0]}, "agree on kto_kl; got 0.0 on rank 0, 1.0 on rank 1"),
    "kto_kl, a tensor": (
        {"loss_type": "kto", "kto_kl": [torch.zeros(1), torch.ones(())]},
        "kto_kl must be the same on every rank of seq_group, whole .* got 0 on rank 0 and 1 on rank 1",
    ),
    "parts of a whole": (
        {"ref_logps": [torch.zeros(4), torch.arange(4.0)]},
        "ref_logps must be the same on every rank of seq_group, whole .* got 0 on rank 0 and 1 on rank 1",
    ),
    "positions twice": (
        {"ld_alpha": 0.5, "seq_positions": [torch.arange(12).view(4, 3) % 3, torch.arange(16).view(4, 4) % 4 + 2]},
        "seq_positions must say each token's place in its whole sequence; got 2 twice in sequence 0",
    ),
}


@pytest.mark.parametrize("case", DIFFER)
def test_ranks_that_differ_hear_the_same(case, ranks):
    changes, message = DIFFER[case]
    (first, after), (second, after_second) = ranks(2)(_call, changes, "linear_dpo_loss")
    assert first == second and re.match(f"ValueError: .*{message}", first)
    assert after.isfinite() and torch.equal(after, after_second)


FAILS = {
    "beta": ({"beta": [0.1, -1.0]}, "beta must be a finite number > 0; got -1.0"),
    "name": ({"betta": [None, 1.0]}, "unexpected option 'betta'"),
    "label": ({"check_labels": True, "bad_label": [None, True]}, r"labels\[0, 0\] = 200 is neither"),
    "hidden": ({"hidden": [None, "hidden"]}, "hidden must be a torch.Tensor; got str"),
    "meta": ({"hidden": [None, CONSTANT.to("meta")]}, "it takes no fake or meta tensors"),
    "width": ({"hidden": [None, torch.zeros(4, 4, H + 1)]}, f"hidden has H = {H + 1} but weight has H = {H}"),
    "positions": ({"seq_positions": [None, "zigzag"]}, "seq_positions was given without ld_alpha"),
    "odd": ({"ld_alpha": 0.1, "seq_positions": ["zigzag", "zigzag"]}, "two equal chunks .* are 3, an odd number"),
    "negative": (
        {"ld_alpha": 0.1, "seq_positions": [torch.zeros(4, 3).long(), torch.full((4, 4), -2)]},
        r"seq_positions of completion tokens must lie in \[0, 2\*\*32\); got -2",
    ),
    "other shape": (
        {"ld_alpha": 0.1, "seq_positions": [torch.zeros(4, 3).long(), torch.zeros(3, 4).long()]},
        r"seq_positions must be shaped like labels, \(4, 4\); got \(3, 4\)",
    ),
    "grads": ({"seq_grads": [None, "average"]}, "seq_grads must be 'sum' or 'mean'; got 'average'"),
}


@pytest.mark.parametrize("case", FAILS)
def test_a_rank_that_fails_is_named_by_the_others(case, ranks):
    changes, message = FAILS[case]
    found = ranks(2)(_call, changes, "linear_dpo_loss")
    which = 0 if case == "odd" else 1
    (own, _), (others, _) = found[which], found[1 - which]
    assert re.search(message, own)
    assert others == f"ValueError: rank {which} of seq_group failed: {own}"
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("door", ["preference_loss", "module"])
def test_every_door_compares(door, ranks):
    (first, after), (second, after_second) = ranks(2)(_call, {"loss_type": "hinge", "beta": [0.1, 0.3]}, door)
    assert first == second == "ValueError: the ranks of seq_group must agree on beta; got 0.1 on rank 0, 0.3 on rank 1"
    assert torch.equal(after, after_second)
    changes = {"beta": [0.1, -0.3]} if door == "preference_loss" else {"seq_grads": "mean", "ld_alpha": [0.1, None]}
    (first, after), (second, after_second) = ranks(2)(_call, changes, door)
    assert ("rank 1 of seq_group failed: ValueError: beta" if door == "preference_loss" else "ld_alpha") in first
    assert "beta must be" in second or "agree on ld_alpha" in second
    assert torch.equal(after, after_second)


class _Elsewhere:
    """A device whose values cost a wait to read."""

    type = "cuda"


def _where_reading_waits(rank, size):
    """What is seen once is not compared again; and tickets that differ after all leave NaN on every rank."""
    group, counts = dist.new_group(list(range(size))), []
    gathered = dist.all_gather

    def counted(*args, **kwargs):
        counts[-1] += 1
        return gathered(*args, **kwargs)

    dist.all_gather, made = counted, torch.tensor
    torch.tensor = lambda *args, device=None, **kwargs: made(*args, **kwargs)
    try:
        for described in ({"a": 1}, {"a": 1}, {"a": 2}, {"a": 1}):
            counts.append(0)
            agree(group, _Elsewhere, described)
        counts.append(0)
        agree(group, _Elsewhere, {}, ValueError("after an agreement"))  # the others may be elsewhere: no exchange
    finally:
        dist.all_gather, torch.tensor = gathered, made
    over, local = SequenceGroup.of(group, "sum"), torch.ones(2, 3, dtype=torch.float64) * (rank + 1)
    same = over.sum(local)
    apart = replace(over, ticket=7 if rank == 0 else 2**40).sum(local)
    assert group in _AGREED
    dist.destroy_process_group(group)
    return counts, same, apart


def test_where_reading_waits_an_agreement_is_kept(ranks):
    for counts, same, apart in ranks(2)(_where_reading_waits):
        assert counts == [1, 0, 1, 0, 0]
        assert same.tolist() == [[3.0] * 3] * 2 and apart.isnan().all()
