"""The gradient of lora_a, over several ranges of tokens."""

from __future__ import annotations

import pytest
import torch
from heads import relative_error, small_head
from triton_case import Case

from fastdpo.ops.problem import Needs


@pytest.mark.parametrize("rank", [3, 40])
@pytest.mark.parametrize("needs_hidden", [True, False])
def test_lora_a_sums_up_ranges(small_workspaces, rank, needs_hidden):
    head = small_head(N=300, V=260, H=48)
    head.lora = (torch.randn(rank, 48).double() * 0.1, torch.randn(260, rank).double() * 0.1, -0.7)
    head.labels[torch.rand(300) < 0.4] = -100
    needs = Needs(needs_hidden, False, False, True, False)
    _, _, ours, expected = Case(head).run(torch.randn(300), needs=needs)
    assert ours.lora_a.shape == (rank, 48) and (ours.hidden is None) != needs_hidden
    assert relative_error(ours.lora_a, expected.lora_a) < 5e-6
