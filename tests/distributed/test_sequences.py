"""What seq_group's options may be; what ranks do with them: tests/distributed/test_seq_group*.py."""

from __future__ import annotations

import inspect

import pytest
import torch

import fastdpo
from fastdpo.distributed.sequences import digest
from fastdpo.head import HeadOptions

HIDDEN, WEIGHT, LABELS = torch.zeros(2, 4, 8), torch.zeros(30, 8), torch.zeros(2, 4, dtype=torch.int64)


@pytest.mark.parametrize("value", ["nccl", 0, object()])
def test_what_is_no_group_is_refused(value):
    with pytest.raises(TypeError, match="seq_group must be a process group"):
        fastdpo.linear_dpo_loss(HIDDEN, WEIGHT, LABELS, seq_group=value)
    with pytest.raises(TypeError, match="seq_group must be a process group"):
        fastdpo.LinearDPOLoss(seq_group=value)
    with pytest.raises(TypeError, match="seq_group must be a process group"):
        fastdpo.preference_loss(torch.zeros(1), torch.zeros(1), seq_group=value)


def test_options_without_effect_are_refused():
    for grads in ("mean", "average"):
        for door in (
            lambda **options: fastdpo.linear_dpo_loss(HIDDEN, WEIGHT, LABELS, **options),
            lambda **options: fastdpo.LinearDPOLoss(**options),
            lambda **options: fastdpo.preference_loss(torch.zeros(1), torch.zeros(1), **options),
        ):
            with pytest.raises(ValueError, match=f"seq_grads.*'{grads}'"):
                door(seq_grads=grads)
    for positions in ("zigzag", LABELS):
        with pytest.raises(ValueError, match="seq_positions was given without seq_group"):
            fastdpo.linear_dpo_loss(HIDDEN, WEIGHT, LABELS, ld_alpha=0.5, seq_positions=positions)
        with pytest.raises(ValueError, match="seq_positions was given without seq_group"):
            fastdpo.LinearDPOLoss(ld_alpha=0.5)(HIDDEN, WEIGHT, LABELS, seq_positions=positions)


def test_the_signatures_have_them():
    assert inspect.signature(fastdpo.preference_loss).parameters["seq_grads"].default == "sum"
    assert inspect.signature(fastdpo.linear_dpo_loss).parameters["seq_positions"].kind.name == "KEYWORD_ONLY"


def test_a_digest_is_that_of_the_values_in_any_order():
    assert digest({"a": 1, "b": None}) == digest({"b": None, "a": 1}) != digest({"a": 1.0, "b": None})
    assert -(2**63) <= digest({}) < 2**63


@pytest.mark.parametrize("seed", [0, 2**63, 2**64 - 1, None])
def test_streams_have_keys_of_their_own(seed):
    keys = []
    for stream in range(4):
        torch.manual_seed(0)
        keys.append(int(HeadOptions(seed=seed, stream=stream).key(torch.device("cpu"))))
    torch.manual_seed(0)
    assert keys[0] == int(HeadOptions(seed=seed).key(torch.device("cpu"))) and len(set(keys)) == 4
