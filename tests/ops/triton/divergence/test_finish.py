"""A token's results from its blocks, where the label is nearly all of a distribution or of its block."""

from __future__ import annotations

import pytest
from triton_divergence_case import KINDS, Case


@pytest.mark.parametrize("likeness", [0.0, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_sure_and_unsure_labels(kind, likeness):
    Case(kind, N=12, V=300, H=16, ref_H=16, size=6.0, likeness=likeness).check_forward()
