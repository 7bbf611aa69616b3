"""The whole forward against the reference, in chunks of tokens too."""

from __future__ import annotations

import pytest
import torch
from triton_divergence_case import KINDS, Case, strided

from fastdpo.head import LogitTransform
from fastdpo.ops.triton.divergence.forward import forward


@pytest.mark.parametrize("routed", [None, (0.05, 0.1)], ids=["exact", "routed"])
@pytest.mark.parametrize("labelled", [True, False], ids=["labels", "mask"])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_pairs(kind, labelled, routed):
    transform = LogitTransform(1.2, 20.0, 0.8), LogitTransform(0.7, 0.0, 1.1)
    Case(kind, labelled=labelled, routed=routed, bias=True, rank=3, transform=transform[0], ref_transform=transform[1],
         layout=strided).check_forward()  # fmt: skip


@pytest.mark.parametrize("stats", [(), ("entropy",), ("logps", "ref_logps")], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_without_what_nobody_asked_for(kind, stats):
    Case(kind, routed=(0.1, 0.1), stats=frozenset(stats)).check_forward()


def test_chunks_of_tokens(small_workspaces):
    """300 tokens, 128 at a time."""
    for kind in KINDS:
        Case(kind, N=300, routed=(0.05, 0.05)).check_forward()


def test_types_of_their_own():
    for dtype, ref_dtype in ((torch.float16, torch.float32), (torch.float32, torch.float16)):
        Case("reverse_kl", dtype=dtype, ref_dtype=ref_dtype, routed=(0.1, 0.1)).check_forward()


def test_a_token_does_not_depend_on_the_others():
    case = Case("jsd", routed=(0.05, 0.05))
    before = forward(case.heads, case.rows, stats=case.stats, routing=case.routing(case.needs))
    case.heads.student.hidden[7], case.heads.teacher.hidden[12] = 0.0, torch.nan
    after = forward(case.heads, case.rows, stats=case.stats, routing=case.routing(case.needs))
    others = torch.tensor([x not in (7, 12) for x in range(40)])
    for name, value in vars(before).items():
        assert torch.equal(value[others], getattr(after, name)[others]), name
    assert after.divergence[12].isnan() and not after.divergence[7].isnan()


def test_nearly_equal_heads_keep_their_digits():
    """A divergence of 1e-6 is a sum of small terms: logs of two softmaxes, subtracted, are wrong by as much as it is."""
    for kind in KINDS:
        case = Case(kind, H=32, ref_H=32, size=1.0, likeness=0.0, labelled=False)
        student, teacher = case.heads.student, case.heads.teacher
        teacher.hidden.copy_(student.hidden)
        teacher.weight.copy_(student.weight + 3e-4 * torch.randn_like(student.weight))
        ours, expected = case.forward()
        counts = case.labels == 0
        assert 1e-7 < expected.divergence[counts].mean() < 1e-5
        error = (ours.divergence - expected.divergence)[counts].abs().mean() / expected.divergence[counts].mean()
        assert error < 0.1, (kind, error)


def test_shards_are_refused_by_name():
    case = Case()
    with pytest.raises(NotImplementedError, match="vocab_group"):
        forward(case.heads, case.rows, shards=object())
