"""The forward, chunk by chunk."""

from __future__ import annotations

import torch
from heads import small_head
from triton_case import Case

from fastdpo.ops.problem import FOLDED
from fastdpo.ops.triton import memory
from fastdpo.ops.triton.forward import forward


def test_a_token_does_not_depend_on_its_chunk(monkeypatch):
    case = Case(small_head(N=300, V=700, bias=True, lora=True, masked=True), softcap=9.0)
    whole = forward(case.head, case.rows, stats=frozenset(FOLDED))
    monkeypatch.setattr(memory, "FORWARD_HIDDEN", 1)
    parts = forward(case.head, case.rows, stats=frozenset(FOLDED))
    for name in ("logps", "lse", *FOLDED):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=1e-6, atol=1e-6, equal_nan=True)
