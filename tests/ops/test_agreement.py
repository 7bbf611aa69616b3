"""What ranks compare of a call: every option of a head, but those that are a rank's own affair."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from heads import small_head

from fastdpo.head import HEAD_OPTIONS, HeadOptions, check_head
from fastdpo.ops.agreement import described

OTHER = {
    "ignore_index": -7,
    "logit_scale": 2.0,
    "softcap": 3.0,
    "temperature": 0.5,
    "backward": "exact",
    "tau": (0.1, 0.2),
    "seed": 3,
    "check_labels": True,
}
OWN = ("vocab_group", "accumulate_into")  # who takes part, and where a rank keeps its gradient


def _told(options: HeadOptions, dtype=torch.float32, **changes):
    head = small_head(N=8, V=300, bias=True, lora=True).leaves(dtype)
    tensors = {"hidden": head.hidden, "weight": head.weight, "labels": head.labels, "bias": head.bias,
               "lora": head.lora, **changes}  # fmt: skip
    call = check_head(*tensors.values(), options)
    told = described(call, options, (), True, None)
    return told.fields, told.seed


def test_the_list_is_whole():
    assert {*OTHER, *OWN} == set(HEAD_OPTIONS)


@pytest.mark.parametrize("name", OTHER)
def test_another_option_is_another_call(name):
    assert _told(HeadOptions()) != _told(replace(HeadOptions(), **{name: OTHER[name]}))


def test_other_tensors_are_another_call():
    plain = _told(HeadOptions())
    assert plain == _told(HeadOptions())
    assert plain != _told(HeadOptions(), dtype=torch.bfloat16)
    assert plain != _told(HeadOptions(), bias=None)
    assert plain != _told(HeadOptions(), lora=None)
    with torch.autocast("cpu", torch.bfloat16):
        assert plain != _told(HeadOptions())
