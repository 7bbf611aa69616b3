"""Types, alignments and transforms of the operands, against the reference."""

from __future__ import annotations

import pytest
import torch
from heads import relative_error, small_head
from triton_case import ROUTED, Case

from fastdpo.ops.triton import backward


@pytest.mark.parametrize("how", ["exact", "routed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("H", [48, 33])  # 33: rows that TMA cannot address
def test_types_and_alignments(monkeypatch, how, dtype, H):
    monkeypatch.setattr(backward, "CROSSOVER", 1.0)
    head = small_head(N=50, V=700, H=H, bias=True, masked=True)
    Case(head, dtype, ROUTED[how], scale=0.5, temperature=1.2).check(torch.randn(50))


def test_weight_of_another_type():
    head = small_head(N=30, V=300)
    case = Case(head, torch.bfloat16, weight_dtype=torch.float32)
    saved, expected, ours, grads = case.run(torch.randn(30))
    torch.testing.assert_close(saved.logps.double(), expected.logps, rtol=1e-5, atol=5e-6)
    assert ours.weight.dtype == torch.float32 and ours.hidden.dtype == torch.bfloat16
    assert relative_error(ours.weight, grads.weight) < 5e-3
