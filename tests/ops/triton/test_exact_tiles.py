"""The exact products, of both upstream gradients."""

from __future__ import annotations

import torch
from heads import small_head
from triton_case import Case


def test_entropy_gradient_of_rows_without_a_logp_gradient():
    head = small_head(N=40, V=700, bias=True, masked=True)
    coef = torch.randn(40)
    coef[::3] = 0
    Case(head, softcap=5.0).check(coef, torch.randn(40))
