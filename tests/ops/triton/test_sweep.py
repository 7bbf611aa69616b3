"""What a sweep is made of."""

from __future__ import annotations

import pytest
import torch
from heads import small_head
from triton_case import ROUTED, Case

from fastdpo.ops.triton import backward


@pytest.mark.parametrize("how", ["exact", "routed"])
def test_small_upstream_gradients_survive_fp16(monkeypatch, how):
    monkeypatch.setattr(backward, "CROSSOVER", 1.0)
    head = small_head(N=20, V=300)
    head.hidden *= 0.3
    Case(head, torch.float16, ROUTED[how]).check(torch.randn(20).abs() * 1e-4 + 1e-4)
